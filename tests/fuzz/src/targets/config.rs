//! Command lines and their values.

use clap::Parser;
use ebb_vmm::config::{MachineSpec, format_size, parse_size};

pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let words: Vec<&str> = text.split('\n').take(64).collect();
    if let Ok(size) = parse_size(&text) {
        assert_eq!(parse_size(&format_size(size)), Ok(size));
    }
    if let Ok(spec) = MachineSpec::try_parse_from(&words) {
        let _ = spec.validate();
    }
}
