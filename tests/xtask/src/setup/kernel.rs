//! The kernel that the nested machine and the guests boot.

use std::fs;
use std::path::{Path, PathBuf};

use ebb_nested_machine::bzimage;
use ebb_nested_machine::error::{Context, Error, Result};
use ebb_nested_machine::package::{newest_kernel, release};

use super::apt;
use crate::shell::{Seconds, Size, command, progress, quietly};

/// The kernels to choose from.
const PATTERN: &str = r"^linux-image-6\.12\..*-cloud-amd64$";

/// Makes sure that a kernel lies in the cache and returns its release.
pub fn ensure(cache: &Path, refresh: bool) -> Result<String> {
    let folder = cache.join("kernel");
    if let Some(release) = cached(&folder).filter(|_| !refresh) {
        return Ok(release);
    }
    apt::update()?;
    let package = choose(PATTERN)?;
    let release = release(&package).unwrap_or_default().to_owned();
    let place = folder.join(&release);
    if !place.exists() {
        fetch(&package, &release, &place)?;
    }
    Ok(release)
}

/// The newest release whose folder is complete: it gets its name last.
fn cached(folder: &Path) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.flatten();
    let names: Vec<String> = names
        .map(|entry| format!("linux-image-{}", entry.file_name().to_string_lossy()))
        .collect();
    let newest = newest_kernel(names.iter().map(String::as_str))?;
    release(newest).map(str::to_owned)
}

/// The newest package that matches `pattern`.
pub fn choose(pattern: &str) -> Result<String> {
    let listed = quietly(command("apt-cache", ["search", "--names-only", pattern]))?;
    let names = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    newest_kernel(names).map(str::to_owned).ok_or_else(|| {
        Error::new(format!(
            "the package index offers no kernel that matches {pattern}"
        ))
    })
}

fn fetch(package: &str, release: &str, place: &Path) -> Result<()> {
    let start = std::time::Instant::now();
    let part = place.with_file_name("unpacking");
    if part.exists() {
        fs::remove_dir_all(&part).context(|| format!("remove {}", part.display()))?;
    }
    fs::create_dir_all(&part).context(|| format!("create {}", part.display()))?;
    unpack(package, &part)?;
    let mut depmod = command("/sbin/depmod", ["-b"]);
    depmod.arg(&part).arg(release);
    quietly(depmod)?;

    let image = part.join(format!("boot/vmlinuz-{release}"));
    let bytes = fs::read(&image).context(|| format!("read {}", image.display()))?;
    let elf = bzimage::unpack(&bytes).context(|| format!("unpack {}", image.display()))?;
    let vmlinux = part.join("vmlinux");
    fs::write(&vmlinux, &elf).context(|| format!("write {}", vmlinux.display()))?;
    fs::rename(&part, place).context(|| format!("rename to {}", place.display()))?;
    let (size, time) = (Size(elf.len() as u64), Seconds(start.elapsed()));
    progress(format_args!(
        "kernel {release} ready, {size} unpacked, {time}"
    ));
    Ok(())
}

/// Downloads a package and unpacks it in `folder`, without installing it.
pub fn unpack(package: &str, folder: &Path) -> Result<()> {
    let start = std::time::Instant::now();
    let deb = download(package, folder)?;
    let size = fs::metadata(&deb).map_or(0, |meta| meta.len());
    progress(format_args!(
        "downloaded {} in {}",
        Size(size),
        Seconds(start.elapsed())
    ));
    let mut unpack = command("dpkg", ["-x"]);
    unpack.arg(&deb).arg(folder);
    quietly(unpack)?;
    fs::remove_file(&deb).context(|| format!("remove {}", deb.display()))
}

fn download(package: &str, folder: &Path) -> Result<PathBuf> {
    progress(format_args!("downloading {package}"));
    // Its sandbox user cannot write into root's folders, and would warn.
    let mut download = command(
        "apt-get",
        ["-o", "APT::Sandbox::User=root", "download", package],
    );
    download.current_dir(folder);
    quietly(download)?;
    let files = fs::read_dir(folder).context(|| format!("list {}", folder.display()))?;
    let mut files = files.flatten().map(|entry| entry.path());
    files
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context(|| {
            format!(
                "apt-get download {package} left no .deb in {}",
                folder.display()
            )
        })
}
