//! What a jail holds, by the options of the machine. Pure, but for the working directory.

use std::path::{Component, Path, PathBuf};

use super::JailError;
use crate::config::{JailSpec, KernelCache, MachineSpec, SerialConfig, SocketSpec, check_id};
use crate::sys::mounts::Access;

/// Where the folders of machines are by default.
pub(super) const FOLDERS: &str = "/run/ebb/jail";
/// Where a jail has things of its own.
const OWN: [&str; 3] = ["/proc", "/sys", "/run/ebb/peers"];

/// A file that the machine uses and does not make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// The option that names it.
    pub option: &'static str,
    pub path: PathBuf,
    pub access: Access,
}

/// A machine's jail.
#[derive(Debug)]
pub struct Plan {
    pub(super) id: String,
    pub(super) jail: JailSpec,
    /// The machine's folder.
    pub(super) folder: PathBuf,
    /// The names of its sockets there; the first is the API's.
    pub(super) sockets: Vec<PathBuf>,
    /// Outside of the folder.
    pub(super) items: Vec<Item>,
    /// Descriptors that the machine inherits.
    pub(super) inherited: Vec<i32>,
}

impl Plan {
    /// Plans the jail of `machine`, which also writes `outputs`, by option. Makes their paths absolute: a relative one of a file that the
    /// machine makes is one in its folder. The API gets a socket there, `api`, if it has none.
    ///
    /// # Errors
    /// An option that a jail has no place for.
    pub fn new(
        jail: JailSpec,
        machine: &mut MachineSpec,
        outputs: Vec<(&'static str, &mut PathBuf)>,
    ) -> Result<Self, JailError> {
        check_id(&machine.id)?;
        for (option, number) in [("uid", jail.uid), ("gid", jail.gid)] {
            match number {
                0 => return Err(JailError::Root { option }),
                u32::MAX => return Err(JailError::Nobody { option }),
                _ => {}
            }
        }
        if machine.metrics_listen.is_some() {
            return Err(JailError::Listen);
        }
        let id = machine.id.clone();
        let folder = jail.folder.as_deref().map_or_else(
            || Path::new(FOLDERS).join(&id),
            |folder| std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned()),
        );
        let made = made(machine, outputs);
        let mut sockets = Vec::new();
        for (option, path) in made {
            *path = folder.join(&*path);
            // A link in the folder leads to nothing outside: the machine opens it in the jail.
            if path.parent() != Some(&folder) || path.file_name().is_none() {
                let (path, folder) = (path.clone(), folder.clone());
                return Err(JailError::Outside {
                    option,
                    path,
                    folder,
                });
            }
            if ["--api-socket", "--vsock"].contains(&option) {
                sockets.extend(path.file_name().map(PathBuf::from));
            }
        }
        let mut items = items(machine)?;
        // They are there already.
        items.retain(|item| !item.path.starts_with(&folder));
        Ok(Self {
            id,
            folder,
            sockets,
            items,
            inherited: machine.nets.iter().filter_map(|net| net.fd).collect(),
            jail,
        })
    }

    /// The machine inherits this descriptor, too.
    pub fn inherit(&mut self, number: Option<i32>) {
        self.inherited.extend(number);
    }
}

/// The files that the machine makes, by option; the API's socket comes first.
fn made<'a>(
    machine: &'a mut MachineSpec,
    outputs: Vec<(&'static str, &'a mut PathBuf)>,
) -> Vec<(&'static str, &'a mut PathBuf)> {
    // Whoever adds an option with a file adds it here or to `items`.
    let MachineSpec {
        api_socket,
        serial,
        kernel_cache,
        vsock,
        kernel: _,
        kernel_entry: _,
        initramfs: _,
        cmdline: _,
        cpus: _,
        memory: _,
        arenas: _,
        transport: _,
        disks: _,
        // Only folders in the jail's own are there.
        allow_paths: _,
        nets: _,
        balloon: _,
        rng: _,
        rng_limits: _,
        lazy: _,
        metrics_path,
        metrics_listen: _,
        guardian: _,
        seccomp: _,
        id: _,
    } = machine;
    let socket = api_socket.get_or_insert_with(|| SocketSpec { path: "api".into() });
    let mut made = vec![("--api-socket", &mut socket.path)];
    made.extend(vsock.as_mut().map(|vsock| ("--vsock", &mut vsock.path)));
    if let SerialConfig::File(path) = serial {
        made.push(("--serial file=", path));
    }
    // A cache that machines share would let one choose the kernel of another.
    let cache = kernel_cache.get_or_insert(KernelCache(None));
    made.extend(cache.0.as_mut().map(|path| ("--kernel-cache", path)));
    made.extend(metrics_path.as_mut().map(|path| ("--metrics-path", path)));
    made.extend(outputs);
    made
}

/// The files that the machine uses, by option.
fn items(machine: &mut MachineSpec) -> Result<Vec<Item>, JailError> {
    let kernel = [("--kernel", Access::Read, &mut machine.kernel)];
    let initramfs = machine.initramfs.iter_mut();
    let initramfs = initramfs.map(|path| ("--initramfs", Access::Read, path));
    let disks = machine.disks.iter_mut().map(|disk| {
        let access = if disk.readonly {
            Access::Read
        } else {
            Access::Write
        };
        ("--disk", access, &mut disk.path)
    });
    let all = kernel.into_iter().chain(initramfs).chain(disks);
    all.map(|(option, access, path)| {
        if let Ok(absolute) = std::path::absolute(&*path) {
            *path = absolute;
        }
        let path = path.clone();
        let odd = path.components().any(|it| it == Component::ParentDir);
        if odd || OWN.iter().any(|own| path.starts_with(own)) {
            return Err(JailError::Hidden { option, path });
        }
        Ok(Item {
            option,
            path,
            access,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::parse_keys;

    fn jail(uid: u32) -> JailSpec {
        JailSpec {
            uid,
            gid: 9,
            folder: None,
            cgroup: parse_keys("parent=ebb").unwrap(),
            netns: None,
        }
    }

    fn machine(words: &[&str]) -> MachineSpec {
        MachineSpec::parse_from([&["--kernel", "/k"], words].concat())
    }

    fn refused(words: &[&str]) -> String {
        let planned = Plan::new(jail(9), &mut machine(words), Vec::new());
        planned.unwrap_err().to_string()
    }

    #[test]
    fn files_that_the_machine_makes_are_in_its_folder() {
        let mut machine = machine(&[
            "--id",
            "one",
            "--serial",
            "file=serial",
            "--vsock",
            "cid=3,path=v",
        ]);
        let mut log = PathBuf::from("/run/ebb/jail/one/log");
        let plan = Plan::new(jail(9), &mut machine, vec![("--log-file", &mut log)]).unwrap();
        let folder = Path::new("/run/ebb/jail/one");
        let sockets = ["api", "v"].map(PathBuf::from).into();
        assert_eq!((plan.folder.as_path(), plan.sockets), (folder, sockets));
        let path = folder.join("api");
        assert_eq!(machine.api_socket, Some(SocketSpec { path }));
        assert_eq!(machine.serial, SerialConfig::File(folder.join("serial")));
        assert_eq!(log, folder.join("log"));
        assert_eq!(machine.kernel_cache, Some(KernelCache(None)));
    }

    #[test]
    fn files_that_it_uses_are_brought_in_unless_they_are_in_its_folder() {
        let mut spec = jail(9);
        spec.folder = Some("/vm".into());
        let words = ["--initramfs", "i", "--disk", "path=/vm/disk"];
        let more = [
            "--disk",
            "path=/d,readonly=on",
            "--disk",
            "path=/w",
            "--net",
            "fd=7",
        ];
        let mut machine = machine(&[&words[..], &more].concat());
        let plan = Plan::new(spec, &mut machine, Vec::new()).unwrap();
        let here = std::env::current_dir().unwrap();
        let item = |option, path: &str, access| Item {
            option,
            path: path.into(),
            access,
        };
        let expected = [
            item("--kernel", "/k", Access::Read),
            item(
                "--initramfs",
                here.join("i").to_str().unwrap(),
                Access::Read,
            ),
            item("--disk", "/d", Access::Read),
            item("--disk", "/w", Access::Write),
        ];
        assert_eq!(
            (plan.items.as_slice(), plan.inherited),
            (&expected[..], vec![7])
        );
        assert_eq!(machine.initramfs, Some(here.join("i")));
    }

    #[test]
    fn what_has_no_place_in_a_jail_is_refused_with_a_remedy() {
        for (words, parts) in [
            (&["--id", "a/b"][..], ["a/b", "letters, digits or hyphens"]),
            (&["--id", ".."], ["'..'", "letters, digits or hyphens"]),
            (
                &["--serial", "file=/x"],
                ["--serial file= /x is outside", "/run/ebb/jail/ebb"],
            ),
            (
                &["--serial", "file=../x"],
                ["../x is outside", "name a file in it"],
            ),
            (
                &["--api-socket", "a/b"],
                ["a/b is outside", "name a file in it"],
            ),
            (&["--api-socket", "."], ["is outside", "name a file in it"]),
            (
                &["--disk", "path=/proc/kcore"],
                ["--disk /proc/kcore", "elsewhere"],
            ),
            (&["--disk", "path=/a/../b"], ["--disk /a/../b", "elsewhere"]),
            (
                &["--api-socket", "a", "--metrics-listen", "127.0.0.1:9180"],
                ["--metrics-listen", "GET /metrics"],
            ),
        ] {
            let message = refused(words);
            for part in parts {
                assert!(message.contains(part), "{words:?}: {message}: lacks {part}");
            }
        }
        for (uid, part) in [
            (0, "--uid 0 is root's"),
            (u32::MAX, "--uid 4294967295 means"),
        ] {
            let planned = Plan::new(jail(uid), &mut machine(&[]), Vec::new());
            let message = planned.unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
