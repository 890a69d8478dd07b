//! What an Ebb guest and the Ebb monitor agree on. `SPECIFICATION.md` in this folder says the same for guests in
//! other languages; a difference between the two is an error.
//!
//! A guest finds the interface by CPUID ([`discovery`]), makes calls ([`call`]) by one of two transports, and reads a
//! [`status`]. What does not fit into registers is in blocks of guest memory ([`block`]). An [`arena`] needs no
//! calls: its head has a table of words, one for each [`granule`], which both sides change ([`shared_word`]).
#![no_std]

pub mod arena;
pub mod block;
pub mod call;
pub mod discovery;
pub mod granule;
pub mod shared_word;
pub mod status;
#[cfg(all(feature = "stubs", target_arch = "x86_64"))]
pub mod stubs;

pub use call::{Attributes, Flags, Operation};
pub use discovery::{Features, Interface};
pub use status::{Error, Success};

/// Size in bytes of a page, the unit of ranges.
pub const PAGE_SIZE: u64 = 4096;

#[cfg(test)]
mod tests {
    extern crate std;

    use std::format;
    use std::string::String;

    use crate::{Attributes, Error, Features, Operation, block, discovery, status};

    const TEXT: &str = include_str!("../SPECIFICATION.md");

    /// `LazyFreeBatch` as `LAZY_FREE_BATCH`.
    fn upper(name: &str) -> String {
        let mut text = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !text.is_empty() {
                text.push('_');
            }
            text.push(letter.to_ascii_uppercase());
        }
        text
    }

    #[track_caller]
    fn says(text: &str) {
        assert!(TEXT.contains(text), "the specification does not say {text}");
    }

    #[test]
    fn the_specification_has_the_numbers_of_the_code() {
        for operation in Operation::ALL {
            let name = upper(&format!("{operation:?}"));
            let word = Attributes::new(operation).encode();
            says(&format!("| `{name}` | {} | `{word:#x}` |", operation as u8));
        }
        for (error, name) in [
            (Error::Permission, "EPERM"),
            (Error::Fault, "EFAULT"),
            (Error::Invalid, "EINVAL"),
            (Error::NoSpace, "ENOSPC"),
            (Error::NoSuchCall, "ENOSYS"),
        ] {
            says(&format!("| −{} | `{name}` |", -error.code()));
        }
        says(&format!("| {} | `LAST_RANGE` |", status::LAST_RANGE));
        for (feature, name) in [
            (Features::VMCALL, "VMCALL"),
            (Features::VMMCALL, "VMMCALL"),
            (Features::PORT, "PORT"),
            (Features::LAZY, "LAZY"),
            (Features::BATCH, "BATCH"),
            (Features::PREFAULT, "PREFAULT"),
            (Features::QUERY, "QUERY"),
            (Features::ARENA, "ARENA"),
            (Features::KERNEL_NOTE, "KERNEL_NOTE"),
        ] {
            says(&format!(
                "| {} | `{name}` |",
                feature.bits().trailing_zeros()
            ));
        }
        let [ebx, ecx, edx] = discovery::signature_registers();
        says(&format!("`{ebx:#010x}`, `{ecx:#010x}`, `{edx:#010x}`"));
        says(&format!("here `{:#010x}`", discovery::VERSION));
        says(&format!("or {} for 1 to 4 pages", block::BATCH_MAX));
    }
}
