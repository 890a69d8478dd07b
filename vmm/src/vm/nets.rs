//! The machine's network interfaces, as an operator changes them while it runs.

use crate::control::{CommandError, NetUpdate, RateLimits};
use crate::devices::virtio::net::NetLimits;
use crate::devices::virtio::queue::SharedLimiter;

/// The limits of the interfaces, by name, in the order of the command line.
#[derive(Debug, Default)]
pub struct Nets(Vec<(String, NetLimits)>);

impl Nets {
    /// Another interface.
    pub fn push(&mut self, name: String, limits: &NetLimits) {
        self.0.push((name, limits.clone()));
    }

    /// Changes one of them.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn update(&self, id: &str, update: &NetUpdate) -> Result<(), CommandError> {
        let Some((_, limits)) = self.0.iter().find(|(name, _)| name == id) else {
            let known: Vec<_> = self.0.iter().map(|(name, _)| name.as_str()).collect();
            let known = match known.as_slice() {
                [] => "the machine has none".to_owned(),
                known => format!("there are {}", known.join(", ")),
            };
            let message = format!("there is no network interface {id}; {known}");
            return Err(CommandError::Failed(message));
        };
        let set = |limiter: &SharedLimiter, new: Option<RateLimits>| {
            if let Some(new) = new {
                limiter.set(new.bandwidth, new.operations);
            }
        };
        set(&limits.receive, update.receive);
        set(&limits.transmit, update.transmit);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_one_direction_of_one_interface_change() {
        let limits = || NetLimits {
            receive: SharedLimiter::new(None, None),
            transmit: SharedLimiter::new(None, None),
        };
        let (first, second) = (limits(), limits());
        let mut nets = Nets::default();
        let update = NetUpdate {
            receive: None,
            transmit: Some(RateLimits {
                bandwidth: None,
                operations: "1/86400000".parse().ok(),
            }),
        };
        let none = nets.update("eth0", &update).unwrap_err();
        assert!(none.to_string().contains("has none"), "{none}");
        nets.push("eth0".to_owned(), &first);
        nets.push("eth1".to_owned(), &second);
        nets.update("eth1", &update).unwrap();
        for limits in [&first, &second] {
            limits.receive.take(1);
            limits.transmit.take(1);
        }
        assert!(second.transmit.delay().is_some() && second.receive.delay().is_none());
        assert!(first.transmit.delay().is_none());
        let unknown = nets.update("eth2", &update).unwrap_err().to_string();
        assert!(unknown.contains("eth2; there are eth0, eth1"), "{unknown}");
    }
}
