//! `ebb-guest note`: tells the monitor where the kernel's vmcoreinfo note is, for kernels whose driver `qemu_fw_cfg` does not.

use std::arch::x86_64::__cpuid;
use std::fs;
use std::io;
use std::process::ExitCode;

use ebb_hypercall_abi::stubs::{self, Transport};
use ebb_hypercall_abi::{Attributes, Error, Features, Operation, PAGE_SIZE, Success};

/// Where the kernel says where the note is: address and bytes, in hexadecimal (Linux, `kernel/ksysfs.c`).
const FILE: &str = "/sys/kernel/vmcoreinfo";
/// CPUID leaf 1, ECX: set in virtual machines only.
const HYPERVISOR: u32 = 1 << 31;
/// I/O ports that a 32-bit read covers.
const PORTS: libc::c_ulong = 4;

/// Runs the subcommand.
pub fn main() -> ExitCode {
    match tell() {
        Ok(release) => {
            println!("ebb reads the free lists of this kernel: {release}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("ebb-guest note: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Tells it; the kernel's release.
fn tell() -> Result<String, String> {
    let text = fs::read_to_string(FILE).map_err(|error| {
        format!("{FILE}: {error}; the kernel must be built with CONFIG_VMCORE_INFO (before Linux 6.9 CONFIG_CRASH_CORE)")
    })?;
    let (gpa, pages) =
        parse(&text).ok_or_else(|| format!("{FILE}: {text:?} is no address and size"))?;
    let port = find_port()?;
    // SAFETY: touches no memory. The permission ends with this process.
    if unsafe { libc::ioperm(port.into(), PORTS, 1) } != 0 {
        let error = io::Error::last_os_error();
        return Err(format!("ioperm: {error}; run as root (CAP_SYS_RAWIO)"));
    }
    let attributes = Attributes::new(Operation::KernelNote);
    // SAFETY: CPUID says that the port is Ebb's, and this process may read it. The call frees nothing.
    explain(unsafe { Transport::Port(port).call(gpa, pages, attributes) })?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(release.trim().to_owned())
}

/// Address and number of pages of the note.
fn parse(text: &str) -> Option<(u64, u64)> {
    let mut words = text.split_whitespace().map(|word| {
        let digits = word.strip_prefix("0x").unwrap_or(word);
        u64::from_str_radix(digits, 16).ok()
    });
    let (gpa, len) = (words.next()??, words.next()??);
    Some((gpa, len.div_ceil(PAGE_SIZE)))
}

fn find_port() -> Result<u16, String> {
    let interface = (__cpuid(1).ecx & HYPERVISOR != 0).then(stubs::discover);
    let interface = interface.flatten();
    let interface = interface.ok_or("this machine does not run under Ebb")?;
    if !interface.features.contains(Features::KERNEL_NOTE) {
        return explain(Err(Error::NoSuchCall)).map(|()| 0);
    }
    match Transport::choose(interface, false) {
        Some(Transport::Port(port)) => Ok(port),
        _ => Err("the monitor offers no port".into()),
    }
}

/// What the monitor's answer means, and what to do.
fn explain(answer: Result<Success, Error>) -> Result<(), String> {
    match answer {
        Ok(_) => Ok(()),
        Err(Error::NoSuchCall) => {
            Err("this monitor does not read free lists; its version or its options (--lazy) are the reason".into())
        }
        Err(error) => Err(format!(
            "the monitor does not use the note ({error:?}); its log says why"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_file_is_understood() {
        assert_eq!(
            parse("0x0000000004868000 1024\n"),
            Some((0x486_8000, 2)),
            "Linux 6.12"
        );
        assert_eq!(parse("4868000 1000"), Some((0x486_8000, 1)));
        for text in ["", "0x1000", "0x1000 ", "x 1", "0x1000 0x"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn refusals_say_what_to_do() {
        assert_eq!(explain(Ok(Success::Done)), Ok(()));
        let off = explain(Err(Error::NoSuchCall)).unwrap_err();
        assert!(off.contains("--lazy"), "{off}");
        let refused = explain(Err(Error::Invalid)).unwrap_err();
        assert!(refused.contains("log"), "{refused}");
    }
}
