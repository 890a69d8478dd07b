//! `--net`: a network interface on a tap.

use clap::Args;

use super::ConfigError;
use super::keys::{Keys, device_id};
use super::mac::MacAddress;
use super::number::number;
use super::rate::Rate;

/// `--net`: a network interface on a tap.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(rename_all = "snake_case")]
pub struct NetConfig {
    /// Name of the tap, which must exist and be free
    #[arg(long, value_name = "NAME", value_parser = tap_name)]
    pub tap: Option<String>,
    /// Instead: number of a descriptor that the monitor inherits, an open tap with IFF_NO_PI and IFF_VNET_HDR
    #[arg(long, value_parser = number::<i32>(3..=1 << 20))]
    pub fd: Option<i32>,
    /// The guest's address, for instance 02:00:00:00:00:01; one that follows from the names of machine and tap by default
    #[arg(long)]
    pub mac: Option<MacAddress>,
    /// Size of the largest packet in bytes that the guest is told; what it takes by itself, 1500, by default
    #[arg(long, value_parser = number::<u16>(68..=65521))]
    pub mtu: Option<u16>,
    /// Limit of the bytes that the guest receives: SIZE in MS milliseconds (1000), and once BURST more
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub rx_bw: Option<Rate>,
    /// Limit of the frames that it receives, in the same form
    #[arg(long, value_name = "N/MS+BURST")]
    pub rx_ops: Option<Rate>,
    /// Limit of the bytes that it sends
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub tx_bw: Option<Rate>,
    /// Limit of the frames that it sends
    #[arg(long, value_name = "N/MS+BURST")]
    pub tx_ops: Option<Rate>,
    /// Name in the API; net0, net1 and so on by default
    #[arg(long, value_name = "NAME", value_parser = device_id)]
    pub id: Option<String>,
}

impl NetConfig {
    /// The name of the interface with this number; the first is 0.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("net{index}"))
    }
}

impl Keys for NetConfig {
    fn settle(self, _given: &[String]) -> Result<Self, ConfigError> {
        match (&self.tap, self.fd) {
            (Some(_), None) | (None, Some(_)) => Ok(self),
            (Some(_), Some(_)) => Err(ConfigError::TapTwice),
            (None, None) => Err(ConfigError::NoTap),
        }
    }
}

/// The kernel's rules for names of interfaces (`dev_valid_name`, net/core/dev.c), and no `%`, which it would replace.
fn tap_name(name: &str) -> Result<String, ConfigError> {
    let odd = |byte: u8| !byte.is_ascii_graphic() || b"/:%".contains(&byte);
    if (1..=15).contains(&name.len()) && !name.bytes().any(odd) && !matches!(name, "." | "..") {
        return Ok(name.to_owned());
    }
    Err(ConfigError::TapName(name.escape_debug().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::assert_refused;

    #[test]
    fn what_is_no_interface_says_what_is() {
        assert_refused::<NetConfig>(&[
            (
                "mtu=1500",
                "--net: name the host's side; write tap=NAME or fd=N",
            ),
            ("tap=a,fd=3", "--net tap,fd: an interface has one tap"),
            ("tap=a/b", "--net tap=a/b: no interface can have this name"),
            ("tap=..", "tap=..: no interface"),
            ("tap=tap%d", "tap=tap%d: no interface"),
            ("tap=abcdefghijklmnop", "use 1 to 15 letters"),
            ("fd=2", "fd=2: choose 3 to"),
            ("tap=a,mtu=67", "mtu=67: choose 68 to 65521"),
            ("tap=a,mtu=65522", "at most 65521"),
            (
                "tap=a,mac=03:00:00:00:00:01",
                "mac=03:00:00:00:00:01: a multicast address",
            ),
            ("tap=a,mac=00:00:00:00:00:00", "choose another"),
            ("tap=a,mac=x", "'x' is not a MAC address"),
            ("tap=a,rx_bw=fast", "'fast' is not a limit; write SIZE,"),
        ]);
    }
}
