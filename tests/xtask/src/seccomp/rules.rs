//! The lists of system calls.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use ebb_nested_machine::error::{Context, Error, Result};
use serde_json::Value;

use super::trace::Call;

/// What all roles but the reaper may call.
const COMMON: &str = "common";

/// The lists by role.
pub struct Lists(BTreeMap<String, Vec<Value>>);

impl Lists {
    /// Reads the lists in `folder`.
    pub fn read(folder: &Path) -> Result<Self> {
        let what = || format!("read {}", folder.display());
        let mut lists = BTreeMap::new();
        for entry in fs::read_dir(folder).context(what)? {
            let path = entry.context(what)?.path();
            let role = path.file_stem().unwrap_or_default().to_string_lossy();
            let text = fs::read_to_string(&path).context(what)?;
            let rules = serde_json::from_str(&text)
                .map_err(|error| Error::new(format!("{}: {error}", path.display())))?;
            lists.insert(role.into_owned(), rules);
        }
        Ok(Self(lists))
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// One line for each rule without a reason that no call needed, and for each call that no rule allows.
    pub fn compare(&self, calls: &BTreeSet<Call>) -> Vec<String> {
        let mut complaints = BTreeSet::new();
        for (role, rules) in &self.0 {
            let own = |call: &&Call| call.role == role || (role == COMMON && call.role != "reaper");
            for rule in rules.iter().filter(|rule| rule["comment"].is_null()) {
                if !calls.iter().filter(own).any(|call| allows(rule, call)) {
                    complaints.insert(format!("{role}: nobody needs {}", shown(rule)));
                }
            }
        }
        for call in calls {
            let lists = [call.role, if call.role == "reaper" { "" } else { COMMON }];
            let mut rules = lists.iter().filter_map(|role| self.0.get(*role)).flatten();
            if !rules.any(|rule| allows(rule, call)) {
                let Call {
                    role,
                    name,
                    arguments,
                } = call;
                // Addresses would make many lines of one.
                let small = arguments
                    .iter()
                    .map(|it| it.filter(|it| *it <= u32::MAX.into()));
                complaints.insert(format!(
                    "{role}: not allowed: {name}{:x?}",
                    small.collect::<Vec<_>>()
                ));
            }
        }
        complaints.into_iter().collect()
    }
}

fn allows(rule: &Value, call: &Call) -> bool {
    let conditions = rule["args"].as_array().map_or(&[][..], Vec::as_slice);
    rule["syscall"] == call.name.as_str()
        && conditions.iter().all(|condition| {
            let index = condition["index"]
                .as_u64()
                .and_then(|it| usize::try_from(it).ok());
            let argument = index.and_then(|index| *call.arguments.get(index)?);
            let mask = condition["op"]["masked_eq"]
                .as_u64()
                .unwrap_or(u32::MAX.into());
            argument.map(|it| it & mask) == condition["val"].as_u64()
        })
}

fn shown(rule: &Value) -> String {
    let name = rule["syscall"].as_str().unwrap_or_default();
    match rule["args"][0]["comment"].as_str() {
        Some(argument) => format!("{name} {argument}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(role: &'static str, name: &str, arguments: &[u64]) -> Call {
        Call {
            role,
            name: name.to_owned(),
            arguments: arguments.iter().map(|it| Some(*it)).collect(),
        }
    }

    #[test]
    fn what_nobody_needs_and_what_nobody_may_is_complained_of() {
        let rules = |text| serde_json::from_str::<Vec<Value>>(text).unwrap();
        let lists = Lists(BTreeMap::from([
            (
                COMMON.to_owned(),
                rules(r#"[{"syscall": "write"}, {"syscall": "brk", "comment": "rare"}]"#),
            ),
            (
                "vcpu".to_owned(),
                rules(
                    r#"[{"syscall": "mmap", "args": [{"index": 2, "op": {"masked_eq": 4}, "val": 0}]},
                        {"syscall": "ioctl", "args": [{"index": 1, "op": "eq", "val": 7, "comment": "RUN"}]}]"#,
                ),
            ),
            ("reaper".to_owned(), rules("[]")),
        ]));
        assert_eq!(lists.len(), 4);
        let calls = BTreeSet::from([
            call("vcpu", "mmap", &[0, 4096, 3]),
            call("vcpu", "mmap", &[0, 4096, 7]),
            call("vcpu", "ioctl", &[9, 8]),
            call("reaper", "write", &[2]),
        ]);
        assert_eq!(
            lists.compare(&calls),
            [
                "common: nobody needs write",
                "reaper: not allowed: write[Some(2)]",
                "vcpu: nobody needs ioctl RUN",
                "vcpu: not allowed: ioctl[Some(9), Some(8)]",
                "vcpu: not allowed: mmap[Some(0), Some(1000), Some(7)]",
            ]
        );
    }
}
