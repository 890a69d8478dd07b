//! `ebb-guest install`: puts into a Debian what makes the arenas' devices at each boot, and `uninstall`: takes it away.
//!
//! The initramfs does it before the root file system is there; where it was made by something else than initramfs-tools, a
//! systemd unit does it before anything that is ordered behind `basic.target`. Both run `setup`, which may be run twice.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::run;
use crate::setup::parse_mode;

/// Where this program goes; the files below name it.
const PROGRAM: &str = "usr/local/bin/ebb-guest";
/// Where the library goes, a place where `run` looks for it.
const LIBRARY: &str = "usr/local/lib/libebb_malloc.so";
/// Where systemd keeps its own, to see whether it is there.
const SYSTEMD: &str = "usr/lib/systemd/system";
/// Where initramfs-tools keep theirs.
const INITRAMFS_TOOLS: &str = "usr/share/initramfs-tools";
/// What starts the unit at boot.
const WANTED: &str = "etc/systemd/system/basic.target.wants/ebb-arena.service";
/// The unit, from there.
const UNIT: &str = "../ebb-arena.service";

/// Files: where they go, what is in them but for the mode of the devices, their own mode, and who reads them.
const FILES: [(&str, &str, u32, &str); 3] = [
    (
        "etc/systemd/system/ebb-arena.service",
        include_str!("../debian/ebb-arena.service"),
        0o644,
        SYSTEMD,
    ),
    (
        "etc/initramfs-tools/hooks/ebb-arena",
        include_str!("../debian/initramfs-hook.sh"),
        0o755,
        INITRAMFS_TOOLS,
    ),
    (
        "etc/initramfs-tools/scripts/init-premount/ebb-arena",
        include_str!("../debian/initramfs-script.sh"),
        0o755,
        INITRAMFS_TOOLS,
    ),
];

const USAGE: &str = "install and uninstall take --root DIR, and install --mode and an octal number, for instance 0666";

/// What is asked for.
struct Options {
    root: PathBuf,
    mode: u32,
}

fn parse(words: &[&str]) -> Option<Options> {
    let mut options = Options {
        root: PathBuf::from("/"),
        mode: 0o600,
    };
    let mut words = words.iter();
    while let Some(name) = words.next() {
        let value = words.next()?;
        match *name {
            "--root" => options.root = PathBuf::from(value),
            "--mode" => options.mode = parse_mode(value)?,
            _ => return None,
        }
    }
    Some(options)
}

/// Runs `install`, or `uninstall` when not `forth`.
pub fn main(words: &[&str], forth: bool) -> ExitCode {
    let Some(options) = parse(words) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let done = if forth {
        install(&options)
    } else {
        uninstall(&options.root)
    };
    match done.and_then(|()| renew_initramfs(&options.root)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ebb-guest: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Says what was done with a file that failed, and what helps.
fn failed<'a>(what: &'a str, path: &'a Path) -> impl Fn(io::Error) -> String + 'a {
    move |error| {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => "run this as root",
            io::ErrorKind::ReadOnlyFilesystem => "mount the file system writable",
            io::ErrorKind::StorageFull => "make room in the file system",
            _ => "is --root the root of a Debian?",
        };
        format!("{what} {}: {error}; {remedy}", path.display())
    }
}

fn make_folder(of: &Path) -> Result<(), String> {
    of.parent().map_or(Ok(()), |folder| {
        fs::create_dir_all(folder).map_err(failed("making", folder))
    })
}

/// Copies a file, by another name first: the old one may be running.
fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let same = fs::canonicalize(from).ok() == fs::canonicalize(to).ok();
    if !same {
        make_folder(to)?;
        let new = to.with_extension("new");
        fs::copy(from, &new).map_err(failed("writing", &new))?;
        fs::rename(&new, to).map_err(failed("writing", to))?;
    }
    println!("{}", to.display());
    Ok(())
}

fn install(options: &Options) -> Result<(), String> {
    let Options { root, mode } = options;
    if !FILES.iter().any(|file| root.join(file.3).is_dir()) {
        return Err(format!(
            "{} has neither systemd nor initramfs-tools; run `ebb-guest setup` at boot by what it has",
            root.display()
        ));
    }
    let own = std::env::current_exe().map_err(|error| format!("this program's file: {error}"))?;
    copy(&own, &root.join(PROGRAM))?;
    match run::library() {
        Some(library) => copy(&library, &root.join(LIBRARY))?,
        None => println!(
            "no libebb_malloc.so beside this program: put it to {}",
            root.join(LIBRARY).display()
        ),
    }
    for (name, content, permissions, reader) in FILES {
        if !root.join(reader).is_dir() {
            continue;
        }
        let path = root.join(name);
        make_folder(&path)?;
        let content = content.replace("@MODE@", &format!("{mode:04o}"));
        fs::write(&path, content).map_err(failed("writing", &path))?;
        let permissions = fs::Permissions::from_mode(permissions);
        fs::set_permissions(&path, permissions).map_err(failed("chmod of", &path))?;
        println!("{}", path.display());
    }
    if root.join(SYSTEMD).is_dir() {
        let link = root.join(WANTED);
        make_folder(&link)?;
        remove(&link)?;
        std::os::unix::fs::symlink(UNIT, &link).map_err(failed("linking", &link))?;
        println!("{}", link.display());
    }
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

fn uninstall(root: &Path) -> Result<(), String> {
    let files = FILES.iter().map(|file| file.0);
    for name in files.chain([WANTED, LIBRARY, PROGRAM]) {
        remove(&root.join(name))?;
    }
    Ok(())
}

/// Makes the initramfs anew, where there is one of initramfs-tools.
fn renew_initramfs(root: &Path) -> Result<(), String> {
    if !root.join(INITRAMFS_TOOLS).is_dir() {
        return Ok(());
    }
    let mut command = if root == Path::new("/") {
        Command::new("update-initramfs")
    } else {
        let mut command = Command::new("chroot");
        command.arg(root).arg("update-initramfs");
        command
    };
    let status = command.args(["-u", "-k", "all"]).status();
    if status.is_ok_and(|status| status.success()) {
        Ok(())
    } else {
        Err("update-initramfs -u -k all failed; run it again when its trouble is over".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(root: &Path) -> Options {
        Options {
            root: root.to_owned(),
            mode: 0o660,
        }
    }

    #[test]
    fn what_is_installed_can_be_installed_again_and_taken_away() {
        let root = tempfile::tempdir().unwrap();
        let error = install(&options(root.path())).unwrap_err();
        assert!(error.contains("neither systemd nor initramfs-tools"));
        for folder in [SYSTEMD, INITRAMFS_TOOLS] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        for _ in 0..2 {
            install(&options(root.path())).unwrap();
        }
        let unit = fs::read_to_string(root.path().join(WANTED)).unwrap();
        assert!(unit.contains("ExecStart=/usr/local/bin/ebb-guest setup --optional --mode 0660\n"));
        for (name, ..) in FILES {
            let text = fs::read_to_string(root.path().join(name)).unwrap();
            assert!(!text.contains("@MODE@"), "{name}");
        }
        let hook = fs::metadata(root.path().join(FILES[1].0)).unwrap();
        assert_eq!(hook.permissions().mode() & 0o777, 0o755);
        uninstall(root.path()).unwrap();
        assert!(!root.path().join(WANTED).is_symlink() && !root.path().join(PROGRAM).exists());
        uninstall(root.path()).unwrap();
    }

    #[test]
    fn words_are_checked() {
        let found = parse(&["--mode", "0666", "--root", "/mnt"]).unwrap();
        assert_eq!(
            (found.root.as_path(), found.mode),
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
