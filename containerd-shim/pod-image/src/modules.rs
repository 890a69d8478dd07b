//! Kernel modules and their dependencies.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use crate::error::{Context, Result};

/// A kernel module.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// The decompressed file.
    pub image: Vec<u8>,
}

/// The modules `names` and their dependencies, in load order, from a folder with modules.dep.
///
/// # Errors
/// If a module is unknown, or a file cannot be read or unpacked.
pub fn load(folder: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let read = |file: &str| {
        let path = folder.join(file);
        fs::read_to_string(&path).context(|| format!("read {}", path.display()))
    };
    let index = Index::parse(&read("modules.dep")?, &read("modules.builtin")?);
    let files = index.load_order(names)?;
    files.iter().map(|file| load_one(folder, file)).collect()
}

fn load_one(folder: &Path, file: &str) -> Result<Module> {
    let path = folder.join(file);
    let data = fs::read(&path).context(|| format!("read {}", path.display()))?;
    let image = if file.ends_with(".xz") {
        unxz(&data).context(|| format!("unpack {}", path.display()))?
    } else {
        data
    };
    Ok(Module {
        name: module_name(file),
        image,
    })
}

/// Decompresses xz data. Bytes after the stream are ignored.
///
/// # Errors
/// If the data is damaged or truncated.
pub fn unxz(data: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    std::io::Read::read_to_end(&mut liblzma::read::XzDecoder::new(data), &mut out)
        .context(|| format!("unpack {} bytes of xz", data.len()))?;
    Ok(out)
}

/// The content of modules.dep and modules.builtin.
#[derive(Debug, Default)]
struct Index {
    /// By module name: its file and the files of its dependencies. Each dependency stands before its own dependencies.
    files: HashMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
}

impl Index {
    /// Parses the two files.
    fn parse(dep: &str, builtin: &str) -> Self {
        let files = dep.lines().filter_map(|line| {
            let (file, dependencies) = line.split_once(':')?;
            let dependencies = dependencies.split_whitespace().map(str::to_owned).collect();
            Some((module_name(file), (file.to_owned(), dependencies)))
        });
        let builtin = builtin.lines().map(module_name).collect();
        Self {
            files: files.collect(),
            builtin,
        }
    }

    /// The files to load for `names`, each once, in load order. Built-in modules have none.
    fn load_order(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order: Vec<String> = Vec::new();
        for name in names {
            let name = module_name(name);
            if self.builtin.contains(&name) {
                continue;
            }
            let (file, dependencies) = self
                .files
                .get(&name)
                .context(|| format!("module {name} is neither in modules.dep nor built in"))?;
            for file in dependencies.iter().rev().chain([file]) {
                if !order.contains(file) {
                    order.push(file.clone());
                }
            }
        }
        Ok(order)
    }
}

/// Name of a module: without folder and suffix, and with `_` for `-`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    let name = name.split(".ko").next().unwrap_or(name);
    name.trim().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz kernel/virt/lib/irqbypass.ko.xz
kernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko.xz
kernel/virt/lib/irqbypass.ko.xz:
kernel/drivers/block/virtio_blk.ko:
";

    fn order(names: &[&str]) -> Result<Vec<String>> {
        let index = Index::parse(DEP, "kernel/fs/ext4/ext4.ko\nkernel/lib/crc16.ko\n");
        let files = index.load_order(names)?;
        Ok(files.iter().map(|file| module_name(file)).collect())
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let found = order(&["kvm-amd", "virtio_blk", "kvm", "kvm_amd"]).unwrap();
        assert_eq!(found, ["irqbypass", "kvm", "kvm_amd", "virtio_blk"]);
    }

    #[test]
    fn built_in_modules_need_no_file() {
        assert_eq!(
            order(&["ext4", "crc16", "irqbypass"]).unwrap(),
            ["irqbypass"]
        );
    }

    #[test]
    fn unknown_modules_are_named() {
        let error = order(&["virtio_blk", "nosuch"]).unwrap_err();
        assert!(error.to_string().contains("nosuch"), "{error}");
    }
}
