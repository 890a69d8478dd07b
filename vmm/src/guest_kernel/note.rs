//! The vmcoreinfo note: an ELF note whose text has one `KEY=VALUE` on each line.
//!
//! The kernel writes it in `kernel/vmcore_info.c` (before 6.9 `kernel/crash_core.c`) and, for x86, in
//! `arch/x86/kernel/vmcore_info_64.c` (`machine_kexec_64.c`). Symbols and `KERNELOFFSET` are hexadecimal without a prefix,
//! all other numbers are decimal, some of them negative, or hexadecimal with `0x`.

use ebb_core::range::GpaRange;

use super::{BadNote, ReadGuest};

/// `n_namesz`, `n_descsz`, `n_type`, and the name "VMCOREINFO\0" padded to 4 bytes.
const HEADER: u64 = 24;
/// The kernel's own limit is one page (`VMCOREINFO_BYTES`).
const LONGEST_TEXT: u64 = 64 << 10;
/// A message shows this much of a value.
const SHOWN: usize = 40;

/// Length of the text of the note at `gpa` in bytes, if there is a note.
pub(super) fn text_len(memory: &dyn ReadGuest, gpa: u64) -> Option<u64> {
    let word = |index: u64| memory.load(gpa.checked_add(8 * index)?);
    let sizes = word(0)?;
    let (name_len, text_len) = (sizes & 0xffff_ffff, sizes >> 32);
    if name_len != 11 || !(1..=LONGEST_TEXT).contains(&text_len) {
        return None;
    }
    let name = [(word(1)? >> 32) << 32, word(2)?];
    let vmcoreinfo = [
        u64::from(u32::from_le_bytes(*b"VMCO")) << 32,
        u64::from_le_bytes(*b"REINFO\0\0"),
    ];
    (name == vmcoreinfo).then_some(text_len)
}

/// Copies `len` bytes at `gpa`. `None` if not all of them are in RAM.
pub(super) fn copy(memory: &dyn ReadGuest, gpa: u64, len: usize) -> Option<Vec<u8>> {
    let skip = (gpa % 8) as usize;
    let words = (skip + len).div_ceil(8) as u64;
    let mut bytes = Vec::with_capacity(words as usize * 8);
    for index in 0..words {
        let at = (gpa - skip as u64).checked_add(8 * index)?;
        bytes.extend(memory.load(at)?.to_le_bytes());
    }
    bytes.drain(..skip);
    bytes.truncate(len);
    Some(bytes)
}

/// The text of a note.
pub(super) struct Note {
    text: String,
}

impl Note {
    /// Copies the note that begins `range`. What follows it there does not matter.
    pub(super) fn read(memory: &dyn ReadGuest, range: GpaRange) -> Result<Self, BadNote> {
        let start = range.start();
        let len = text_len(memory, start)
            .ok_or_else(|| BadNote(format!("no vmcoreinfo note begins at {start:#x}")))?;
        if len > range.len() - HEADER {
            let all = range.len();
            return Err(BadNote(format!(
                "a text of {len} bytes does not fit a note of {all}"
            )));
        }
        let bytes = copy(memory, start + HEADER, len as usize)
            .ok_or_else(|| BadNote(format!("the note at {start:#x} is not all in RAM")))?;
        Self::from_text(bytes)
    }

    pub(super) fn from_text(bytes: Vec<u8>) -> Result<Self, BadNote> {
        let text = String::from_utf8(bytes).ok().filter(|text| text.is_ascii());
        let text = text.ok_or_else(|| BadNote("the note's text is not ASCII".into()))?;
        Ok(Self { text })
    }

    /// The first value of `key`; the kernel writes each key once.
    pub(super) fn value(&self, key: &str) -> Result<&str, BadNote> {
        let mut lines = self.text.split('\n');
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.ok_or_else(|| BadNote(format!("{key} is missing")))
    }

    /// The address of symbol `name`.
    pub(super) fn symbol(&self, name: &str) -> Result<u64, BadNote> {
        let key = format!("SYMBOL({name})");
        let value = self.value(&key)?;
        u64::from_str_radix(value, 16).map_err(|_| bad(&key, value, "is not a hexadecimal address"))
    }

    /// The number `key`, which names its kind: `NUMBER(…)`, `SIZE(…)`, `OFFSET(…)`, `LENGTH(…)`, `PAGESIZE`.
    pub(super) fn number(&self, key: &str) -> Result<i64, BadNote> {
        let value = self.value(key)?;
        let number = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).map(u64::cast_signed),
            None => value.parse(),
        };
        number.map_err(|_| bad(key, value, "is not a number"))
    }

    /// The number `key` if `allowed` holds for it; `rule` says what is allowed.
    pub(super) fn checked(
        &self,
        key: &str,
        rule: &str,
        allowed: impl FnOnce(u64) -> bool,
    ) -> Result<u64, BadNote> {
        let number = u64::try_from(self.number(key)?).ok();
        let number = number.filter(|&number| allowed(number));
        match number {
            Some(number) => Ok(number),
            None => Err(bad(key, self.value(key)?, rule)),
        }
    }
}

/// `key` has `value`, which is wrong: `what`.
pub(super) fn bad(key: &str, value: &str, what: &str) -> BadNote {
    let shown: String = value.chars().take(SHOWN).collect();
    BadNote(format!("{key}={} {what}", shown.escape_debug()))
}
