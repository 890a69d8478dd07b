//! Limits of what devices move.

use std::fmt;
use std::str::FromStr;

use super::ConfigError;
use super::number::parse_size;
use super::size::format_size;

/// Far more than any device moves; and a day. Products of these and of times fit into 128 bits.
const MOST_TOKENS: u64 = 1 << 60;
const MOST_MS: u64 = 24 * 60 * 60 * 1000;

/// A token bucket, written `SIZE[/MS][+BURST]`, with the meaning of Firecracker's `size`, `refill_time` and `one_time_burst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes or requests that the bucket holds; it is full at the start. 0: no limit.
    pub size: u64,
    /// Milliseconds in which an empty bucket fills. 0: no limit.
    pub refill_ms: u64,
    /// Bytes or requests that are free once, before the bucket is used.
    pub burst: u64,
}

impl Rate {
    /// A bucket of these tokens and this time.
    ///
    /// # Errors
    /// [`ConfigError::NotARate`]: more tokens than any device moves, or more than a day.
    pub fn new(size: u64, refill_ms: u64, burst: u64) -> Result<Self, ConfigError> {
        if size.max(burst) > MOST_TOKENS || refill_ms > MOST_MS {
            let text = format!("{size}/{refill_ms}+{burst}");
            return Err(ConfigError::NotARate(text));
        }
        Ok(Self {
            size,
            refill_ms,
            burst,
        })
    }
}

impl FromStr for Rate {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let (rest, burst) = text.split_once('+').unwrap_or((text, "0"));
        let (size, refill) = rest.split_once('/').unwrap_or((rest, "1000"));
        let refused = || ConfigError::NotARate(text.escape_debug().to_string());
        let tokens = |text| parse_size(text).map_err(|_| refused());
        let time = refill.parse().ok().filter(|_| !refill.starts_with('+'));
        Self::new(tokens(size)?, time.ok_or_else(refused)?, tokens(burst)?).map_err(|_| refused())
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, burst) = (format_size(self.size), format_size(self.burst));
        write!(formatter, "{size}/{}+{burst}", self.refill_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_written() {
        for (text, size, refill_ms, burst) in [
            ("10M", 10 << 20, 1000, 0),
            ("500/100", 500, 100, 0),
            ("1G+4G", 1 << 30, 1000, 4 << 30),
            ("0/0+0", 0, 0, 0),
            ("1K/250+2K", 1024, 250, 2048),
        ] {
            let rate: Rate = text.parse().unwrap();
            let expected = Rate {
                size,
                refill_ms,
                burst,
            };
            assert_eq!(rate, expected, "{text}");
            assert_eq!(rate.to_string().parse(), Ok(rate), "{text}");
        }
    }

    #[test]
    fn what_is_no_rate_says_how_one_is_written() {
        for text in [
            "",
            "x",
            "-1",
            "1/",
            "1/x",
            "1+",
            "1+2/3",
            "/5",
            "1/2/3",
            "1/+2",
            "1/86400001",
            "2000000T",
        ] {
            let message = text.parse::<Rate>().unwrap_err().to_string();
            assert!(message.contains("SIZE/MS+BURST"), "{text}: {message}");
        }
    }
}
