//! Kernel images.

use std::io::Write;
use std::sync::Arc;

use ebb_vmm::boot::{Payload, load};
use ebb_vmm::config::{KernelConfig, KernelEntry};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::machine::{MIB, range};

pub fn run(input: &[u8]) {
    let Some((kind, image)) = input.split_first() else {
        return;
    };
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(image).expect("written");
    let ram = [range(0, 8 * MIB)];
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).expect("memory");
    let memory: Arc<GuestMemoryMmap> = Arc::new(memory);
    let kernel = KernelConfig {
        path: file.path().to_owned(),
        entry: if kind & 1 == 0 {
            KernelEntry::Auto
        } else {
            KernelEntry::Image
        },
        cache: None,
    };
    let payload = Payload {
        kernel: &kernel,
        initramfs: (kind & 2 != 0).then_some(file.path()),
        cmdline: "console=ttyS0",
        arenas: &[],
    };
    // Whether it can be booted is not the question.
    let _ = load(&memory, &ram, &payload, 0xe_0000);
}
