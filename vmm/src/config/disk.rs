//! `--disk`: a block device backed by a raw file.

use std::path::PathBuf;

use clap::ArgAction::Set;
use clap::Args;

use super::keys::{Keys, on_off};
use super::rate::Rate;

/// `--disk`: a block device backed by a raw file.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct DiskConfig {
    /// Raw disk image or block device, for instance path=disk.raw
    #[arg(long, value_name = "PATH")]
    pub path: PathBuf,
    /// The guest may not write
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub readonly: bool,
    /// Limit of the bytes that are read and written: SIZE in MS milliseconds (1000), and once BURST more
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub bw: Option<Rate>,
    /// Limit of the requests, in the same form
    #[arg(long, value_name = "N/MS+BURST")]
    pub ops: Option<Rate>,
}

impl Keys for DiskConfig {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::{assert_refused, parse_keys};

    #[test]
    fn keys_become_values() {
        let disk: DiskConfig = parse_keys("path=/d,readonly=on").unwrap();
        assert_eq!((disk.path, disk.readonly), (PathBuf::from("/d"), true));
        assert_eq!((disk.bw, disk.ops), (None, None));
        let disk: DiskConfig = parse_keys("path=/d,bw=1M/100+2M,ops=7").unwrap();
        assert_eq!(
            (disk.bw, disk.ops),
            ("1M/100+2M".parse().ok(), "7".parse().ok())
        );
        assert_refused::<DiskConfig>(&[("readonly=on", "path is missing")]);
    }
}
