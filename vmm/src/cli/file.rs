//! Configuration files. The keys of a file are the names of options. So a file is turned into arguments, which are parsed
//! like any others.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command};
use ebb_vmm::config::{explain, quote};
use serde_json::{Map, Value};

use super::run;

/// The arguments in the file that `--config` in `words` names, without options that `words` already contain.
///
/// # Errors
/// A mistake in the file. Mistakes in `words` are not reported here: they are parsed again.
pub fn arguments(words: &[OsString]) -> Result<Vec<OsString>, String> {
    // Required options may be in the file.
    let command = Command::new("").no_binary_name(true);
    let mut command = run::Args::augment_args(command)
        .mut_args(|arg| arg.required(false))
        .mut_arg("config", |arg| arg.hide(true));
    let Ok(given) = command.try_get_matches_from_mut(words) else {
        return Ok(Vec::new());
    };
    let Some(path) = given.get_one::<PathBuf>("config") else {
        return Ok(Vec::new());
    };
    let complaint = |problem: String| format!("--config {}: {problem}", path.display());
    let words = read(path)
        .and_then(|options| options_to_words(options, &command, &given))
        .map_err(complaint)?;
    // They are parsed alone, so that an error is known to be in the file.
    match command.try_get_matches_from_mut(&words) {
        Ok(_) => Ok(words.into_iter().map(OsString::from).collect()),
        Err(error) if error.kind() == ErrorKind::UnknownArgument => {
            Err(complaint(explain(&error, &command).to_string()))
        }
        Err(error) => Err(complaint(super::one_line(&error))),
    }
}

fn read(path: &Path) -> Result<Map<String, Value>, String> {
    let text = fs::read_to_string(path)
        .map_err(|error| format!("{error}; name a file that you may read"))?;
    if path.extension().is_some_and(|ending| ending == "json") {
        return serde_json::from_str(&text).map_err(|error| error.to_string());
    }
    toml::from_str(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = text.get(..start).unwrap_or_default().lines().count().max(1);
        format!("{} at line {line}", error.message().replace('\n', "; "))
    })
}

fn options_to_words(
    options: Map<String, Value>,
    command: &Command,
    given: &ArgMatches,
) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    for (name, value) in options {
        let is_named = |arg: &&Arg| {
            let aliases = arg.get_all_aliases().unwrap_or_default();
            arg.get_long() == Some(&name) || aliases.contains(&name.as_str())
        };
        let arg = command.get_arguments().find(is_named);
        let source = arg.and_then(|arg| given.value_source(arg.get_id().as_str()));
        if source == Some(ValueSource::CommandLine) {
            continue;
        }
        let values = match value {
            Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let text = match value {
                Value::Object(keys) => {
                    let pair = |(key, value)| Ok(format!("{key}={}", quote(&text(&name, value)?)));
                    let pairs: Result<Vec<String>, String> = keys.into_iter().map(pair).collect();
                    pairs?.join(",")
                }
                value => text(&name, value)?,
            };
            words.push(format!("--{name}={text}"));
        }
    }
    Ok(words)
}

/// A value as it is written on the command line.
fn text(name: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(on) => Ok(if on { "on" } else { "off" }.to_owned()),
        Value::Null | Value::Array(_) | Value::Object(_) => Err(format!(
            "{name}: {value} is no value; write text, a number, true or false"
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use ebb_vmm::config::MachineSpec;
    use tempfile::TempDir;

    use super::*;

    /// The arguments for a file of this name and content, and for `words`.
    fn arguments_of(name: &str, content: &str, words: &[&str]) -> Result<Vec<String>, String> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let mut all = vec![OsString::from("--config"), path.clone().into()];
        all.extend(words.iter().map(OsString::from));
        let strings =
            |words: Vec<OsString>| words.into_iter().map(|word| word.into_string().unwrap());
        let arguments = arguments(&all).map(|words| strings(words).collect());
        arguments.map_err(|complaint| {
            assert!(!complaint.contains('\n'), "{complaint}");
            complaint.replace(path.to_str().unwrap(), "FILE")
        })
    }

    const TOML: &str = r#"
        kernel = "/k"
        guardian = false
        memory = "size=1G,thp=off"
        disk = [{ path = "/a,\\b", readonly = true }, { path = "/c" }]
        api-sock = "/s"
        [balloon]
        size = 4096
        deflate_on_oom = true
    "#;

    #[test]
    fn both_formats_stand_for_the_same_arguments() {
        let expected = [
            "--api-sock=/s",
            "--balloon=deflate_on_oom=on,size=4096",
            r"--disk=path=/a\,\\b,readonly=on",
            "--disk=path=/c",
            "--guardian=off",
            "--kernel=/k",
            "--memory=size=1G,thp=off",
        ];
        assert_eq!(arguments_of("vm.toml", TOML, &[]).unwrap(), expected);
        let json = serde_json::to_string(&toml::from_str::<Value>(TOML).unwrap()).unwrap();
        assert_eq!(arguments_of("vm.json", &json, &[]).unwrap(), expected);
    }

    #[test]
    fn the_example_in_the_document_is_right() {
        let document = include_str!("../../../docs/options.md");
        let example = document
            .split("```")
            .find_map(|part| part.strip_prefix("toml\n"));
        let arguments = arguments_of("vm.toml", example.unwrap(), &[]).unwrap();
        assert!(arguments.contains(&"--memory=prefault=on,size=4G".to_owned()));
        let machine = MachineSpec::try_parse_from(arguments).unwrap();
        assert_eq!(machine.disks.len(), 2);
    }

    #[test]
    fn the_command_line_wins() {
        let words = ["--api-socket=/t", "--disk=path=/x", "--memory=size=2G"];
        assert_eq!(
            arguments_of("vm.toml", TOML, &words).unwrap(),
            [
                "--balloon=deflate_on_oom=on,size=4096",
                "--guardian=off",
                "--kernel=/k"
            ]
        );
        // What is wrong on the command line is not told twice.
        assert_eq!(arguments_of("vm.toml", TOML, &["--colour"]), Ok(vec![]));
    }

    #[test]
    fn mistakes_name_the_file_the_key_and_the_remedy() {
        for (content, parts) in [
            (
                r#"kernl = "/k""#,
                ["unknown key 'kernl'", "did you mean 'kernel'?"],
            ),
            (
                "[memory]\nsiez = \"1G\"",
                ["unknown key 'siez'", "did you mean 'size'?"],
            ),
            (
                "memory = { size = \"1X\" }",
                ["--memory", "'1X' is not a size"],
            ),
            ("lazy = { share = 51 }", ["share=51", "at most 50"]),
            ("kernel-entry = 'side'", ["side", "write auto or image"]),
            ("kernel = ['/a', '/b']", ["--kernel", "multiple times"]),
            (
                "disk = [{ path = ['/d'] }]",
                ["disk: [\"/d\"] is no value", "write text"],
            ),
            ("\nkernel = ", ["at line 2", "string"]),
        ] {
            let complaint = arguments_of("vm.toml", content, &[]).unwrap_err();
            assert!(complaint.starts_with("--config FILE: "), "{complaint}");
            for part in parts {
                assert!(complaint.contains(part), "{complaint}: lacks {part}");
            }
        }
        let complaint = arguments_of("vm.json", "{", &[]).unwrap_err();
        assert!(complaint.contains("line 1 column 1"), "{complaint}");
        let missing = arguments(&["--config=/nowhere".into()]).unwrap_err();
        assert_eq!(
            missing,
            "--config /nowhere: No such file or directory (os error 2); name a file that you may read"
        );
    }
}
