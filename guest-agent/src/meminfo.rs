//! Memory statistics of the guest's kernel.

use std::fmt::Write;
use std::fs;
use std::io;

/// The reported fields of /proc/meminfo.
const FIELDS: &[&str] = &["MemTotal", "MemFree", "MemAvailable", "Cached"];

/// One line of `name=value`: fields of /proc/meminfo in bytes, and the balloon's page counts of /proc/vmstat.
pub fn line() -> io::Result<String> {
    Ok(format(
        &fs::read_to_string("/proc/meminfo")?,
        &fs::read_to_string("/proc/vmstat")?,
    ))
}

fn format(meminfo: &str, vmstat: &str) -> String {
    let mut line = String::new();
    for name in FIELDS {
        let value = meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        let _ = write!(line, "{name}={} ", kib.unwrap_or(0) * 1024);
    }
    for entry in vmstat.lines().filter(|entry| entry.starts_with("balloon_")) {
        let _ = write!(line, "{} ", entry.replace(' ', "="));
    }
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_become_bytes_and_counts_on_one_line() {
        let meminfo = "MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:\t20 kB\nCachedX: 1 kB\n";
        let vmstat = "nr_free_pages 7\nballoon_inflate 3\nballoon_deflate 0\n";
        assert_eq!(
            format(meminfo, vmstat),
            "MemTotal=1024000 MemFree=10240 MemAvailable=20480 Cached=0 \
             balloon_inflate=3 balloon_deflate=0"
        );
    }
}
