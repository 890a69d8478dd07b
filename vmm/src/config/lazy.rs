//! `--lazy`: when lazily freed memory is taken.

use clap::ArgAction::Set;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::ConfigError;
use super::keys::{Keys, on_off};
use super::number::number;

/// `--lazy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Args, Serialize)]
pub struct LazyConfig {
    /// When it is taken; age= without mode= means mode=age
    #[arg(long, value_enum, default_value = "pressure")]
    pub mode: LazyMode,
    /// With mode=age: seconds after which it is taken
    #[arg(long = "age", value_parser = number::<u32>(1..=1 << 20), default_value = "60")]
    pub age_s: u32,
    /// Microseconds for which the vCPUs are kept out of the guest at a time; to come out they have as long before that
    #[arg(long = "pause", value_parser = number::<u32>(1..=1_000_000), default_value = "100")]
    pub pause_us: u32,
    /// Number of ranges that are taken in one such pause
    #[arg(long, value_parser = number::<u32>(1..=1 << 16), default_value = "512")]
    pub slice: u32,
    /// Percentage of their time that vCPUs may lose; a pause counts twice, because caches are cold after it
    #[arg(long, value_parser = number::<u32>(1..=50), default_value = "1")]
    pub share: u32,
    /// Also take memory that is free by the guest kernel's own free lists, where they can be read
    #[arg(long = "free_pages", alias = "free-pages", action = Set, value_parser = auto_off(), default_value = "auto")]
    pub free_pages: bool,
    /// For those who write guest allocators: discard at once, and report accesses to freed memory; allows no other key
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub strict: bool,
}

/// When lazily freed memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LazyMode {
    /// when the host is short of memory
    Pressure,
    /// as soon as possible
    Eager,
    /// when it has been free for some time
    Age,
    /// on request only
    Off,
}

impl Keys for LazyConfig {
    /// An age alone means the mode `age`; strict mode needs no tuning.
    fn settle(mut self, given: &[String]) -> Result<Self, ConfigError> {
        let is_given = |key: &str| given.iter().any(|other| other == key);
        if self.strict {
            if let Some(key) = given.iter().find(|key| *key != "strict") {
                return Err(ConfigError::StrictTuned { key: key.clone() });
            }
            (self.mode, self.free_pages) = (LazyMode::Off, false);
        } else if is_given("age") && !is_given("mode") {
            self.mode = LazyMode::Age;
        }
        Ok(self)
    }
}

fn auto_off() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new([
        PossibleValue::new("auto").help("as soon as the guest's kernel has told how they are read"),
        PossibleValue::new("off").help("never"),
    ])
    .map(|name| name == "auto")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::{assert_refused, parse_keys};

    #[test]
    fn an_age_means_a_mode_and_strict_mode_stands_alone() {
        let default = LazyConfig {
            mode: LazyMode::Pressure,
            age_s: 60,
            pause_us: 100,
            slice: 512,
            share: 1,
            free_pages: true,
            strict: false,
        };
        for (text, expected) in [
            ("mode=pressure", default),
            ("strict=off,mode=pressure", default),
            (
                "age=9,pause=250,slice=64",
                LazyConfig {
                    mode: LazyMode::Age,
                    age_s: 9,
                    pause_us: 250,
                    slice: 64,
                    ..default
                },
            ),
            (
                "age=1,pause=1,slice=1,share=1,mode=eager",
                LazyConfig {
                    mode: LazyMode::Eager,
                    age_s: 1,
                    pause_us: 1,
                    slice: 1,
                    ..default
                },
            ),
            ("free_pages=auto", default),
            (
                "free-pages=off",
                LazyConfig {
                    free_pages: false,
                    ..default
                },
            ),
            (
                "strict=on",
                LazyConfig {
                    mode: LazyMode::Off,
                    free_pages: false,
                    strict: true,
                    ..default
                },
            ),
        ] {
            assert_eq!(parse_keys(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn wrong_choices_say_what_is_right() {
        assert_refused::<LazyConfig>(&[
            (
                "mode=later",
                "mode=later: write pressure, eager, age or off",
            ),
            ("age=0", "age=0: choose 1 to 1048576"),
            ("pause=0", "pause=0: choose 1 to 1000000"),
            ("slice=0", "slice=0: choose 1 to 65536"),
            ("share=0,mode=eager", "share=0: choose 1 to 50"),
            ("share=99", "at most 50"),
            ("free_pages=on", "free_pages=on: write auto or off"),
            (
                "strict=on,mode=eager",
                "--lazy strict=on,mode: strict mode discards at once and needs no tuning; remove mode",
            ),
            (
                "slice=3,strict=on",
                "--lazy strict=on,slice: strict mode discards at once and needs no tuning; remove slice",
            ),
        ]);
    }
}
