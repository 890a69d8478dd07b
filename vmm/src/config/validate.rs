//! The checks between a spec and a machine: values against each other, and files against the host.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use ebb_hypercall_abi::arena::{DEFAULT_GRANULE, Layout, MAX_GRANULE, MAX_ID};

use super::spec::{ArenaSpec, MachineSpec, MemorySpec};
use super::{
    ArenaConfig, BalloonConfig, ConfigError, DiskConfig, KernelConfig, MachineConfig, MemoryConfig,
    SerialConfig,
};

/// Longest kernel command line in bytes: `COMMAND_LINE_SIZE` of x86 less the final zero.
pub(super) const MAX_CMDLINE: usize = 2047;
/// Most vCPUs; what KVM allows on the host may be less.
pub(super) const MAX_VCPUS: u32 = 255;
/// Most memory in bytes, the physical address width of common hosts; this host's may be less.
pub(super) const MAX_MEMORY: u64 = 1 << 46;
/// Most arenas: a memory map has room for 128 entries, KVM for some more slots.
pub(super) const MAX_ARENAS: usize = 16;
/// Longest path of a unix socket in bytes: `sun_path` less the final zero.
const MAX_SOCKET_PATH: usize = 107;
/// A disk is at least one sector long.
const SECTOR: u64 = 512;

impl MachineSpec {
    /// Checks the spec, files included, and fills in what follows from other values.
    ///
    /// # Errors
    /// The first mistake found.
    pub fn validate(self) -> Result<MachineConfig, ConfigError> {
        check_id(&self.id)?;
        check_cmdline(&self.cmdline)?;
        if !(1..=MAX_VCPUS).contains(&self.cpus.boot) {
            return Err(ConfigError::Vcpus {
                given: self.cpus.boot,
            });
        }
        let memory = check_memory(self.memory, self.lazy.strict)?;
        let arenas = check_arenas(self.arenas)?;
        let cmdline = cmdline(self.cmdline, !arenas.is_empty())?;
        if let Some(balloon) = &self.balloon {
            check_balloon(balloon, memory.size)?;
        }
        check_image("--kernel", &self.kernel)?;
        if let Some(path) = &self.initramfs {
            check_image("--initramfs", path)?;
        }
        check_disks(&self.disks)?;
        if let SerialConfig::File(path) = &self.serial {
            check_output("--serial", path)?;
        }
        if let Some(path) = &self.api_socket {
            check_socket(path)?;
        }
        Ok(MachineConfig {
            id: self.id,
            kernel: KernelConfig {
                path: self.kernel,
                entry: self.kernel_entry,
            },
            initramfs: self.initramfs,
            cmdline,
            vcpus: self.cpus.boot,
            memory,
            arenas,
            disks: self.disks,
            serial: self.serial,
            balloon: self.balloon,
            lazy: self.lazy,
            api_socket: self.api_socket,
            guardian: self.guardian,
        })
    }
}

fn check_id(id: &str) -> Result<(), ConfigError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if (1..=64).contains(&id.len()) && id.bytes().all(plain) {
        return Ok(());
    }
    Err(ConfigError::Id(id.escape_debug().to_string()))
}

fn check_cmdline(cmdline: &str) -> Result<(), ConfigError> {
    if cmdline.len() > MAX_CMDLINE {
        return Err(ConfigError::CmdlineTooLong(cmdline.len()));
    }
    let control = cmdline.chars().find(|char| char.is_control());
    control.map_or(Ok(()), |char| Err(ConfigError::CmdlineControl(char)))
}

fn check_memory(spec: MemorySpec, strict: bool) -> Result<MemoryConfig, ConfigError> {
    if spec.size == 0 {
        return Err(ConfigError::NoMemory);
    }
    if spec.size > MAX_MEMORY {
        return Err(ConfigError::MemoryTooLarge(spec.size));
    }
    if !spec.size.is_multiple_of(2 << 20) {
        return Err(ConfigError::MemoryGranule(spec.size));
    }
    if spec.hugepages && spec.thp == Some(true) {
        return Err(ConfigError::ThpWithHugepages);
    }
    let huge = [
        ("hugepages", spec.hugepages),
        ("thp", spec.thp == Some(true)),
    ];
    if let Some((key, _)) = huge.into_iter().find(|&(_, on)| strict && on) {
        return Err(ConfigError::StrictHugePages { key });
    }
    Ok(MemoryConfig {
        size: spec.size,
        thp: spec.thp.unwrap_or(!spec.hugepages && !strict),
        hugepages: spec.hugepages,
        prefault: spec.prefault,
        shared: spec.shared,
    })
}

/// The command line that the guest gets: Linux finds no arena without PCI.
fn cmdline(given: String, arenas: bool) -> Result<String, ConfigError> {
    const NO_PCI: &str = "pci=off";
    if !arenas || !given.split(' ').any(|word| word == NO_PCI) {
        return Ok(given);
    }
    if given != MachineSpec::DEFAULT_CMDLINE {
        return Err(ConfigError::ArenaWithoutPci);
    }
    let words: Vec<&str> = given.split(' ').filter(|word| *word != NO_PCI).collect();
    Ok(words.join(" "))
}

fn check_arenas(specs: Vec<ArenaSpec>) -> Result<Vec<ArenaConfig>, ConfigError> {
    if specs.len() > MAX_ARENAS {
        let given = specs.len();
        return Err(ConfigError::TooManyArenas { given });
    }
    let (mut arenas, mut total): (Vec<ArenaConfig>, u64) = (Vec::new(), 0);
    for (number, ArenaSpec { size, granule, id }) in specs.into_iter().enumerate() {
        total = total.saturating_add(size);
        if total > MAX_MEMORY {
            return Err(ConfigError::ArenaTooLarge(size));
        }
        if !(DEFAULT_GRANULE..=MAX_GRANULE).contains(&granule) || !granule.is_power_of_two() {
            return Err(ConfigError::ArenaGranule(granule));
        }
        if !size.is_multiple_of(granule) {
            return Err(ConfigError::ArenaSize { size, granule });
        }
        if Layout::new(size, granule).is_none() {
            return Err(ConfigError::ArenaTooSmall { size, granule });
        }
        let id = id.unwrap_or_else(|| format!("arena{number}"));
        if id.len() > MAX_ID || check_id(&id).is_err() {
            return Err(ConfigError::ArenaId(id.escape_debug().to_string()));
        }
        if arenas.iter().any(|other| other.id == id) {
            return Err(ConfigError::ArenaIdTwice(id));
        }
        arenas.push(ArenaConfig { size, granule, id });
    }
    Ok(arenas)
}

fn check_balloon(balloon: &BalloonConfig, memory: u64) -> Result<(), ConfigError> {
    if balloon.size > memory {
        return Err(ConfigError::BalloonTooLarge {
            balloon: balloon.size,
            memory,
        });
    }
    if !balloon.size.is_multiple_of(4096) {
        return Err(ConfigError::BalloonGranule(balloon.size));
    }
    Ok(())
}

/// A kernel or an initial RAM disk: a readable file with something in it.
fn check_image(option: &'static str, path: &Path) -> Result<(), ConfigError> {
    let metadata = stat(option, path)?;
    if !metadata.is_file() {
        return Err(file_error(
            option,
            path,
            kind(&metadata),
            "name a regular file",
        ));
    }
    if metadata.len() == 0 {
        return Err(file_error(
            option,
            path,
            "the file is empty",
            "name another one",
        ));
    }
    open(option, path, OpenOptions::new().read(true)).map(drop)
}

fn check_disks(disks: &[DiskConfig]) -> Result<(), ConfigError> {
    let mut seen: Vec<(Identity, &DiskConfig)> = Vec::new();
    for disk in disks {
        let identity = check_disk(disk)?;
        let same = seen.iter().find(|(other, _)| *other == identity);
        if let Some((_, other)) = same
            && !(disk.readonly && other.readonly)
        {
            return Err(ConfigError::DiskShared {
                path: other.path.clone(),
                other: disk.path.clone(),
            });
        }
        seen.push((identity, disk));
    }
    Ok(())
}

/// What tells one file or block device from another, whatever its path.
#[derive(Debug, PartialEq, Eq)]
enum Identity {
    File { device: u64, inode: u64 },
    BlockDevice(u64),
}

fn check_disk(disk: &DiskConfig) -> Result<Identity, ConfigError> {
    let (option, path) = ("--disk", disk.path.as_path());
    let metadata = stat(option, path)?;
    let identity = if metadata.is_file() {
        Identity::File {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    } else if metadata.file_type().is_block_device() {
        Identity::BlockDevice(metadata.rdev())
    } else {
        let remedy = "name a raw disk image or a block device";
        return Err(file_error(option, path, kind(&metadata), remedy));
    };
    let mut options = OpenOptions::new();
    let mut file = open(option, path, options.read(true).write(!disk.readonly))?;
    let length = file
        .seek(SeekFrom::End(0))
        .map_err(|error| io_error(option, path, &error))?;
    if length < SECTOR {
        let problem = format!("a disk of {length} bytes holds no sector");
        return Err(file_error(
            option,
            path,
            problem,
            "name a disk of 512 bytes or more",
        ));
    }
    Ok(identity)
}

/// A file to be created or overwritten: its folder is there, and it is not a folder itself.
fn check_output(option: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.is_dir() {
        return Err(file_error(option, path, "is a directory", "name a file"));
    }
    check_folder(option, path)
}

fn check_folder(option: &'static str, path: &Path) -> Result<(), ConfigError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if folder.is_dir() {
        return Ok(());
    }
    let problem = format!("there is no folder {}", folder.display());
    Err(file_error(option, path, problem, "create it first"))
}

/// What lies at the path of a socket that is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketPath {
    /// Nothing.
    Free,
    /// A socket whose server is gone; it may be removed.
    Stale,
}

/// Checks that a socket can be served at `path`; changes nothing.
///
/// # Errors
/// [`ConfigError::File`] when the path is too long, its folder is missing, something other than a socket is
/// there, or a server answers there.
pub fn check_socket(path: &Path) -> Result<SocketPath, ConfigError> {
    let option = "--api-socket";
    let length = path.as_os_str().as_bytes().len();
    if length > MAX_SOCKET_PATH {
        let problem = format!("the path has {length} bytes, a socket's has at most 107");
        return Err(file_error(option, path, problem, "choose a shorter one"));
    }
    check_folder(option, path)?;
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SocketPath::Free),
        Err(error) => return Err(io_error(option, path, &error)),
    };
    if !metadata.file_type().is_socket() {
        let problem = "is there already, and no socket";
        return Err(file_error(
            option,
            path,
            problem,
            "remove it, or choose another path",
        ));
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            let remedy = "stop it, or choose another path";
            Err(file_error(
                option,
                path,
                "a running server has this socket",
                remedy,
            ))
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(SocketPath::Stale),
        Err(error) => Err(io_error(option, path, &error)),
    }
}

fn stat(option: &'static str, path: &Path) -> Result<Metadata, ConfigError> {
    path.metadata()
        .map_err(|error| io_error(option, path, &error))
}

fn open(option: &'static str, path: &Path, options: &OpenOptions) -> Result<File, ConfigError> {
    options
        .open(path)
        .map_err(|error| io_error(option, path, &error))
}

fn kind(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() {
        "is a directory"
    } else {
        "is no regular file"
    }
}

fn file_error(
    option: &'static str,
    path: &Path,
    problem: impl Into<String>,
    remedy: &'static str,
) -> ConfigError {
    ConfigError::File {
        option,
        path: path.to_owned(),
        problem: problem.into(),
        remedy,
    }
}

fn io_error(option: &'static str, path: &Path, error: &io::Error) -> ConfigError {
    let (problem, remedy) = match error.kind() {
        io::ErrorKind::NotFound => ("there is no such file", "check the path"),
        io::ErrorKind::PermissionDenied if option == "--disk" => (
            "permission denied",
            "change its permissions, or add readonly=on if you may only read it",
        ),
        io::ErrorKind::PermissionDenied => (
            "permission denied",
            "change its permissions, or run as another user",
        ),
        io::ErrorKind::ReadOnlyFilesystem => ("the file system is read-only", "add readonly=on"),
        _ => return file_error(option, path, error.to_string(), "name another one"),
    };
    file_error(option, path, problem, remedy)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;
    use crate::config::{CpusSpec, parse_size};

    /// A folder with a kernel in it, and the smallest machine that runs it.
    struct Bench {
        folder: TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let folder = TempDir::new().unwrap();
            fs::write(folder.path().join("kernel"), "MZ").unwrap();
            fs::write(folder.path().join("disk"), [0; 1024]).unwrap();
            fs::write(folder.path().join("empty"), "").unwrap();
            Self { folder }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn spec(&self) -> MachineSpec {
            MachineSpec::new(self.path("kernel"))
        }

        fn disk(&self, name: &str, readonly: bool) -> DiskConfig {
            DiskConfig {
                path: self.path(name),
                readonly,
            }
        }
    }

    /// The complaint about the bench's machine after `change`; empty when there is none.
    fn complaint(bench: &Bench, change: impl FnOnce(&mut MachineSpec)) -> String {
        let mut spec = bench.spec();
        change(&mut spec);
        let message = spec
            .validate()
            .map_or_else(|error| error.to_string(), |_| String::new());
        assert!(!message.contains('\n'), "{message}");
        message.replace(&format!("{}/", bench.folder.path().display()), "")
    }

    fn balloon(size: &str) -> Option<BalloonConfig> {
        Some(format!("size={size}").parse().unwrap())
    }

    #[test]
    fn a_good_spec_becomes_a_machine() {
        let bench = Bench::new();
        let mut spec = bench.spec();
        spec.disks = vec![bench.disk("disk", true), bench.disk("disk", true)];
        spec.balloon = balloon("512M");
        spec.api_socket = Some(bench.path("socket"));
        spec.serial = SerialConfig::File(bench.path("log"));
        let config = spec.validate().unwrap();
        assert_eq!(config.vcpus, 1);
        assert_eq!(config.memory.size, 512 << 20);
        assert!(config.memory.thp);
        assert_eq!(config.disks.len(), 2);
        assert!(!bench.path("log").exists() && !bench.path("socket").exists());
    }

    #[test]
    fn hugepages_turn_transparent_ones_off() {
        let bench = Bench::new();
        let mut spec = bench.spec();
        spec.memory = "size=4M,hugepages=on".parse().unwrap();
        assert!(!spec.clone().validate().unwrap().memory.thp);
        spec.memory.thp = Some(true);
        assert_eq!(spec.validate().unwrap_err(), ConfigError::ThpWithHugepages);
    }

    #[test]
    fn values_out_of_bounds() {
        let bench = Bench::new();
        let memory =
            |size: &str| complaint(&bench, |spec| spec.memory.size = parse_size(size).unwrap());
        assert!(memory("0").contains("size=0"));
        assert!(memory("3M").contains("size=3M: not a multiple of 2 MiB; the nearest below is 2M"));
        assert!(memory("128T").contains("size=128T: beyond the address width"));
        assert_eq!(memory("64T"), "");
        let cpus = |boot| complaint(&bench, |spec| spec.cpus = CpusSpec { boot });
        assert_eq!(cpus(0), "--cpus boot=0: choose 1 to 255");
        assert_eq!(cpus(256), "--cpus boot=256: choose 1 to 255");
        let size = |size: &str| complaint(&bench, |spec| spec.balloon = balloon(size));
        assert!(size("513M").contains("size=513M: the guest has only 512M"));
        assert!(size("6K").contains("size=6K: not a multiple of 4 KiB; the nearest below is 4K"));
        let cmdline = |text: String| complaint(&bench, |spec| spec.cmdline = text);
        assert!(cmdline("a".repeat(2048)).contains("2048 bytes"));
        assert_eq!(cmdline("a".repeat(2047)), "");
        assert!(cmdline("a\nb".to_owned()).contains(r"'\n'"));
        for id in ["", "a b", &"a".repeat(65), "a\nb"] {
            let message = complaint(&bench, |spec| spec.id = id.to_owned());
            assert!(message.contains("use 1 to 64"), "{message}");
        }
    }

    #[test]
    fn arenas_that_are_none() {
        let bench = Bench::new();
        let arenas = |texts: &[&str]| {
            let parsed = texts.iter().map(|text| text.parse().unwrap());
            complaint(&bench, |spec| spec.arenas = parsed.collect())
        };
        assert_eq!(arenas(&["size=8T", "size=64M,granule=32M,id=heap"]), "");
        for (text, part) in [
            (
                "size=0",
                "size=0: no granule of 2M is left behind the table; choose at least 4M",
            ),
            ("size=2M", "no granule of 2M is left"),
            (
                "size=3M",
                "size=3M: not a multiple of the granule of 2M; the nearest below is 2M",
            ),
            ("size=65T", "size=65T: choose at most 64T"),
            (
                "size=1G,granule=4K",
                "granule=4K: choose a power of two from 2M to 1G",
            ),
            ("size=9M,granule=3M", "granule=3M: choose a power of two"),
            ("size=8G,granule=2G", "granule=2G: choose a power of two"),
            ("size=1G,id=a b", "id=a b: use 1 to 32"),
            (
                "size=1G,id=abcdefghijklmnopqrstuvwxyz0123456",
                "use 1 to 32",
            ),
        ] {
            let message = arenas(&[text]);
            assert!(message.contains(part), "{text}: {message}");
        }
        let mut spec = bench.spec();
        spec.arenas = vec!["size=1G".parse().unwrap()];
        let machine = spec.clone().validate().unwrap();
        assert_eq!(machine.cmdline, "console=ttyS0 panic=-1");
        spec.cmdline = "quiet pci=off".to_owned();
        assert_eq!(spec.validate().unwrap_err(), ConfigError::ArenaWithoutPci);
        assert!(
            arenas(&["size=40T", "size=40T"]).contains("choose at most 64T, all arenas together")
        );
        assert!(arenas(&["size=1G,id=arena1", "size=1G"]).contains("id=arena1 is given twice"));
        assert!(arenas(&["size=1G"; 17]).contains("given 17 times; at most 16"));
        for text in ["", "granule=2M", "size=x", "size=1G,sise=2"] {
            assert!(text.parse::<ArenaSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn images_that_are_no_images() {
        let bench = Bench::new();
        let kernel = |name: &str| complaint(&bench, |spec| spec.kernel = bench.path(name));
        assert_eq!(
            kernel("none"),
            "--kernel none: there is no such file; check the path"
        );
        assert_eq!(
            kernel("."),
            "--kernel .: is a directory; name a regular file"
        );
        assert_eq!(
            kernel("empty"),
            "--kernel empty: the file is empty; name another one"
        );
        let initramfs = complaint(&bench, |spec| spec.initramfs = Some(bench.path("none")));
        assert!(initramfs.starts_with("--initramfs none: there is no such file"));
        let _socket = UnixListener::bind(bench.path("socket")).unwrap();
        assert!(kernel("socket").contains("is no regular file"));
    }

    #[test]
    fn a_refused_permission_names_its_remedy() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let message = |option| io_error(option, Path::new("/x"), &denied).to_string();
        assert!(message("--disk").contains("readonly=on"));
        assert!(message("--kernel").contains("--kernel /x: permission denied; change"));
    }

    #[test]
    fn disks_that_are_no_disks() {
        let bench = Bench::new();
        let disk =
            |name: &str| complaint(&bench, |spec| spec.disks = vec![bench.disk(name, false)]);
        assert!(disk("none").starts_with("--disk none: there is no such file"));
        assert!(disk(".").starts_with("--disk .: is a directory"));
        assert!(disk("empty").contains("holds no sector"));
    }

    #[test]
    fn one_file_is_not_two_writable_disks() {
        let bench = Bench::new();
        symlink("disk", bench.path("link")).unwrap();
        fs::hard_link(bench.path("disk"), bench.path("hard")).unwrap();
        for other in ["disk", "link", "hard"] {
            for (left, right) in [(false, false), (true, false), (false, true)] {
                let message = complaint(&bench, |spec| {
                    spec.disks = vec![bench.disk("disk", left), bench.disk(other, right)];
                });
                assert!(message.contains("are one file"), "{other}: {message}");
            }
        }
    }

    #[test]
    fn outputs_need_their_folder() {
        let bench = Bench::new();
        let serial = |name: &str| {
            complaint(&bench, |spec| {
                spec.serial = SerialConfig::File(bench.path(name))
            })
        };
        assert!(serial("none/log").contains("there is no folder"));
        assert!(serial(".").contains("is a directory"));
    }

    #[test]
    fn sockets_free_stale_served_and_impossible() {
        let bench = Bench::new();
        let path = bench.path("socket");
        assert_eq!(check_socket(&path), Ok(SocketPath::Free));
        let listener = UnixListener::bind(&path).unwrap();
        let message = check_socket(&path).unwrap_err().to_string();
        assert!(
            message.contains("a running server has this socket"),
            "{message}"
        );
        drop(listener);
        assert_eq!(check_socket(&path), Ok(SocketPath::Stale));
        let message =
            |name: &str| complaint(&bench, |spec| spec.api_socket = Some(bench.path(name)));
        assert!(message("disk").contains("is there already, and no socket"));
        assert!(message("none/socket").contains("there is no folder"));
        assert!(message(&"a".repeat(100)).contains("choose a shorter one"));
    }
}
