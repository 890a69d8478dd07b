//! Addresses of network interfaces.

use std::fmt;
use std::str::FromStr;

use super::ConfigError;

/// The address of an Ethernet interface: neither multicast nor zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// A locally administered address that follows from `name`: always the same one, and hardly ever that of another name.
    #[must_use]
    pub fn derived(name: &str) -> Self {
        // FNV-1a, 64 bits: unlike the hashes of std it stays as it is.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [_, _, first, rest @ ..] = hash.to_be_bytes();
        let [a, b, c, d, e] = rest;
        // IEEE 802, 8.4.
        let (multicast, local) = (1, 2);
        Self([first & !multicast | local, a, b, c, d, e])
    }

    /// Its bytes, in the order in which they are written and sent.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let refused = || ConfigError::NotAMac(text.escape_debug().to_string());
        let byte = |part: &str| {
            let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes: [u8; 6] = bytes
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(refused)?;
        match bytes {
            [0, 0, 0, 0, 0, 0] => Err(ConfigError::ZeroMac(text.to_owned())),
            [first, ..] if first & 1 != 0 => Err(ConfigError::MulticastMac(text.to_owned())),
            _ => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let mac: MacAddress = "02:00:5E:10:00:fF".parse().unwrap();
        assert_eq!(mac.bytes(), [2, 0, 0x5e, 0x10, 0, 0xff]);
        assert_eq!(mac.to_string(), "02:00:5e:10:00:ff");
    }

    #[test]
    fn what_is_no_interfaces_address() {
        for (text, part) in [
            ("", "'' is not a MAC"),
            ("02:00:00:00:00", "is not a MAC"),
            ("02:00:00:00:00:00:00", "is not a MAC"),
            ("2:00:00:00:00:00", "is not a MAC"),
            ("02:00:00:00:00:+1", "is not a MAC"),
            ("0g:00:00:00:00:00", "is not a MAC"),
            ("02-00-00-00-00-01", "is not a MAC"),
            ("00:00:00:00:00:00", "choose another"),
            ("01:00:5e:00:00:01", "multicast"),
            ("ff:ff:ff:ff:ff:ff", "multicast"),
        ] {
            let message = text.parse::<MacAddress>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn derived_addresses_are_stable_local_and_differ() {
        assert_eq!(
            MacAddress::derived("ebb/tap0"),
            MacAddress::derived("ebb/tap0")
        );
        let all: Vec<MacAddress> = (0..1000)
            .map(|number| MacAddress::derived(&format!("ebb/tap{number}")))
            .collect();
        for (number, mac) in all.iter().enumerate() {
            assert_eq!(mac.bytes()[0] & 3, 2, "{mac}");
            assert!(!all[..number].contains(mac), "{mac}");
            assert_eq!(mac.to_string().parse(), Ok(*mac));
        }
    }
}
