//! A pod's network namespace, as a network plugin leaves it.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use crate::error::Result;
use crate::host::succeeded;

/// The largest packet of its interface, in bytes.
pub const MTU: u16 = 1400;

/// A namespace with one interface, eth0, whose other end is the host's. Removed when this is dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one with the addresses [`Self::guest`] and, at the other end, [`Self::host`].
    ///
    /// # Errors
    /// When `ip` cannot do it.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let namespace = Self {
            name: name.to_owned(),
        };
        let (outer, mtu) = (format!("{name}-host"), MTU.to_string());
        let pair = ["link", "add", &outer, "mtu", &mtu, "type", "veth"];
        let peer = ["peer", "name", "eth0", "mtu", &mtu, "netns", name];
        ip(&[&pair[..], &peer].concat())?;
        let (host, guest) = (Self::host().to_string(), Self::guest().to_string());
        ip(&["addr", "add", &format!("{host}/24"), "dev", &outer])?;
        ip(&["link", "set", &outer, "up"])?;
        namespace.ip(&["addr", "add", &format!("{guest}/24"), "dev", "eth0"])?;
        namespace.ip(&["link", "set", "eth0", "up"])?;
        namespace.ip(&["route", "add", "default", "via", &host])?;
        let neighbour = ["10.77.0.9", "lladdr", "02:00:00:00:00:09"];
        let permanent = ["nud", "permanent", "dev", "eth0"];
        namespace.ip(&[&["neigh", "add"], &neighbour[..], &permanent].concat())?;
        Ok(namespace)
    }

    /// The host's address.
    #[must_use]
    pub fn host() -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 1)
    }

    /// The pod's.
    #[must_use]
    pub fn guest() -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 2)
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// What `ip` says in the namespace.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip(&self, words: &[&str]) -> Result<String> {
        ip(&[&["-netns", &self.name], words].concat())
    }

    /// Its interfaces with the queues of tc, each in a line.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let text = succeeded(Command::new("tc").args(["-netns", &self.name, "qdisc", "show"]))?;
        let links = self.ip(&["-brief", "link"])?;
        let names = links
            .lines()
            .filter_map(|line| line.split(['@', ' ']).next());
        let queues = text.lines().filter(|line| line.contains("ingress"));
        Ok(names.chain(queues).map(str::to_owned).collect())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its interface goes with it, and so does the other end.
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

fn ip(words: &[&str]) -> Result<String> {
    succeeded(Command::new("ip").args(words))
}
