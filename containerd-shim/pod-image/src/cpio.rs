//! Writes cpio archives in the "newc" format that the kernel unpacks as an initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

/// The fields of an entry that vary.
struct Entry<'a> {
    path: &'a str,
    mode: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl Archive {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder with mode 0755. Its parents must have been added before.
    pub fn dir(&mut self, path: &str) -> &mut Self {
        self.entry(&Entry {
            path,
            mode: 0o040_755,
            device: (0, 0),
            data: &[],
        })
    }

    /// Adds a file with these permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, data: &[u8]) -> &mut Self {
        let mode = 0o100_000 | permissions;
        self.entry(&Entry {
            path,
            mode,
            device: (0, 0),
            data,
        })
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(&Entry {
            path,
            mode: 0o120_777,
            device: (0, 0),
            data: target.as_bytes(),
        })
    }

    /// Adds a character device with mode 0600.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> &mut Self {
        self.entry(&Entry {
            path,
            mode: 0o020_600,
            device: (major, minor),
            data: &[],
        })
    }

    /// Ends the archive and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(&Entry {
            path: "TRAILER!!!",
            mode: 0,
            device: (0, 0),
            data: &[],
        });
        self.bytes
    }

    fn entry(&mut self, entry: &Entry<'_>) -> &mut Self {
        self.inodes += 1;
        let path = entry.path.trim_start_matches('/');
        let fields = [
            self.inodes,
            entry.mode,
            0, // uid
            0, // gid
            1, // links
            0, // time, so that equal content gives equal archives
            u32::try_from(entry.data.len()).expect("a file under 4 GiB"),
            0,
            0,
            entry.device.0,
            entry.device.1,
            path.len() as u32 + 1,
            0, // checksum, unused
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(entry.data);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Parsed {
        path: String,
        mode: u32,
        device: (u32, u32),
        data: Vec<u8>,
    }

    fn parse(mut bytes: &[u8]) -> Vec<Parsed> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (size, name) = (field(6) as usize, field(11) as usize);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name - 1], 0);
            if path == "TRAILER!!!" {
                return entries;
            }
            let start = (110 + name).next_multiple_of(4);
            let data = bytes[start..start + size].to_vec();
            entries.push(Parsed {
                path,
                mode: field(1),
                device: (field(9), field(10)),
                data,
            });
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn entries_read_back() {
        let mut archive = Archive::new();
        archive
            .dir("/dev")
            .char_device("/dev/console", 5, 1)
            .file("/init", 0o755, b"#!/bin/sh\n")
            .file("empty", 0o644, b"")
            .symlink("/bin", "usr/bin");
        let entries = parse(&archive.finish());
        let found: Vec<_> = entries.iter().map(|e| (e.path.as_str(), e.mode)).collect();
        assert_eq!(
            found,
            [
                ("dev", 0o040_755),
                ("dev/console", 0o020_600),
                ("init", 0o100_755),
                ("empty", 0o100_644),
                ("bin", 0o120_777),
            ]
        );
        assert_eq!(entries[1].device, (5, 1));
        assert_eq!(entries[2].data, b"#!/bin/sh\n");
        assert_eq!(entries[4].data, b"usr/bin");
    }

    #[test]
    fn every_length_of_name_and_data_is_padded() {
        let mut archive = Archive::new();
        for length in 1..9 {
            archive.file(&"n".repeat(length), 0o600, &vec![length as u8; 9 - length]);
        }
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        for (entry, length) in parse(&bytes).iter().zip(1..) {
            assert_eq!(entry.path.len(), length);
            assert_eq!(entry.data, vec![length as u8; 9 - length]);
        }
    }
}
