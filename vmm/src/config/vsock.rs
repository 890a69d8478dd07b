//! `--vsock`: streams between programs of the guest and unix sockets of the host.

use std::path::PathBuf;

use clap::Args;

use super::keys::Keys;
use super::number::number;

/// `--vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct VsockConfig {
    /// The guest's number among the host's guests, at least 3
    #[arg(long, value_parser = number::<u32>(3..=u32::MAX as u64 - 1))]
    pub cid: u32,
    /// The socket at which programs of the host ask for the guest's ports. Its port N of the host is the socket PATH_N
    #[arg(long)]
    pub path: PathBuf,
}

impl Keys for VsockConfig {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::{assert_refused, parse_keys};

    #[test]
    fn keys_become_values() {
        let vsock: VsockConfig = parse_keys("cid=3,path=/v").unwrap();
        assert_eq!((vsock.cid, vsock.path), (3, PathBuf::from("/v")));
        assert_refused::<VsockConfig>(&[
            ("cid=3", "path is missing"),
            ("path=/v", "cid is missing: The guest's number"),
            ("cid=2,path=/v", "cid=2: choose 3 to 4294967294"),
            ("cid=4294967295,path=/v", "at most 4294967294"),
            ("cid=4294967299,path=/v", "at most 4294967294"),
            ("cid=-1,path=/v", "cid=-1: write a whole number"),
        ]);
    }
}
