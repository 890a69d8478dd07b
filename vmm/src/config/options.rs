//! The option grammar of cloud-hypervisor: `key=value,key=value`. A value with commas stands in double
//! quotes; a backslash takes the next character as it is.

use super::ConfigError;

/// The options of one argument, each key at most once and known.
#[derive(Debug)]
pub(super) struct Options {
    pairs: Vec<(&'static str, String)>,
}

impl Options {
    /// Splits `text` into pairs whose keys are all in `known`.
    pub fn parse(text: &str, known: &'static [&'static str]) -> Result<Self, ConfigError> {
        let mut pairs: Vec<(&'static str, String)> = Vec::new();
        for part in split(text)? {
            let Some((key, value)) = part.split_once('=') else {
                return Err(ConfigError::NotAPair {
                    text: part,
                    known: known.join(", "),
                });
            };
            let Some(&key) = known.iter().find(|name| **name == key) else {
                return Err(ConfigError::UnknownKey {
                    hint: hint(key, known),
                    key: key.to_owned(),
                    known: known.join(", "),
                });
            };
            if value.is_empty() {
                return Err(ConfigError::EmptyValue { key });
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(ConfigError::DuplicateKey { key });
            }
            pairs.push((key, value.to_owned()));
        }
        Ok(Self { pairs })
    }

    /// The value of `key`, as written.
    pub fn text(&self, key: &'static str) -> Option<&str> {
        let pair = self.pairs.iter().find(|(name, _)| *name == key)?;
        Some(&pair.1)
    }

    /// The value of a key that has to be there.
    pub fn required(&self, key: &'static str, example: &'static str) -> Result<&str, ConfigError> {
        self.text(key)
            .ok_or(ConfigError::MissingKey { key, example })
    }

    /// `on` or `off`.
    pub fn toggle(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.text(key) {
            None => Ok(None),
            Some("on" | "true") => Ok(Some(true)),
            Some("off" | "false") => Ok(Some(false)),
            Some(value) => Err(ConfigError::NotAToggle {
                key,
                value: value.to_owned(),
            }),
        }
    }

    /// A number of bytes, see [`parse_size`].
    pub fn size(&self, key: &'static str) -> Result<Option<u64>, ConfigError> {
        self.text(key).map(parse_size).transpose()
    }

    /// A whole number of at most `max`.
    pub fn number(&self, key: &'static str, max: u32) -> Result<Option<u32>, ConfigError> {
        let Some(value) = self.text(key) else {
            return Ok(None);
        };
        match value.parse::<u32>() {
            Ok(number) if number <= max => Ok(Some(number)),
            _ => Err(ConfigError::NotANumber {
                key,
                value: value.to_owned(),
                max,
            }),
        }
    }
}

/// Parses a number of bytes: digits and at most one of the suffixes K, M, G, T (powers of 1024).
///
/// # Errors
/// [`ConfigError::NotASize`] for anything else, or a size beyond 64 bits.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let bad = || ConfigError::NotASize {
        value: text.to_owned(),
    };
    let suffix = text.chars().next_back().ok_or_else(bad)?;
    let shift = match suffix.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 {
        text
    } else {
        &text[..text.len() - 1]
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// `bytes` with the largest suffix that loses nothing, as [`parse_size`] reads it.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Splits at the commas outside quotes, and takes quotes and backslashes away.
fn split(text: &str) -> Result<Vec<String>, ConfigError> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        let part = parts.len() - 1;
        match char {
            '"' => quoted = !quoted,
            '\\' => parts[part].extend(chars.next()),
            ',' if !quoted => parts.push(String::new()),
            _ => parts[part].push(char),
        }
    }
    if quoted {
        return Err(ConfigError::OpenQuote {
            text: text.to_owned(),
        });
    }
    Ok(parts)
}

/// A suggestion for a mistyped key, or nothing.
fn hint(key: &str, known: &[&str]) -> String {
    known
        .iter()
        .map(|name| (distance(key, name), name))
        .min()
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .map_or_else(String::new, |(_, name)| format!(" did you mean '{name}'?"))
}

/// Levenshtein's distance between two short words.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, char) in left.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], index + 1);
        for column in 0..right.len() {
            let replaced = diagonal + usize::from(char != right[column]);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KNOWN: &[&str] = &["path", "readonly"];

    fn message(text: &str) -> String {
        Options::parse(text, KNOWN).unwrap_err().to_string()
    }

    #[test]
    fn pairs_quotes_and_escapes() {
        let options = Options::parse(r#"path="/a,b=c",readonly=on"#, KNOWN).unwrap();
        assert_eq!(options.text("path"), Some("/a,b=c"));
        assert_eq!(options.toggle("readonly"), Ok(Some(true)));
        let options = Options::parse(r"path=/a\,\\b", KNOWN).unwrap();
        assert_eq!(options.text("path"), Some(r"/a,\b"));
        assert_eq!(options.toggle("readonly"), Ok(None));
    }

    #[test]
    fn mistakes_name_the_value_and_the_remedy() {
        assert_eq!(
            message("readnoly=on"),
            "unknown key 'readnoly'; did you mean 'readonly'? the keys are path, readonly"
        );
        assert_eq!(
            message("color=red"),
            "unknown key 'color'; the keys are path, readonly"
        );
        assert_eq!(message("path=a,path=b"), "path is given twice; keep one");
        assert_eq!(message("path="), "path has no value; write path=VALUE");
        assert_eq!(
            message("/a"),
            "'/a' is not a KEY=VALUE pair; the keys are path, readonly"
        );
        assert!(message("path=\"a").contains("quote"));
        assert!(message("").contains("KEY=VALUE"));
        assert!(message("path=a,").contains("KEY=VALUE"));
        let options = Options::parse("readonly=yes", KNOWN).unwrap();
        let error = options.toggle("readonly").unwrap_err();
        assert_eq!(error.to_string(), "readonly=yes: write on or off");
    }

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

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = Options::parse(&text, KNOWN);
            let _ = parse_size(&text);
        }
    }
}
