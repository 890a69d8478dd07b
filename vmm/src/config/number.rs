//! Numbers and sizes, and the bounds that an option sets for them.

use std::ffi::OsStr;
use std::num::TryFromIntError;
use std::ops::RangeInclusive;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, Command};

use super::ConfigError;
use super::size::format_size;

/// Parses a number of bytes: digits and at most one of the suffixes K, M, G, T (powers of 1024).
///
/// # Errors
/// [`ConfigError::NotASize`] for anything else, or a size beyond 64 bits.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let shift = match text.bytes().last() {
        Some(b'K' | b'k') => 10,
        Some(b'M' | b'm') => 20,
        Some(b'G' | b'g') => 30,
        Some(b'T' | b't') => 40,
        _ => 0,
    };
    let digits = &text[..text.len() - usize::from(shift > 0)];
    let number = digits.parse().ok().filter(|_| !digits.starts_with('+'));
    let bytes = number.and_then(|number: u64| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| ConfigError::NotASize {
        value: text.to_owned(),
    })
}

/// The parser of a number within bounds. Help and error messages state the same bounds.
#[derive(Clone)]
struct Bounded {
    range: RangeInclusive<u64>,
    unit: Unit,
}

#[derive(Clone, Copy)]
enum Unit {
    One,
    /// Bytes, in multiples of this many.
    Bytes(u64),
    /// Bytes, a power of two.
    PowerOfTwo,
}

/// A whole number in `range`, which lies within the type.
pub(super) fn number<T>(range: RangeInclusive<u64>) -> impl TypedValueParser<Value = T>
where
    T: TryFrom<u64, Error = TryFromIntError> + Clone + Send + Sync + 'static,
{
    let unit = Unit::One;
    Bounded { range, unit }.try_map(T::try_from)
}

/// A number of bytes in `range`, a multiple of `multiple`.
pub(super) fn size(
    range: RangeInclusive<u64>,
    multiple: u64,
) -> impl TypedValueParser<Value = u64> {
    let unit = Unit::Bytes(multiple);
    Bounded { range, unit }
}

/// A number of bytes in `range`, a power of two.
pub(super) fn power_of_two(range: RangeInclusive<u64>) -> impl TypedValueParser<Value = u64> {
    let unit = Unit::PowerOfTwo;
    Bounded { range, unit }
}

impl Bounded {
    /// The bounds in words: `1 to 50`.
    fn bounds(&self) -> String {
        let format = match self.unit {
            Unit::One => |number| u64::to_string(&number),
            Unit::Bytes(_) | Unit::PowerOfTwo => format_size,
        };
        let (min, max) = (*self.range.start(), format(*self.range.end()));
        let mut words = match min {
            0 => format!("at most {max}"),
            min => format!("{} to {max}", format(min)),
        };
        match self.unit {
            Unit::PowerOfTwo => words.insert_str(0, "a power of two from "),
            Unit::Bytes(multiple) if multiple > 1 => {
                words.push_str(&format!(", a multiple of {}", format_size(multiple)));
            }
            Unit::One | Unit::Bytes(_) => {}
        }
        words
    }

    fn read(&self, key: &str, text: &str) -> Result<u64, ConfigError> {
        let max = *self.range.end();
        let number = match self.unit {
            Unit::One => text.parse().ok().filter(|number| *number <= max),
            Unit::Bytes(_) | Unit::PowerOfTwo => Some(parse_size(text)?),
        };
        let remedy = match (number, self.unit) {
            (None, _) => format!("write a whole number of at most {max}"),
            (Some(number), Unit::PowerOfTwo) if !number.is_power_of_two() => {
                format!("choose {}", self.bounds())
            }
            (Some(number), _) if !self.range.contains(&number) => {
                format!("choose {}", self.bounds())
            }
            (Some(number), Unit::Bytes(multiple)) if !number.is_multiple_of(multiple) => format!(
                "not a multiple of {}; the nearest below is {}",
                format_size(multiple),
                format_size(number / multiple * multiple)
            ),
            (Some(number), _) => return Ok(number),
        };
        Err(ConfigError::BadValue {
            key: key.to_owned(),
            value: text.to_owned(),
            remedy,
        })
    }
}

impl TypedValueParser for Bounded {
    type Value = u64;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<u64, clap::Error> {
        let key = arg.and_then(Arg::get_long).unwrap_or_default().to_owned();
        let bounds = self.clone();
        // A function is a parser, too, and turns our error into clap's.
        let read = move |text: &str| bounds.read(&key, text);
        read.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let name = match self.unit {
            Unit::One => "N",
            Unit::Bytes(_) | Unit::PowerOfTwo => "SIZE",
        };
        let value = PossibleValue::new(name).help(self.bounds());
        Some(Box::new(std::iter::once(value)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("4K", 4096), ("3g", 3 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "K",
            "-1",
            "+1",
            "4X",
            "1.5G",
            "4GiB",
            " 4",
            "16777216T",
            "4é",
            "é",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_formatted_size_reads_back(bytes: u64) {
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
    }
}
