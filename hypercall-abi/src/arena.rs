//! The arena: memory outside the guest's RAM that the guest frees and takes back by changing a word in a shared
//! table, without a call. Its head holds a [`Header`], the table of [`crate::granule::Word`]s, and room for the
//! guest's own bookkeeping, which the monitor never looks at:
//!
//! ```text
//! 0        4096              room                        first · granule                      size
//! ├ header ┼ table, 8·n bytes ┼ room, 8·n bytes + 64 KiB ┼ granule · granule · granule ·  …  ┤
//! ```

use core::fmt;
use core::mem::{offset_of, size_of};

use crate::PAGE_SIZE;

/// The first word of an arena: the text `EbbArena`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"EbbArena");

/// Version of the head: major in the upper 16 bits, minor in the lower. A guest must refuse a major version that it
/// does not know.
pub const VERSION: u32 = 1 << 16;

/// Default bytes of a granule.
pub const DEFAULT_GRANULE: u64 = 2 << 20;

/// Maximum bytes of a granule. Granules are powers of two, from 2 MiB, the size in which Linux maps the memory.
pub const MAX_GRANULE: u64 = 1 << 30;

/// Maximum length of an arena's name in bytes.
pub const MAX_ID: usize = 32;

/// Maximum number of granules that one descriptor of `REUSE` may meet.
pub const REUSE_MAX_GRANULES: u64 = 512;

/// Bytes of the guest's room, in addition to 8 for each granule.
pub const ROOM_BASE: u64 = 64 << 10;

/// The layout of an arena. It follows from the sizes of the arena and of its granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    granule: u64,
}

impl Layout {
    /// `None`: `granule` is not a power of two within bounds, `size` is not a multiple of it or is above 2^52, or the
    /// head leaves no granule.
    #[must_use]
    pub const fn new(size: u64, granule: u64) -> Option<Self> {
        let bounds = granule >= DEFAULT_GRANULE && granule <= MAX_GRANULE;
        if !bounds || !granule.is_power_of_two() || size > 1 << 52 {
            return None;
        }
        let layout = Self { size, granule };
        if size.is_multiple_of(granule) && layout.first() < layout.granules() {
            Some(layout)
        } else {
            None
        }
    }

    /// Bytes of the arena.
    #[must_use]
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Bytes of a granule.
    #[must_use]
    pub const fn granule(self) -> u64 {
        self.granule
    }

    /// Number of words in the table: one for each granule, including those of the head.
    #[must_use]
    pub const fn granules(self) -> u64 {
        self.size / self.granule
    }

    /// Offset of the table.
    #[must_use]
    pub const fn table(self) -> u64 {
        PAGE_SIZE
    }

    /// Offset of the guest's room.
    #[must_use]
    pub const fn room(self) -> u64 {
        (self.table() + 8 * self.granules()).next_multiple_of(PAGE_SIZE)
    }

    /// Bytes of the guest's room.
    #[must_use]
    pub const fn room_size(self) -> u64 {
        (8 * self.granules()).next_multiple_of(PAGE_SIZE) + ROOM_BASE
    }

    /// Index of the first granule after the head, and so the number of granules of the head, whose words have no
    /// meaning.
    #[must_use]
    pub const fn first(self) -> u64 {
        (self.room() + self.room_size()).div_ceil(self.granule)
    }
}

/// The beginning of an arena. The monitor writes it when the machine starts, and never reads it. Only the generation
/// changes later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// Number of the arena in its machine, from 0.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes of a granule.
    pub granule: u64,
    /// Words in the table.
    pub granules: u64,
    /// Index of the first granule after the head.
    pub first: u64,
    /// Offset of the table in the arena.
    pub table: u64,
    /// Offset of the guest's room.
    pub room: u64,
    /// Bytes of the guest's room.
    pub room_size: u64,
    /// Guest-physical address of the arena.
    pub gpa: u64,
    /// The generation in which granules are freed now, see [`GENERATION`].
    pub generation: u64,
    /// The name, padded with zeroes.
    pub id: [u8; MAX_ID],
    /// 0.
    pub reserved: u64,
}

/// Offset of [`Header::generation`]. The monitor may store it at any time, as one aligned word; the guest loads it
/// for each free.
pub const GENERATION: u64 = offset_of!(Header, generation) as u64;

const _: () = assert!(size_of::<Header>() == 128 && GENERATION == 80);
const _: () = assert!(offset_of!(Header, size) == 16 && offset_of!(Header, id) == 88);

/// Why a guest cannot use an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// This is not an arena, or its header was overwritten.
    Magic(u64),
    /// The major version is unknown.
    Version(u32),
    /// The numbers contradict each other or the size of the memory.
    Sizes {
        /// Bytes of the arena.
        size: u64,
        /// Bytes of a granule.
        granule: u64,
        /// Bytes of the memory.
        there: u64,
    },
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(found) => write!(f, "no arena: it begins with {found:#018x}"),
            Self::Version(found) => write!(
                f,
                "the arena has version {}.{}, but {}.x is needed",
                found >> 16,
                found & 0xffff,
                VERSION >> 16
            ),
            Self::Sizes {
                size,
                granule,
                there,
            } => write!(
                f,
                "the arena says {size} bytes in granules of {granule}, which does not fit to its table or to \
                 the {there} bytes that are there"
            ),
        }
    }
}

impl core::error::Error for HeaderError {}

impl Header {
    /// The header of arena number `index` at `gpa`, with the first [`MAX_ID`] bytes of `id` as its name.
    #[must_use]
    pub fn new(layout: Layout, index: u32, gpa: u64, id: &str) -> Self {
        let mut name = [0; MAX_ID];
        for (to, from) in name.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            magic: MAGIC,
            version: VERSION,
            index,
            size: layout.size(),
            granule: layout.granule(),
            granules: layout.granules(),
            first: layout.first(),
            table: layout.table(),
            room: layout.room(),
            room_size: layout.room_size(),
            gpa,
            generation: 0,
            id: name,
            reserved: 0,
        }
    }

    /// The header as words in memory.
    #[must_use]
    pub fn to_words(&self) -> [u64; 16] {
        let mut words = [0; 16];
        words[0] = self.magic;
        words[1] = u64::from(self.index) << 32 | u64::from(self.version);
        let numbers = [
            self.size,
            self.granule,
            self.granules,
            self.first,
            self.table,
            self.room,
            self.room_size,
            self.gpa,
            self.generation,
        ];
        words[2..11].copy_from_slice(&numbers);
        let (name, _) = self.id.as_chunks::<8>();
        for (to, from) in words[11..15].iter_mut().zip(name) {
            *to = u64::from_le_bytes(*from);
        }
        words
    }

    /// From memory.
    #[must_use]
    pub fn from_words(words: [u64; 16]) -> Self {
        let mut id = [0; MAX_ID];
        for (to, from) in id.chunks_exact_mut(8).zip(&words[11..15]) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        Self {
            magic: words[0],
            version: words[1] as u32,
            index: (words[1] >> 32) as u32,
            size: words[2],
            granule: words[3],
            granules: words[4],
            first: words[5],
            table: words[6],
            room: words[7],
            room_size: words[8],
            gpa: words[9],
            generation: words[10],
            id,
            reserved: words[15],
        }
    }

    /// Checks a header that a guest has found in memory of `there` bytes.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn check(&self, there: u64) -> Result<Layout, HeaderError> {
        if self.magic != MAGIC {
            return Err(HeaderError::Magic(self.magic));
        }
        if self.version >> 16 != VERSION >> 16 {
            return Err(HeaderError::Version(self.version));
        }
        let layout = Layout::new(self.size, self.granule);
        let consistent = |layout: &Layout| {
            let expected = Self::new(*layout, self.index, self.gpa, "");
            let numbers = |header: &Self| {
                [
                    header.granules,
                    header.first,
                    header.table,
                    header.room,
                    header.room_size,
                ]
            };
            numbers(&expected) == numbers(self) && self.size <= there
        };
        layout.filter(consistent).ok_or(HeaderError::Sizes {
            size: self.size,
            granule: self.granule,
            there,
        })
    }

    /// The name; `?` if it is not UTF-8.
    #[must_use]
    pub fn name(&self) -> &str {
        let end = self.id.iter().position(|byte| *byte == 0);
        core::str::from_utf8(&self.id[..end.unwrap_or(MAX_ID)]).unwrap_or("?")
    }
}

/// An `ARENA_INFO` block: the beginning of one page. The guest writes the first number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ArenaInfo {
    /// Number of the arena to describe.
    pub index: u64,
    /// Number of arenas of the machine.
    pub count: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes of a granule.
    pub granule: u64,
    /// Index of the first granule after the head.
    pub first: u64,
    /// Offset of the table in the arena.
    pub table: u64,
    /// 0.
    pub reserved: u64,
}

const _: () = assert!(size_of::<ArenaInfo>() == 64 && offset_of!(ArenaInfo, table) == 48);

impl ArenaInfo {
    /// The fields in their order.
    #[must_use]
    pub const fn to_words(self) -> [u64; 8] {
        [
            self.index,
            self.count,
            self.gpa,
            self.size,
            self.granule,
            self.first,
            self.table,
            self.reserved,
        ]
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::string::ToString;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn layout() -> Layout {
        Layout::new(1 << 40, 2 * MIB).unwrap()
    }

    #[test]
    fn the_head_leaves_room_for_table_and_guest() {
        let layout = layout();
        assert_eq!((layout.granules(), layout.table()), (524_288, 4096));
        assert_eq!(layout.room(), 4096 + 4 * MIB);
        assert_eq!(layout.first(), 5, "8 MiB, 64 KiB and the header");
        let small = Layout::new(4 * MIB, 2 * MIB).unwrap();
        assert_eq!((small.granules(), small.first()), (2, 1));
    }

    #[test]
    fn numbers_are_those_of_the_specification() {
        assert_eq!((VERSION, ROOM_BASE), (0x1_0000, 65_536));
        assert_eq!(MAGIC.to_le_bytes(), *b"EbbArena");
        let info = ArenaInfo {
            index: 1,
            count: 2,
            gpa: 3,
            size: 4,
            granule: 5,
            first: 6,
            table: 7,
            reserved: 0,
        };
        assert_eq!(info.to_words(), [1, 2, 3, 4, 5, 6, 7, 0]);
    }

    #[test]
    fn an_error_names_what_was_found() {
        let sizes = HeaderError::Sizes {
            size: 11,
            granule: 12,
            there: 13,
        };
        for (error, words) in [
            (HeaderError::Magic(0xabc), &["0abc"][..]),
            (HeaderError::Version(2 << 16 | 5), &["2.5", "1.x"]),
            (sizes, &["11", "12", "13"]),
        ] {
            let text = error.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    }

    #[test]
    fn senseless_sizes_have_no_layout() {
        for (size, granule) in [
            (0, 2 * MIB),
            (2 * MIB, 2 * MIB),
            (3 * MIB, 2 * MIB),
            (8 * MIB, 0),
            (8 * MIB, MIB),
            (9 * MIB, 3 * MIB),
            (1 << 40, 2 << 30),
            (!(2 * MIB - 1), 2 * MIB),
        ] {
            assert_eq!(Layout::new(size, granule), None, "{size:#x} {granule:#x}");
        }
    }

    #[test]
    fn a_header_reads_back_and_is_accepted() {
        let header = Header::new(layout(), 3, 5 << 30, "heap-0");
        let found = Header::from_words(header.to_words());
        assert_eq!((found, found.name()), (header, "heap-0"));
        assert_eq!(found.check(1 << 40), Ok(layout()));
        assert_eq!(
            Header::new(layout(), 0, 0, &"x".repeat(99)).name().len(),
            MAX_ID
        );
    }

    #[test]
    fn broken_headers_are_told_apart() {
        let good = Header::new(layout(), 0, 5 << 30, "");
        let magic = Header { magic: 7, ..good };
        assert_eq!(magic.check(u64::MAX), Err(HeaderError::Magic(7)));
        let version = Header {
            version: 2 << 16,
            ..good
        };
        assert_eq!(version.check(u64::MAX), Err(HeaderError::Version(2 << 16)));
        let minor = Header {
            version: VERSION + 4,
            ..good
        };
        assert_eq!(minor.check(u64::MAX), Ok(layout()));
        let sizes = [
            Header { size: MIB, ..good },
            Header {
                granule: MIB,
                ..good
            },
            Header {
                granules: 9,
                ..good
            },
            Header { first: 0, ..good },
            Header { table: 0, ..good },
            Header {
                room: u64::MAX,
                ..good
            },
            Header {
                room_size: 0,
                ..good
            },
        ];
        for header in sizes {
            let error = header.check(u64::MAX).unwrap_err();
            assert!(matches!(error, HeaderError::Sizes { .. }), "{header:?}");
        }
        assert!(good.check((1 << 40) - 1).is_err(), "more than there is");
    }
}
