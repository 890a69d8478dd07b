//! What the device holds, by key (QEMU, `docs/specs/fw_cfg.rst`, "Configuration Items").

const SIGNATURE_KEY: u16 = 0x00;
const ID_KEY: u16 = 0x01;
const DIRECTORY_KEY: u16 = 0x19;
/// Key of the one file: the first that a file can have.
pub const NOTE_KEY: u16 = 0x20;

/// The traditional interface and DMA (`FW_CFG_VERSION`, `FW_CFG_VERSION_DMA`), little-endian.
const ID: [u8; 4] = [0b11, 0, 0, 0];
/// Bytes of the file.
pub const NOTE_LEN: usize = 16;
/// An ELF note: the one format that there is (QEMU, `docs/specs/vmcoreinfo.rst`).
const ELF: u16 = 1;
/// The number of files, and one entry.
static DIRECTORY: [u8; 4 + 64] = directory(b"etc/vmcoreinfo");

/// The directory of one file: the number of entries, then its entry of size, key, two reserved bytes, and name. The numbers
/// are big-endian.
const fn directory(name: &[u8]) -> [u8; 4 + 64] {
    let mut bytes = [0; 4 + 64];
    bytes[3] = 1;
    bytes[7] = NOTE_LEN as u8;
    bytes[9] = NOTE_KEY as u8;
    let mut at = 0;
    while at < name.len() {
        bytes[12 + at] = name[at];
        at += 1;
    }
    bytes
}

/// The file `etc/vmcoreinfo`: the format that the host takes, the format of the guest's note, its size in bytes, its address.
/// The numbers are little-endian.
pub struct NoteFile(pub [u8; NOTE_LEN]);

/// Where the guest says that its note is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotePlace {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u32,
}

impl NoteFile {
    /// The file before the guest writes it.
    pub const fn new() -> Self {
        let mut bytes = [0; NOTE_LEN];
        bytes[0] = ELF as u8;
        Self(bytes)
    }

    /// Where the note is; `None` if it is not an ELF note.
    pub const fn place(&self) -> Option<NotePlace> {
        let [_, _, f0, f1, s0, s1, s2, s3, start @ ..] = self.0;
        if u16::from_le_bytes([f0, f1]) != ELF {
            return None;
        }
        Some(NotePlace {
            start: u64::from_le_bytes(start),
            len: u32::from_le_bytes([s0, s1, s2, s3]),
        })
    }

    /// The item with this key; a key that does not exist names an empty one.
    pub fn item(&self, key: u16) -> &[u8] {
        match key {
            SIGNATURE_KEY => b"QEMU",
            ID_KEY => &ID,
            DIRECTORY_KEY => &DIRECTORY,
            NOTE_KEY => &self.0,
            _ => &[],
        }
    }
}
