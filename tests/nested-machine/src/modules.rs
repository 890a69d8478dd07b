//! Dependencies of kernel modules.

use std::collections::{HashMap, HashSet};

use crate::error::{Context, Result};

/// The content of modules.dep and modules.builtin.
#[derive(Debug, Default)]
pub struct Index {
    /// By module name: its file and the files of its dependencies. Each dependency stands before its own dependencies.
    files: HashMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
}

impl Index {
    /// Parses the two files.
    pub fn parse(dep: &str, builtin: &str) -> Self {
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
    ///
    /// # Errors
    /// If a name is neither a module nor built in.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<String>> {
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
pub fn module_name(file: &str) -> String {
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
