//! Writes ELF files (ELF-64 object file format, version 1.5).

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// An executable that loads each segment at its physical address and starts at `entry`.
pub fn file(entry: u64, segments: &[(u64, Vec<u8>)]) -> Vec<u8> {
    // 64 bits, little-endian, version 1; an executable for x86-64.
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for offset in [entry, HEADER as u64, 0] {
        file.extend(offset.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [HEADER, PROGRAM_HEADER, segments.len(), 0, 0, 0] {
        file.extend((half as u16).to_le_bytes());
    }
    let mut offset = (HEADER + segments.len() * PROGRAM_HEADER) as u64;
    for (address, bytes) in segments {
        let len = bytes.len() as u64;
        // Loadable; readable, writable, executable.
        file.extend(1u32.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [offset, *address, *address, len, len, 1] {
            file.extend(word.to_le_bytes());
        }
        offset += len;
    }
    file.extend(segments.iter().flat_map(|(_, bytes)| bytes));
    file
}

/// Identity-mapping page tables of the first `gib` GiB, for all privilege levels. `at` are the addresses of the three levels;
/// the last level has one page for each GiB.
pub fn page_tables(at: [u64; 3], gib: u64) -> Vec<(u64, Vec<u8>)> {
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let [pml4, pdpt, pd] = at;
    let words = |words: Vec<u64>| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let directories = (0..gib).map(|n| (pd + n * 0x1000) | PRESENT_WRITABLE_USER);
    let blocks = (0..gib * 512).map(|n| n << 21 | LARGE | PRESENT_WRITABLE_USER);
    vec![
        (pml4, words(vec![pdpt | PRESENT_WRITABLE_USER])),
        (pdpt, words(directories.collect())),
        (pd, words(blocks.collect())),
    ]
}
