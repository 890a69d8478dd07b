//! Sizes for people.

use std::fmt;

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// A number of bytes that displays itself in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / MIB as f64;
        f.pad(&if mib < 9.95 {
            format!("{mib:.1} MiB")
        } else {
            format!("{mib:.0} MiB")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_can_be_aligned() {
        assert_eq!(Size(0).to_string(), "0.0 MiB");
        assert_eq!(Size(5 * MIB / 2).to_string(), "2.5 MiB");
        assert_eq!(format!("{:>10}", Size(640 * MIB)), "   640 MiB");
    }
}
