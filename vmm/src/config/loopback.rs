//! Addresses that only programs of this host reach.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// An address and a port of the loopback interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loopback(pub SocketAddr);

impl fmt::Display for Loopback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Loopback {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() && address.port() > 0 => Ok(Self(address)),
            _ => Err("write 127.0.0.1:PORT or [::1]:PORT; no other address is served".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_served() {
        for text in ["127.0.0.1:9180", "127.3.2.1:1", "[::1]:9180"] {
            assert_eq!(text.parse::<Loopback>().unwrap().to_string(), text);
        }
        for text in [
            "0.0.0.0:9180",
            "[::]:9180",
            "192.168.1.1:9180",
            "[::ffff:127.0.0.1]:9180",
            "127.0.0.1:0",
            "127.0.0.1",
            ":9180",
            "9180",
            "localhost:9180",
        ] {
            let error = text.parse::<Loopback>().unwrap_err();
            assert!(error.contains("127.0.0.1:PORT"), "{text}: {error}");
        }
    }
}
