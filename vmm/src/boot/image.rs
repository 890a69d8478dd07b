//! Kernel images: recognizes the format of a file, and unpacks the ELF inside a bzImage.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// A kernel image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("{0}; give a readable bzImage or ELF vmlinux with --kernel")]
    Read(#[from] io::Error),
    /// The file is neither an ELF file nor a bzImage.
    #[error(
        "it is neither a bzImage nor an ELF file (it starts with {0:02x?}); \
         give a Linux kernel with --kernel"
    )]
    Format([u8; 4]),
    /// The file ends too early.
    #[error("it is truncated: {has} bytes, but its headers speak of {needs}; copy it again")]
    Truncated {
        /// Bytes in the file.
        has: u64,
        /// Bytes that the headers need.
        needs: u64,
    },
    /// The kernel inside cannot be unpacked.
    #[error("the {format} data inside the bzImage is damaged ({source}); copy the file again")]
    Damaged {
        /// Compression.
        format: &'static str,
        /// The error of the library.
        source: io::Error,
    },
    /// The kernel inside is too large.
    #[error(
        "it unpacks to more than the guest's {limit} MiB of memory; \
         give the guest more memory (--memory size=)"
    )]
    TooLarge {
        /// Limit in MiB.
        limit: u64,
    },
}

/// A kernel image, opened.
#[derive(Debug)]
pub enum Image {
    /// An ELF file.
    Elf(File),
    /// A bzImage, which may have an ELF inside that can be entered.
    Packed(Packed),
    /// A bzImage that is entered as it is.
    BzImage(File),
}

/// A bzImage, and where the packed kernel inside it is: offset and length.
#[derive(Debug)]
pub struct Packed {
    file: File,
    payload: (u64, u64),
}

/// The parts of a bzImage's setup header that we need (Linux, `Documentation/arch/x86/boot.rst`).
struct Setup {
    /// Offset of the protected-mode part in the file.
    protected: u64,
    /// Offset and length of the compressed kernel in the file; 0 in old protocols.
    payload: (u64, u64),
    /// Bytes that the file must have.
    needs: u64,
}

impl Image {
    /// Opens the kernel at `path`. With `through_elf`, what is packed in a bzImage is read, too.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(path: &Path, through_elf: bool) -> Result<Self, ImageError> {
        let mut file = File::open(path)?;
        if file.metadata()?.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory).into());
        }
        let mut magic = [0; 4];
        let size = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        if file.read_exact(&mut magic).is_err() {
            return Err(ImageError::Truncated {
                has: size,
                needs: 0x260,
            });
        }
        if magic == *b"\x7fELF" {
            check_elf(&mut file, size)?;
            return Ok(Self::Elf(file));
        }
        let setup = Setup::read(&mut file, size)?.ok_or(ImageError::Format(magic))?;
        if size < setup.needs {
            return Err(ImageError::Truncated {
                has: size,
                needs: setup.needs,
            });
        }
        if through_elf && setup.has_payload() {
            let payload = setup.payload;
            return Ok(Self::Packed(Packed { file, payload }));
        }
        Ok(Self::BzImage(file))
    }
}

impl Packed {
    /// The kernel as it is packed, to be read once. Who only needs a digest of it needs no memory for all of it, which would
    /// take longer to get than to read.
    ///
    /// # Errors
    /// The file's.
    pub fn reader(&mut self) -> io::Result<impl Read> {
        let (offset, len) = self.payload;
        self.file.seek(SeekFrom::Start(offset))?;
        Ok((&mut self.file).take(len))
    }

    /// The kernel as it is packed.
    ///
    /// # Errors
    /// The file's.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.payload.1 as usize];
        self.reader()?.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The bzImage.
    pub fn into_file(self) -> File {
        self.file
    }
}

/// Unpacks a kernel, to at most `limit` bytes; `None` if its compression is not supported, or it is no ELF.
///
/// # Errors
/// [`ImageError`].
pub fn unpack(packed: &[u8], limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
    let Some((format, unpacked)) = decompress(packed, limit) else {
        return Ok(None);
    };
    let elf = unpacked.map_err(|source| ImageError::Damaged { format, source })?;
    if elf.len() as u64 > limit {
        return Err(ImageError::TooLarge { limit: limit >> 20 });
    }
    Ok(elf.starts_with(b"\x7fELF").then_some(elf))
}

/// The guest-physical address and the content of each segment that is to be loaded (ELF-64 object file format, `PT_LOAD`).
/// What is not whole is left out.
pub fn segments(elf: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    const LOAD: u32 = 1;
    let range = |start: u64, len: u64| {
        let end = start.checked_add(len)?;
        elf.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    };
    let table = elf.get(..64).and_then(|header| {
        let (entry, count) = (u64::from(u16_at(header, 54)), u64::from(u16_at(header, 56)));
        let table = range(u64_at(header, 32), entry * count)?;
        (entry >= 56).then(|| table.chunks_exact(entry as usize))
    });
    table.into_iter().flatten().filter_map(move |header| {
        let content = range(u64_at(header, 8), u64_at(header, 32))?;
        (u32_at(header, 0) == LOAD).then_some((u64_at(header, 24), content))
    })
}

/// Checks that the file contains all segments that its program headers describe (ELF-64 object file format).
fn check_elf(file: &mut File, size: u64) -> Result<(), ImageError> {
    let truncated = |needs| ImageError::Truncated { has: size, needs };
    let mut header = [0u8; 64];
    file.rewind()?;
    file.read_exact(&mut header).map_err(|_| truncated(64))?;
    let table = u64_at(&header, 32);
    let (entry, count) = (u16_at(&header, 54), u16_at(&header, 56));
    let table_len = u64::from(entry) * u64::from(count);
    let table_end = table.saturating_add(table_len);
    if table_end > size {
        return Err(truncated(table_end));
    }
    let mut bytes = vec![0; table_len as usize];
    file.seek(SeekFrom::Start(table))?;
    file.read_exact(&mut bytes)?;
    for program_header in bytes.chunks_exact(usize::from(entry.max(1))) {
        if program_header.len() >= 40 {
            let end = u64_at(program_header, 8).saturating_add(u64_at(program_header, 32));
            if end > size {
                return Err(truncated(end));
            }
        }
    }
    file.rewind()?;
    Ok(())
}

impl Setup {
    /// Reads the setup header; `None` if the file is no bzImage.
    fn read(file: &mut File, size: u64) -> Result<Option<Self>, ImageError> {
        const HEADER_END: usize = 0x260;
        const MAGIC: usize = 0x202;
        const PAYLOAD_PROTOCOL: u16 = 0x208;
        let mut header = [0u8; HEADER_END];
        file.rewind()?;
        if file.read_exact(&mut header).is_err() || header[MAGIC..MAGIC + 4] != *b"HdrS" {
            return Ok(None);
        }
        let sectors = match header[0x1f1] {
            0 => 4,
            n => u64::from(n),
        };
        let protected = (sectors + 1) * 512;
        // The protected-mode part is measured in paragraphs of 16 bytes.
        let protected_len = u64::from(u32_at(&header, 0x1f4)) * 16;
        let version = u16_at(&header, 0x206);
        let payload = if version >= PAYLOAD_PROTOCOL {
            let offset = u64::from(u32_at(&header, 0x248));
            (protected + offset, u64::from(u32_at(&header, 0x24c)))
        } else {
            (size, 0)
        };
        let needs = (protected + protected_len).max(payload.0 + payload.1);
        Ok(Some(Self {
            protected,
            payload,
            needs,
        }))
    }

    /// Returns true if the header says where the packed kernel is.
    const fn has_payload(&self) -> bool {
        let (offset, len) = self.payload;
        len >= 8 && offset >= self.protected
    }
}

/// Unpacks what a kernel build packs (Linux, `scripts/Makefile.lib`): gzip, xz, lz4 and zstd. Reads
/// at most one byte more than `limit`. `None` if the format is not supported.
fn decompress(packed: &[u8], limit: u64) -> Option<(&'static str, io::Result<Vec<u8>>)> {
    let read = |reader: &mut dyn Read| {
        let mut out = Vec::new();
        reader
            .take(limit.saturating_add(1))
            .read_to_end(&mut out)
            .map(|_| out)
    };
    Some(match packed.get(..4)? {
        [0x1f, 0x8b, ..] => ("gzip", read(&mut flate2::read::GzDecoder::new(packed))),
        [0xfd, b'7', b'z', b'X'] => ("xz", read(&mut liblzma::read::XzDecoder::new(packed))),
        [0x02, 0x21, 0x4c, 0x18] => ("lz4", lz4_legacy(&packed[4..], limit)),
        [0x28, 0xb5, 0x2f, 0xfd] => match zstd_at_once(packed, limit) {
            Some(out) => ("zstd", Ok(out)),
            None => (
                "zstd",
                zstd::stream::read::Decoder::with_buffer(packed)
                    // The kernel appends its size to the frame: stop after the frame.
                    .and_then(|decoder| read(&mut decoder.single_frame())),
            ),
        },
        _ => return None,
    })
}

/// Unpacks a zstd frame in one step. The size must be known: it may be in the frame, and a kernel build appends it.
/// `None` if that size is wrong or above `limit`, or on any other error: the stream decoder then reports the error.
///
/// Kernels are packed with a window larger than they are. In one step the output buffer is the window. The stream decoder
/// has a window of its own, which costs page faults and a copy of the whole kernel.
fn zstd_at_once(packed: &[u8], limit: u64) -> Option<Vec<u8>> {
    use zstd::zstd_safe::{decompress, find_frame_compressed_size, get_frame_content_size};
    let frame = packed.get(..find_frame_compressed_size(packed).ok()?)?;
    let appended = || Some(u64::from(u32_at(packed.last_chunk::<4>()?, 0)));
    let size = get_frame_content_size(frame).ok()?.or_else(appended)?;
    if size > limit {
        return None;
    }
    let mut out = Vec::new();
    out.try_reserve_exact(usize::try_from(size).ok()?).ok()?;
    let written = decompress(&mut out, frame).ok()?;
    (written as u64 == size).then_some(out)
}

/// The legacy frame of lz4 (lz4, `doc/lz4_Frame_format.md`): blocks that unpack to at most 8 MiB, each
/// behind its packed size. The size that the kernel build appends ends the last one.
fn lz4_legacy(mut packed: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut out = Vec::new();
    while packed.len() > 4 && out.len() as u64 <= limit {
        let len = u32_at(packed, 0) as usize;
        let block = packed.get(4..4 + len).ok_or(io::ErrorKind::UnexpectedEof)?;
        let start = out.len();
        out.resize(start + BLOCK, 0);
        let n = lz4_flex::block::decompress_into(block, &mut out[start..])
            .map_err(|error| io::Error::other(error.to_string()))?;
        out.truncate(start + n);
        packed = &packed[4 + len..];
    }
    Ok(out)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LIMIT: u64 = 1 << 20;

    /// An ELF header without program headers, and 100 KiB that compress.
    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.resize(64, 0);
        elf.extend((0..100 * 1024u32).map(|i| (i / 7) as u8));
        elf
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        file[0x1f1] = 1;
        file[0x1f4..0x1f8]
            .copy_from_slice(&((payload.len() as u32 + 64).div_ceil(16)).to_le_bytes());
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        file[0x248..0x24c].copy_from_slice(&64u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.resize(1024 + 64, 0);
        file.extend(payload);
        file.resize(file.len().next_multiple_of(16), 0);
        file
    }

    fn open(bytes: &[u8]) -> Result<Image, ImageError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Image::open(file.path(), true)
    }

    /// What is inside a bzImage, unpacked; `None` if it is entered as it is.
    fn unpack(bytes: &[u8]) -> Result<Option<Vec<u8>>, ImageError> {
        match open(bytes)? {
            Image::Packed(mut packed) => super::unpack(&packed.read()?, LIMIT),
            other => panic!("{other:?}"),
        }
    }

    fn packed(format: &str) -> Vec<u8> {
        let elf = elf();
        let mut out = match format {
            "gzip" => {
                let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                w.write_all(&elf).unwrap();
                w.finish().unwrap()
            }
            "xz" => {
                let mut w = liblzma::write::XzEncoder::new(Vec::new(), 1);
                w.write_all(&elf).unwrap();
                w.finish().unwrap()
            }
            "lz4" => {
                let block = lz4_flex::block::compress(&elf);
                let mut out = vec![0x02, 0x21, 0x4c, 0x18];
                out.extend((block.len() as u32).to_le_bytes());
                out.extend(block);
                out
            }
            _ => {
                // The kernel's build packs a stream, whose size zstd does not know beforehand.
                let mut w = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
                w.include_contentsize(false).unwrap();
                w.write_all(&elf).unwrap();
                w.finish().unwrap()
            }
        };
        if format != "gzip" {
            // "with_size", as the kernel's build does for formats that lack it.
            out.extend((elf.len() as u32).to_le_bytes());
        }
        out
    }

    #[test]
    fn every_known_compression_yields_the_elf_inside() {
        for format in ["gzip", "xz", "lz4", "zstd"] {
            let unpacked = unpack(&bzimage(&packed(format))).unwrap();
            assert!(unpacked == Some(elf()), "{format}");
        }
    }

    #[test]
    fn zstd_takes_one_step_when_the_size_is_known_and_right() {
        let frame = packed("zstd");
        assert!(zstd_at_once(&frame, LIMIT) == Some(elf()));
        assert!(zstd_at_once(&frame, elf().len() as u64 - 1).is_none());
        for wrong in [0u32, 1, u32::MAX] {
            let mut frame = frame.clone();
            let at = frame.len() - 4;
            frame[at..].copy_from_slice(&wrong.to_le_bytes());
            assert!(zstd_at_once(&frame, LIMIT).is_none(), "{wrong}");
            // The stream decoder does not need the size.
            assert!(unpack(&bzimage(&frame)).unwrap() == Some(elf()));
        }
    }

    #[test]
    fn an_unknown_compression_is_left_to_the_image_itself() {
        assert_eq!(unpack(&bzimage(&[0x89; 4096])).unwrap(), None);
    }

    #[test]
    fn damage_is_told_from_truncation() {
        let mut damaged = packed("zstd");
        damaged[6..].fill(0xff);
        let error = unpack(&bzimage(&damaged)).unwrap_err();
        assert!(
            matches!(error, ImageError::Damaged { format: "zstd", .. }),
            "{error}"
        );
        let mut cut = bzimage(&packed("zstd"));
        cut.truncate(1500);
        assert!(matches!(
            open(&cut),
            Err(ImageError::Truncated { has: 1500, .. })
        ));
        let mut elf = elf();
        elf[32] = 64;
        (elf[54], elf[56]) = (56, 200);
        elf.truncate(1000);
        assert!(matches!(open(&elf), Err(ImageError::Truncated { .. })));
    }

    #[test]
    fn a_bomb_stops_at_the_guests_memory() {
        let zeros = [&b"\x7fELF"[..], &vec![0; 8 << 20]].concat();
        let bomb = zstd::encode_all(&zeros[..], 1).unwrap();
        assert!(matches!(
            unpack(&bzimage(&bomb)),
            Err(ImageError::TooLarge { limit: 1 })
        ));
    }

    #[test]
    fn other_files_are_named_as_what_they_are_not() {
        let script = b"#!/bin/sh\n".repeat(100);
        assert!(matches!(open(&script), Err(ImageError::Format(m)) if m == *b"#!/b"));
        assert!(matches!(
            open(b""),
            Err(ImageError::Truncated { has: 0, .. })
        ));
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            Image::open(folder.path(), true),
            Err(ImageError::Read(_))
        ));
    }
}
