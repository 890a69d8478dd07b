//! Which memory of this machine the monitor says is an arena (ARENA_INFO). Other memory may be Soft Reserved, too.

use std::arch::x86_64::__cpuid;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_guest_agent::memory::{PAGE_SIZE, map_anonymous};
use ebb_hypercall_abi::stubs::{self, Transport};
use ebb_hypercall_abi::{Attributes, Features, Operation};
use rustix::mm::{MapFlags, ProtFlags};

/// CPUID leaf 1, ECX: set in virtual machines only.
const HYPERVISOR: u32 = 1 << 31;
/// I/O ports that a 32-bit read covers.
const PORTS: libc::c_ulong = 4;
/// In a word of /proc/self/pagemap: the page is there, and its number.
const PRESENT: u64 = 1 << 63;
const NUMBER: u64 = (1 << 55) - 1;

/// The guest-physical addresses of all arenas, by their numbers. Empty if the machine has none.
pub fn addresses() -> Result<Vec<u64>, String> {
    let interface = (__cpuid(1).ecx & HYPERVISOR != 0).then(stubs::discover);
    let interface = interface.flatten();
    let Some(interface) = interface.filter(|found| found.features.contains(Features::ARENA)) else {
        return Ok(Vec::new());
    };
    let Some(Transport::Port(port)) = Transport::choose(interface, false) else {
        return Err("the monitor offers no port".to_owned());
    };
    // SAFETY: touches no memory. The permission ends with this process.
    if unsafe { libc::ioperm(port.into(), PORTS, 1) } != 0 {
        let error = io::Error::last_os_error();
        return Err(format!("ioperm: {error}; run as root (CAP_SYS_RAWIO)"));
    }
    let block =
        Block::new().map_err(|error| format!("a page for ARENA_INFO: {error}; run as root"))?;
    let mut addresses = Vec::new();
    loop {
        block
            .word(0)
            .store(addresses.len() as u64, Ordering::SeqCst);
        let attributes = Attributes::new(Operation::ArenaInfo);
        // SAFETY: CPUID says that the port is Ebb's, and this process may read it. The monitor writes to the block.
        let answer = unsafe { Transport::Port(port).call(block.gpa, 1, attributes) };
        answer.map_err(|error| format!("ARENA_INFO: {error:?}"))?;
        addresses.push(block.word(2).load(Ordering::SeqCst));
        if addresses.len() as u64 >= block.word(1).load(Ordering::SeqCst) {
            return Ok(addresses);
        }
    }
}

/// A page that the kernel does not move, because a pipe holds it: the monitor writes to it by its guest-physical address.
struct Block {
    words: *const AtomicU64,
    gpa: u64,
    _pipe: (OwnedFd, OwnedFd),
}

impl Block {
    /// Takes a page. It is never unmapped, because this process ends soon.
    fn new() -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let page = map_anonymous(PAGE_SIZE, PAGE_SIZE, prot, MapFlags::PRIVATE)?;
        // SAFETY: a page of our own. The kernel gives memory to what was written.
        unsafe { page.cast::<u64>().write_volatile(0) };
        let pipe = rustix::pipe::pipe()?;
        // SAFETY: the page is never unmapped.
        let slice = unsafe { std::slice::from_raw_parts(page.cast::<u8>(), PAGE_SIZE) };
        let slices = [rustix::pipe::IoSliceRaw::from_slice(slice)];
        // SAFETY: nobody reads from the pipe.
        unsafe { rustix::pipe::vmsplice(&pipe.1, &slices, rustix::pipe::SpliceFlags::empty())? };
        let mut word = [0; 8];
        let offset = (page as u64 / PAGE_SIZE as u64) * 8;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut word, offset)?;
        let word = u64::from_le_bytes(word);
        if word & PRESENT == 0 || word & NUMBER == 0 {
            return Err(io::Error::other(
                "/proc/self/pagemap does not say where it is",
            ));
        }
        Ok(Self {
            words: page.cast(),
            gpa: (word & NUMBER) * PAGE_SIZE as u64,
            _pipe: pipe,
        })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE_SIZE / 8);
        // SAFETY: inside the page, which is never unmapped.
        unsafe { &*self.words.add(index) }
    }
}
