//! Compiles the filters of system calls, `resources/seccomp/*.json`, so that a monitor that starts has nothing to parse.
//!
//! A file is a list of rules in seccompiler's JSON format: what the threads of one role may call. What stands in
//! `common.json`, for the allocator and the end of a thread, is allowed to all roles but the reaper, which has neither.

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde_json::{Value, json};

const FOLDER: &str = "../resources/seccomp";
const COMMON: &str = "common";
const REAPER: &str = "reaper";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={FOLDER}");
    println!("cargo::rerun-if-changed=build.rs");
    let mut roles = BTreeMap::new();
    for entry in fs::read_dir(FOLDER)? {
        let path = entry?.path();
        if let Some(role) = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(".json"))
        {
            println!("cargo::rerun-if-changed={}", path.display());
            let rules: Vec<Value> = serde_json::from_str(&fs::read_to_string(&path)?)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            roles.insert(role.to_owned(), rules);
        }
    }
    let common = roles.remove(COMMON).ok_or("common.json is missing")?;
    let mut code = String::new();
    for (role, rules) in roles {
        let shared = if role == REAPER { &[] } else { &*common };
        let rules: Vec<Value> = shared.iter().chain(&rules).cloned().collect();
        check(&role, &rules)?;
        writeln!(
            code,
            "pub(super) static {}: Filter = Filter {{",
            role.to_uppercase()
        )?;
        for action in ["trap", "log"] {
            write(&mut code, action, &compile(&rules, action)?)?;
        }
        writeln!(code, "}};")?;
    }
    fs::write(Path::new(&env::var("OUT_DIR")?).join("seccomp.rs"), code)?;
    Ok(())
}

/// A call that is allowed with any arguments in one rule and with some in another one would be a mistake.
fn check(role: &str, rules: &[Value]) -> Result<(), String> {
    for (index, rule) in rules.iter().enumerate() {
        let same = |other: &&Value| other["syscall"] == rule["syscall"];
        let more = rules[index + 1..].iter().find(same);
        if let Some(other) = more
            && (other == rule || rule["args"].is_null() || other["args"].is_null())
        {
            return Err(format!("{role}: {} stands there twice", rule["syscall"]));
        }
    }
    Ok(())
}

/// The filter that allows what `rules` say and does `action` on any other call.
fn compile(rules: &[Value], action: &str) -> Result<BpfProgram, Box<dyn Error>> {
    let filter = json!({ "mismatch_action": action, "match_action": "allow", "filter": rules });
    let text = json!({ "it": filter }).to_string();
    let mut programs = compile_from_json(text.as_bytes(), TargetArch::x86_64)?;
    Ok(programs.remove("it").ok_or("no program")?)
}

fn write(code: &mut String, name: &str, program: &BpfProgram) -> std::fmt::Result {
    writeln!(code, "    {name}: &[")?;
    for it in program {
        let (code_, jt, jf, k) = (it.code, it.jt, it.jf, it.k);
        writeln!(
            code,
            "        sock_filter {{ code: {code_}, jt: {jt}, jf: {jf}, k: {k} }},"
        )?;
    }
    writeln!(code, "    ],")
}
