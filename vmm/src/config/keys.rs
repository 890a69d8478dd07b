//! Options that are written `key=value,key=value`, as in cloud-hypervisor. Each key is a field of a structure that
//! derives [`clap::Args`]: the option is read as a small command line of its own, so that a key is declared once and
//! clap knows its help, its default and its values. A value with commas stands in double quotes; a backslash takes
//! the next character as it is.

use std::error::Error;
use std::ffi::OsStr;
use std::marker::PhantomData;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command};

use super::ConfigError;

/// An option whose fields are its keys.
pub trait Keys: clap::Args + Clone + Send + Sync + 'static {
    /// Checks values against each other, and sets values that depend on which keys were `given`.
    ///
    /// # Errors
    /// A contradiction.
    fn settle(self, given: &[String]) -> Result<Self, ConfigError> {
        let _ = given;
        Ok(self)
    }
}

/// Parses `key=value,key=value`.
///
/// # Errors
/// The first mistake found.
pub fn parse_keys<T: Keys>(text: &str) -> Result<T, ConfigError> {
    let command = command::<T>();
    let (mut given, mut words) = (Vec::new(), Vec::new());
    for part in split(text)? {
        let Some((key, value)) = part.split_once('=') else {
            return Err(ConfigError::NotAPair {
                text: part,
                known: names(&command),
            });
        };
        if value.is_empty() {
            return Err(ConfigError::EmptyValue { key: key.into() });
        }
        words.push(format!("--{key}={value}"));
        given.push(key.to_owned());
    }
    read::<T>(command, words)?.settle(&given)
}

/// The option with all its defaults; all keys must have one.
pub(super) fn defaults<T: Keys>() -> Result<T, ConfigError> {
    read(command::<T>(), Vec::new())
}

fn read<T: Keys>(mut command: Command, words: Vec<String>) -> Result<T, ConfigError> {
    let matches = command.try_get_matches_from_mut(words);
    matches
        .and_then(|matches| T::from_arg_matches(&matches))
        .map_err(|error| explain(&error, &command))
}

/// The small command line whose options are the keys.
fn command<T: Keys>() -> Command {
    let command = Command::new("").no_binary_name(true);
    T::augment_args(command.disable_help_flag(true))
}

fn names(command: &Command) -> String {
    let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
    let names: Vec<&str> = shown.filter_map(Arg::get_long).collect();
    names.join(", ")
}

/// Turns clap's error about options of `command` into one about keys.
#[must_use]
pub fn explain(error: &clap::Error, command: &Command) -> ConfigError {
    if let Some(error) = error.source().and_then(|source| source.downcast_ref()) {
        return ConfigError::clone(error);
    }
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(", "),
        _ => String::new(),
    };
    // "--size <SIZE>"
    let key = |kind| {
        let text = context(kind);
        let name = text.split([' ', '=']).next().unwrap_or_default();
        name.trim_start_matches('-').to_owned()
    };
    let name = key(ContextKind::InvalidArg);
    match (error.kind(), choices(error)) {
        (ErrorKind::UnknownArgument, _) => ConfigError::UnknownKey {
            hint: match key(ContextKind::SuggestedArg) {
                near if near.is_empty() => near,
                near => format!(" did you mean '{near}'?"),
            },
            key: name,
            known: names(command),
        },
        (ErrorKind::ArgumentConflict, _) => ConfigError::DuplicateKey { key: name },
        (ErrorKind::MissingRequiredArgument, _) => {
            let arg = command
                .get_arguments()
                .find(|arg| arg.get_long() == Some(&name));
            ConfigError::MissingKey {
                help: arg.map(help).unwrap_or_default(),
                key: name,
            }
        }
        (_, Some(choices)) => ConfigError::BadValue {
            key: name,
            value: context(ContextKind::InvalidValue),
            remedy: format!("write {choices}"),
        },
        _ => ConfigError::Other(error.to_string()),
    }
}

/// If `error` is about a value that is not one of a list: that list, as `a, b or c`.
#[must_use]
pub fn choices(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::Strings(valid)) = error.get(ContextKind::ValidValue) else {
        return None;
    };
    let (last, others) = valid.split_last()?;
    Some(format!("{} or {last}", others.join(", ")))
}

/// The parser of an option with the keys of `T`. It reports the keys as its possible values.
pub(super) fn keys<T: Keys>() -> impl TypedValueParser<Value = T> {
    KeysParser(PhantomData)
}

#[derive(Clone)]
struct KeysParser<T>(PhantomData<fn() -> T>);

impl<T: Keys> TypedValueParser for KeysParser<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        // A function is a parser, too, and turns our error into clap's.
        parse_keys::<T>.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let keys: Vec<PossibleValue> = command::<T>().get_arguments().map(describe).collect();
        Some(Box::new(keys.into_iter()))
    }
}

fn help(arg: &Arg) -> String {
    arg.get_help().map(ToString::to_string).unwrap_or_default()
}

/// A key with its values and its help.
fn describe(key: &Arg) -> PossibleValue {
    let values = key.get_possible_values();
    let mut names: Vec<&str> = values.iter().map(PossibleValue::get_name).collect();
    if names.is_empty() {
        let value_names = key.get_value_names().unwrap_or_default();
        names.extend(value_names.iter().map(|name| name.as_str()));
    }
    let mut text = help(key);
    let about = |value: &PossibleValue| match (value.get_help(), values.len()) {
        (Some(help), 1) => Some(help.to_string()),
        (help, _) => help.map(|help| format!("{}: {help}", value.get_name())),
    };
    let about: Vec<String> = values.iter().filter_map(about).collect();
    if !about.is_empty() {
        text.push_str(&format!(" ({})", about.join("; ")));
    }
    if let [default] = key.get_default_values() {
        text.push_str(&format!(" [default: {}]", default.display()));
    }
    let name = key.get_long().unwrap_or_default();
    PossibleValue::new(format!("{name}={}", names.join("|"))).help(text)
}

/// `on` or `off`.
pub(super) fn on_off() -> impl TypedValueParser<Value = bool> {
    let values = [("on", "true"), ("off", "false")];
    let values = values.map(|(name, alias)| PossibleValue::new(name).alias(alias));
    PossibleValuesParser::new(values).map(|text| text == "on" || text == "true")
}

/// The name of a disk or an interface, as a client of the API writes it in a path.
pub(super) fn device_id(id: &str) -> Result<String, ConfigError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if (1..=64).contains(&id.len()) && id.bytes().all(plain) {
        return Ok(id.to_owned());
    }
    Err(ConfigError::DeviceId(id.escape_debug().to_string()))
}

/// Writes a value so that it can stand in a list of pairs: commas, quotes and backslashes are escaped.
#[must_use]
pub fn quote(text: &str) -> String {
    text.replace('\\', r"\\")
        .replace(',', r"\,")
        .replace('"', r#"\""#)
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

/// Checks that each text is refused with a message that holds the given part.
#[cfg(test)]
pub(super) fn assert_refused<T: Keys + std::fmt::Debug>(cases: &[(&str, &str)]) {
    for (text, part) in cases {
        let message = parse_keys::<T>(text).unwrap_err().to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq, clap::Args)]
    struct Disk {
        /// Image, for instance path=disk.raw
        #[arg(long)]
        path: String,
        /// Is it?
        #[arg(long, value_parser = on_off())]
        readonly: Option<bool>,
    }

    impl Keys for Disk {}

    fn message(text: &str) -> String {
        parse_keys::<Disk>(text).unwrap_err().to_string()
    }

    #[test]
    fn pairs_quotes_and_escapes() {
        let disk = |path: &str, readonly| Disk {
            path: path.to_owned(),
            readonly,
        };
        let parsed = parse_keys(r#"path="/a,b=c",readonly=on"#);
        assert_eq!(parsed, Ok(disk("/a,b=c", Some(true))));
        assert_eq!(parse_keys(r"path=/a\,\\b"), Ok(disk(r"/a,\b", None)));
        assert_eq!(parse_keys("path=--help"), Ok(disk("--help", None)));
    }

    #[test]
    fn mistakes_name_the_value_and_the_remedy() {
        for (text, expected) in [
            (
                "readnoly=on",
                "unknown key 'readnoly'; did you mean 'readonly'? the keys are path, readonly",
            ),
            (
                "color=red",
                "unknown key 'color'; the keys are path, readonly",
            ),
            ("path=a,path=b", "path is given twice; keep one"),
            ("path=", "path has no value; write path=VALUE"),
            (
                "readonly=on",
                "path is missing: Image, for instance path=disk.raw",
            ),
            ("path=a,readonly=yes", "readonly=yes: write on or off"),
            (
                "/a",
                "'/a' is not a KEY=VALUE pair; the keys are path, readonly",
            ),
        ] {
            assert_eq!(message(text), expected);
        }
        assert!(message("path=\"a").contains("quote"));
        assert!(message("").contains("KEY=VALUE"));
        assert!(message("path=a,").contains("KEY=VALUE"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*", key in "[^,=]*") {
            let _ = parse_keys::<Disk>(&text);
            let _ = parse_keys::<Disk>(&format!("{key}={text}"));
        }
    }
}
