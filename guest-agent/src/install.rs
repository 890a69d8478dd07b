//! `ebb-guest install`: makes a Debian create the devices of the arenas at each boot. `ebb-guest uninstall` undoes it.
//!
//! A script in the initramfs does it before the root file system is mounted. Where the initramfs is not made by
//! initramfs-tools, a systemd unit does it before `basic.target`. Both run `ebb-guest setup`, which may run twice.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::run;
use crate::setup::{Access, DEFAULT_GROUP, find_group};

// Paths below the root of the Debian.
/// This program. The installed files name it.
const PROGRAM: &str = "usr/local/bin/ebb-guest";
/// The library, in a folder where `ebb-guest run` looks for it.
const LIBRARY: &str = "usr/local/lib/libebb_malloc.so";
/// Exists if systemd is installed.
const SYSTEMD: &str = "usr/lib/systemd/system";
/// Exists if initramfs-tools is installed.
const INITRAMFS_TOOLS: &str = "usr/share/initramfs-tools";
/// The link by which systemd starts the unit at boot.
const UNIT_LINK: &str = "etc/systemd/system/basic.target.wants/ebb-arena.service";
/// The unit, relative to the link's folder.
const UNIT: &str = "../ebb-arena.service";

/// A file to install.
struct InstalledFile {
    path: &'static str,
    /// `@MODE@` and `@GROUP@` stand for the permissions of the devices and the number of their group.
    content: &'static str,
    permissions: u32,
    /// Installed only if this folder exists.
    needs: &'static str,
}

const FILES: [InstalledFile; 3] = [
    InstalledFile {
        path: "etc/systemd/system/ebb-arena.service",
        content: include_str!("../debian/ebb-arena.service"),
        permissions: 0o644,
        needs: SYSTEMD,
    },
    InstalledFile {
        path: "etc/initramfs-tools/hooks/ebb-arena",
        content: include_str!("../debian/initramfs-hook.sh"),
        permissions: 0o755,
        needs: INITRAMFS_TOOLS,
    },
    InstalledFile {
        path: "etc/initramfs-tools/scripts/init-premount/ebb-arena",
        content: include_str!("../debian/initramfs-script.sh"),
        permissions: 0o755,
        needs: INITRAMFS_TOOLS,
    },
];

const USAGE: &str = "\
usage: ebb-guest install [--root DIR] [--mode MODE] [--group GROUP], with an octal MODE of at most 0777 (default 0660) and the
                         name or number of a group (default ebb, which is created)
       ebb-guest uninstall [--root DIR]";

/// The command's options.
pub struct Options {
    /// Root of the Debian.
    root: PathBuf,
    /// Who may use the devices.
    access: Access,
}

fn parse(words: &[&str]) -> Option<Options> {
    let mut options = Options {
        root: PathBuf::from("/"),
        access: Access::default(),
    };
    let mut words = words.iter();
    while let Some(name) = words.next() {
        let value = words.next()?;
        match *name {
            "--root" => options.root = PathBuf::from(value),
            _ => options.access.set(name, value)?,
        }
    }
    Some(options)
}

/// Runs a subcommand: [`install`] or [`uninstall`].
pub fn main(words: &[&str], action: fn(&Options) -> Result<(), String>) -> ExitCode {
    let Some(options) = parse(words) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match action(&options).and_then(|()| update_initramfs(&options.root)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ebb-guest: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Adds the operation, the file and a remedy to an error.
fn failed<'a>(what: &'a str, path: &'a Path) -> impl Fn(io::Error) -> String + 'a {
    move |error| {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => "run this as root",
            io::ErrorKind::ReadOnlyFilesystem => "mount the file system writable",
            io::ErrorKind::StorageFull => "free some space in the file system",
            _ => "is --root the root of a Debian?",
        };
        format!("{what} {}: {error}; {remedy}", path.display())
    }
}

fn create_parent(path: &Path) -> Result<(), String> {
    path.parent().map_or(Ok(()), |folder| {
        fs::create_dir_all(folder).map_err(failed("creating", folder))
    })
}

/// Copies a file under another name, then renames it, because `to` may be a running program.
fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let same = fs::canonicalize(from).ok() == fs::canonicalize(to).ok();
    if !same {
        create_parent(to)?;
        let new = to.with_extension("new");
        fs::copy(from, &new).map_err(failed("writing", &new))?;
        fs::rename(&new, to).map_err(failed("writing", to))?;
    }
    println!("{}", to.display());
    Ok(())
}

/// Copies the program and the library, and writes the files that run the program at boot. Prints their paths.
pub fn install(options: &Options) -> Result<(), String> {
    let Options { root, access } = options;
    if !FILES.iter().any(|file| root.join(file.needs).is_dir()) {
        return Err(format!(
            "{} has neither systemd nor initramfs-tools; run `ebb-guest setup` at boot by other means",
            root.display()
        ));
    }
    let own = std::env::current_exe().map_err(|error| format!("this program's file: {error}"))?;
    copy(&own, &root.join(PROGRAM))?;
    match run::library() {
        Some(library) => copy(&library, &root.join(LIBRARY))?,
        None => println!(
            "there is no libebb_malloc.so next to this program; copy it to {}",
            root.join(LIBRARY).display()
        ),
    }
    if access.group.is_none() && find_group(root, DEFAULT_GROUP).is_none() {
        let mut groupadd = command_in(root, "groupadd");
        succeed(
            groupadd.args(["--system", DEFAULT_GROUP]),
            "name another --group",
        )?;
    }
    let group = access.group_id(root)?;
    FILES
        .iter()
        .filter(|file| root.join(file.needs).is_dir())
        .try_for_each(|file| write_file(root, file, access.mode, group))?;
    if root.join(SYSTEMD).is_dir() {
        let link = root.join(UNIT_LINK);
        create_parent(&link)?;
        remove(&link)?;
        std::os::unix::fs::symlink(UNIT, &link).map_err(failed("linking", &link))?;
        println!("{}", link.display());
    }
    Ok(())
}

fn write_file(root: &Path, file: &InstalledFile, mode: u32, group: u32) -> Result<(), String> {
    let path = root.join(file.path);
    create_parent(&path)?;
    let content = file.content.replace("@MODE@", &format!("{mode:04o}"));
    let content = content.replace("@GROUP@", &group.to_string());
    fs::write(&path, content).map_err(failed("writing", &path))?;
    let permissions = fs::Permissions::from_mode(file.permissions);
    fs::set_permissions(&path, permissions).map_err(failed("chmod of", &path))?;
    println!("{}", path.display());
    Ok(())
}

fn remove(path: &Path) -> Result<(), String> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("removing", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes what [`install`] has written.
pub fn uninstall(options: &Options) -> Result<(), String> {
    let files = FILES.iter().map(|file| file.path);
    for path in files.chain([UNIT_LINK, LIBRARY, PROGRAM]) {
        remove(&options.root.join(path))?;
    }
    Ok(())
}

/// Rebuilds the initramfs if initramfs-tools is installed.
fn update_initramfs(root: &Path) -> Result<(), String> {
    if !root.join(INITRAMFS_TOOLS).is_dir() {
        return Ok(());
    }
    let mut update = command_in(root, "update-initramfs");
    succeed(update.args(["-u", "-k", "all"]), "run this again")
}

/// A program of the Debian at `root`.
fn command_in(root: &Path, program: &str) -> Command {
    if root == Path::new("/") {
        return Command::new(program);
    }
    let mut command = Command::new("chroot");
    command.arg(root).arg(program);
    command
}

/// Runs a program that must succeed.
fn succeed(command: &mut Command, remedy: &str) -> Result<(), String> {
    if command.status().is_ok_and(|status| status.success()) {
        return Ok(());
    }
    Err(format!(
        "{command:?} failed; fix what it reports above, then {remedy}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn install_can_be_repeated_and_undone() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let options = Options {
            root: root.to_owned(),
            access: Access::default(),
        };
        let error = install(&options).unwrap_err();
        assert!(error.contains("neither systemd nor initramfs-tools"));
        for folder in [SYSTEMD, INITRAMFS_TOOLS, "etc"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("etc/group"), "ebb:x:998:\n").unwrap();
        for _ in 0..2 {
            install(&options).unwrap();
        }
        let unit = fs::read_to_string(root.join(UNIT_LINK)).unwrap();
        assert!(unit.contains(
            "ExecStart=/usr/local/bin/ebb-guest setup --optional --mode 0660 --group 998\n"
        ));
        for file in &FILES {
            let text = fs::read_to_string(root.join(file.path)).unwrap();
            assert!(!text.contains('@'), "{}", file.path);
        }
        let hook = fs::metadata(root.join(FILES[1].path)).unwrap();
        assert_eq!(hook.permissions().mode() & 0o777, 0o755);
        for _ in 0..2 {
            uninstall(&options).unwrap();
            assert!(!root.join(UNIT_LINK).is_symlink() && !root.join(PROGRAM).exists());
        }
    }

    #[test]
    fn options_are_checked() {
        let found = parse(&["--mode", "0666", "--root", "/mnt"]).unwrap();
        assert_eq!(
            (found.root.as_path(), found.access.mode),
            (Path::new("/mnt"), 0o666)
        );
        for bad in [
            &["--mode", "9"][..],
            &["--mode", "1777"],
            &["--root"],
            &["/mnt", "x"],
        ] {
            assert!(parse(bad).is_none(), "{bad:?}");
        }
    }
}
