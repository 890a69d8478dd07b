//! Bad command lines that are found out with KVM at hand.

use std::fs;

use ebb_harness::Images;
use ebb_harness::error::{Context, Result};
use ebb_harness::refusal::Bench;

#[test]
fn kernels_that_are_none() -> Result<()> {
    let bench = Bench::new()?;
    let images = Images::from_environment()?;
    let bzimage = fs::read(&images.vmlinuz).context(images.vmlinuz.display())?;
    let elf = fs::read(&images.vmlinux).context(images.vmlinux.display())?;
    bench.file(
        "text",
        b"this is no kernel, and it is longer than the header of one\n",
    )?;
    bench.file("zeroes", &[0; 1 << 16])?;
    bench.file("short", &bzimage[..300])?;
    bench.file("half", &bzimage[..bzimage.len() / 2])?;
    bench.file("half-elf", &elf[..elf.len() / 2])?;
    bench.file("elf-header", &elf[..64])?;
    for name in ["text", "zeroes", "short", "half", "half-elf", "elf-header"] {
        bench.refused(bench.run(&["--kernel", name]), &["kernel", name])?;
    }
    bench.refused(
        bench.run(&["--kernel", "half", "--kernel-entry", "image"]),
        &["half"],
    )
}

#[test]
fn machines_that_are_too_large() -> Result<()> {
    let bench = Bench::new()?;
    let kernel = Images::from_environment()?.vmlinuz;
    let kernel = kernel.to_string_lossy();
    let small = ["--kernel", &kernel, "--memory", "size=128M"];
    // Beyond what an initial RAM disk can fit into.
    fs::File::create(bench.path("big"))
        .and_then(|file| file.set_len(256 << 20))
        .context("make a big file")?;
    let words = [&small[..], &["--initramfs", "big"]].concat();
    bench.refused(bench.run(&words), &["big", "--memory"])?;
    let words = ["--kernel", &kernel, "--memory", "size=4M"];
    bench.refused(bench.run(&words), &["--memory"])?;
    let words = ["--kernel", &kernel, "--memory", "size=64T"];
    bench.refused(bench.run(&words), &["lower --memory size="])
}
