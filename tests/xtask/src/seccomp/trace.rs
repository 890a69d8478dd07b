//! What strace has written down.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use ebb_nested_machine::error::{Context, Result};

/// A system call of a thread that has a filter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    /// The thread's role.
    pub role: &'static str,
    /// The call's name.
    pub name: String,
    /// Its arguments, as far as they are numbers.
    pub arguments: Vec<Option<u64>>,
}

/// Beginnings of threads' names, and their roles.
const ROLES: [(&str, &str); 18] = [
    ("ebb-vcpu", "vcpu"),
    ("ebb-blk", "block"),
    ("ebb-net", "net"),
    ("ebb-rng", "rng"),
    ("ebb-vsock", "vsock"),
    ("ebb-balloon", "balloon"),
    ("ebb-report", "balloon"),
    ("ebb-api", "api"),
    ("ebb-reclaim", "reclaim"),
    ("ebb-snapshot", "snapshot"),
    ("ebb-strict", "strict"),
    ("ebb-pages", "pages"),
    ("ebb-console", "output"),
    ("ebb-log", "output"),
    ("ebb-metrics", "output"),
    ("ebb-events", "output"),
    ("ebb-reaper", "reaper"),
    ("ebb-guardian", "guardian"),
];

/// `SECCOMP_SET_MODE_FILTER` of seccomp(2).
const SET_FILTER: Option<u64> = Some(1);

/// All calls in the files of `folder`.
pub fn read(folder: &Path) -> Result<BTreeSet<Call>> {
    let what = || format!("read {}", folder.display());
    let mut calls = BTreeSet::new();
    for entry in fs::read_dir(folder).context(what)? {
        let text = fs::read(entry.context(what)?.path()).context(what)?;
        calls.extend(calls_in(&String::from_utf8_lossy(&text)));
    }
    Ok(calls)
}

/// The calls of one monitor and its helpers. A thread's filter counts from the call that sets it; a thread that one with a filter
/// has started has the same one.
fn calls_in(text: &str) -> Vec<Call> {
    let lines: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(thread, rest)| (thread, rest.trim_start()))
        .collect();
    let parents = parents(&lines);
    let mut names: HashMap<&str, &str> = HashMap::new();
    let mut roles: HashMap<&str, &'static str> = HashMap::new();
    let mut calls = Vec::new();
    for (thread, rest) in lines {
        let Some((name, rest)) = rest.split_once('(').filter(|(name, _)| is_name(name)) else {
            continue;
        };
        if name == "prctl"
            && let Some(comm) = rest.split('"').nth(1)
        {
            names.insert(thread, comm);
        }
        let arguments: Vec<Option<u64>> = arguments(rest);
        if let Some(role) = role_of(thread, &mut roles, &parents) {
            calls.push(Call {
                role,
                name: name.to_owned(),
                arguments,
            });
        } else if name == "seccomp" && arguments.first() == Some(&SET_FILTER) {
            roles.insert(thread, role(names.get(thread).copied()));
        } else {
            // It has none, even if its parent gets one later.
            roles.entry(thread).or_insert("");
        }
    }
    calls
}

/// The role of `thread`, if it has a filter by now.
fn role_of<'a>(
    thread: &'a str,
    roles: &mut HashMap<&'a str, &'static str>,
    parents: &HashMap<&'a str, &'a str>,
) -> Option<&'static str> {
    if !roles.contains_key(thread) {
        let inherited = roles.get(parents.get(thread)?).copied()?;
        roles.insert(thread, inherited);
    }
    roles.get(thread).copied().filter(|role| !role.is_empty())
}

/// Who has started whom. strace writes down the start when it is over; the thread may have made calls by then.
fn parents<'a>(lines: &[(&'a str, &'a str)]) -> HashMap<&'a str, &'a str> {
    let mut started = Vec::new();
    for (thread, rest) in lines {
        let call = rest.trim_start_matches("<... ");
        if call.starts_with("clone")
            && let Some((_, result)) = rest.rsplit_once("= ")
            && let Some(number) = number(result)
        {
            started.push((number.to_string(), *thread));
        }
    }
    let own = |child: &str| {
        lines
            .iter()
            .map(|(thread, _)| *thread)
            .find(|it| *it == child)
    };
    let known = started
        .iter()
        .filter_map(|(child, parent)| Some((own(child)?, *parent)));
    known.collect()
}

fn role(name: Option<&str>) -> &'static str {
    let found = ROLES
        .iter()
        .find(|(start, _)| name.is_some_and(|name| name.starts_with(start)));
    found.map_or("main", |(_, role)| role)
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// The arguments at the beginning of `text`, which follows on the call's name and the opening parenthesis.
fn arguments(text: &str) -> Vec<Option<u64>> {
    let end = text.find([')', '<']).unwrap_or(text.len());
    text[..end]
        .split(',')
        .map(|word| number(word.trim()))
        .collect()
}

fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_counts_from_the_call_that_sets_it_and_for_what_is_started_then() {
        let text = "\
            10 openat(0xffffff9c, 0x7ff, 0x80000) = 0x3\n\
            10 clone3(0x7f, 0x58 <unfinished ...>\n\
            11 rseq(0x7, 0x20, 0, 0x5) = 0\n\
            10 <... clone3 resumed>) = 0xb\n\
            11 prctl(0xf, \"ebb-api\") = 0\n\
            11 seccomp(0x1, 0, 0x7ff) = 0\n\
            10 read(0x4, 0x7ff, 0x80) = 0x8\n\
            11 clone3(0x7f, 0x58 <unfinished ...>\n\
            12 gettid() = 0xc\n\
            11 <... clone3 resumed>) = 0xc\n\
            10 seccomp(0x1, 0, 0x7ff) = 0\n\
            12 madvise(0x7f0, 0x1000, 0x4) = 0\n\
            10 epoll_wait(0x5, 0x7ff, 0x1, 0xffffffff <unfinished ...>\n";
        let calls = calls_in(text);
        let seen: Vec<_> = calls.iter().map(|it| (it.role, it.name.as_str())).collect();
        assert_eq!(
            seen,
            [
                ("api", "clone3"),
                ("api", "gettid"),
                ("api", "madvise"),
                ("main", "epoll_wait")
            ]
        );
        assert_eq!(calls[2].arguments[2], Some(4));
    }
}
