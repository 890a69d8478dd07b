//! Handles page faults of this process, including those that the kernel takes for KVM (userfaultfd(2)).

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_THREAD_ID, UFFD_PAGEFAULT_FLAG_WRITE,
    UFFDIO_REGISTER_MODE_MISSING, uffd_msg, uffdio_api, uffdio_range, uffdio_register,
    uffdio_zeropage,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_ZEROPAGE,
};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

use super::Mapping;

/// Size in bytes of the pages that faults are about.
const PAGE: usize = 4096;

/// `USERFAULTFD_IOC_NEW` of /dev/userfaultfd: `_IO(0xAA, 0)`.
const NEW: libc::c_ulong = 0xaa00;

/// A thread that waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Address of the page in this process.
    pub address: usize,
    /// True if the thread writes, false if it reads.
    pub write: bool,
    /// Number of the thread: one of this process, or of the kernel's that work for it.
    pub thread: i32,
}

/// Page faults on missing pages of the mappings that were given to [`Userfault::watch`]. When this value is dropped, the
/// threads that wait get their pages from the kernel, and later faults are not reported.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Opens a descriptor that reports faults of the kernel, too: by the system call, which needs `CAP_SYS_PTRACE` or
    /// `vm.unprivileged_userfaultfd=1`, else by /dev/userfaultfd (Linux 6.1), which needs write permission on it.
    ///
    /// # Errors
    /// `EPERM` if neither is allowed, `ENOSYS` if the kernel has no userfaultfd, `EINVAL` before Linux 4.14.
    pub fn open() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: no memory is registered yet; `watch` says what may be.
        let fd = match unsafe { rustix::mm::userfaultfd(flags) } {
            Err(Errno::PERM) => open_device().map_err(|_| Errno::PERM)?,
            opened => opened?,
        };
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: UFFD_FEATURE_THREAD_ID.into(),
            ioctls: 0,
        };
        let opened = Self { fd };
        opened.ioctl(UFFDIO_API, &mut api)?;
        Ok(opened)
    }

    /// From now on a thread that touches a missing page of `mapping` waits until [`Userfault::zero`] or
    /// [`Userfault::wake`] is called for that page.
    ///
    /// # Errors
    /// Those of ioctl_userfaultfd(2).
    pub fn watch(&self, mapping: &Mapping) -> io::Result<()> {
        self.watch_part(mapping, 0, mapping.len())
    }

    /// As [`Userfault::watch`], for whole pages from `offset` on.
    ///
    /// # Errors
    /// As for [`Userfault::watch`]; `EINVAL` also for a part that leaves the mapping.
    pub fn watch_part(&self, mapping: &Mapping, offset: usize, len: usize) -> io::Result<()> {
        let mut register = uffdio_register {
            range: part(mapping, offset, len)?,
            mode: UFFDIO_REGISTER_MODE_MISSING.into(),
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)
    }

    /// Wakes the threads that wait for pages of `mapping`, which is not watched any more: what is missing is zero.
    ///
    /// # Errors
    /// As for [`Userfault::watch`].
    pub fn unwatch(&self, mapping: &Mapping) -> io::Result<()> {
        let mut all = range(mapping.address(), mapping.len());
        self.ioctl(UFFDIO_UNREGISTER, &mut all)
    }

    /// The next thread that waits, or `None` if none does. The descriptor polls readable when one does.
    ///
    /// # Errors
    /// Those of read(2); `InvalidData` for an unexpected message.
    pub fn next(&self) -> io::Result<Option<Fault>> {
        let mut bytes = [0u8; size_of::<uffd_msg>()];
        match rustix::io::read(&self.fd, &mut bytes) {
            Ok(len) if len == bytes.len() => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
        }
        // A message's first byte is its event; a fault's flags, address and thread follow at `arg`.
        let word = |index: usize| {
            let at = offset_of!(uffd_msg, arg) + index * size_of::<u64>();
            let (word, _) = bytes[at..].as_chunks();
            u64::from_ne_bytes(word[0])
        };
        if u32::from(bytes[0]) != UFFD_EVENT_PAGEFAULT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let address = usize::try_from(word(1)).map_err(|_| Errno::INVAL)?;
        Ok(Some(Fault {
            address: address / PAGE * PAGE,
            write: word(0) & u64::from(UFFD_PAGEFAULT_FLAG_WRITE) != 0,
            thread: (word(2) as u32).cast_signed(),
        }))
    }

    /// Puts a page of zeroes at `offset` of a watched mapping, if there is no page yet, and wakes the threads that wait
    /// for it.
    ///
    /// # Errors
    /// Those of ioctl_userfaultfd(2); `EINVAL` also for an offset outside of the mapping.
    pub fn zero(&self, mapping: &Mapping, offset: usize) -> io::Result<()> {
        let mut page = uffdio_zeropage {
            range: page(mapping, offset)?,
            mode: 0,
            zeropage: 0,
        };
        loop {
            match self.ioctl(UFFDIO_ZEROPAGE, &mut page) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    std::thread::yield_now();
                }
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    return self.wake(mapping, offset);
                }
                result => return result,
            }
        }
    }

    /// Wakes the threads that wait for the page at `offset` of a watched mapping.
    ///
    /// # Errors
    /// As for [`Userfault::zero`].
    pub fn wake(&self, mapping: &Mapping, offset: usize) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut page(mapping, offset)?)
    }

    /// Wakes the threads that wait for a page of this part, whole pages, whether it is still watched or not.
    ///
    /// # Errors
    /// As for [`Userfault::watch_part`].
    pub fn wake_part(&self, mapping: &Mapping, offset: usize, len: usize) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut part(mapping, offset, len)?)
    }

    fn ioctl<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        let (fd, argument) = (self.fd.as_raw_fd(), &raw mut *argument);
        // SAFETY: each request in this file gets the structure that it is defined with. The only memory that changes is
        // that of a `Mapping`, to whose bytes nobody holds references: pages appear where they are missing.
        match unsafe { libc::ioctl(fd, request.into(), argument.cast::<c_void>()) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the request takes a number and makes a descriptor.
    match unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the descriptor is new, so nobody else owns it.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

fn page(mapping: &Mapping, offset: usize) -> io::Result<uffdio_range> {
    part(mapping, offset / PAGE * PAGE, PAGE)
}

fn part(mapping: &Mapping, offset: usize, len: usize) -> io::Result<uffdio_range> {
    match offset.checked_add(len) {
        Some(end) if end <= mapping.len() => Ok(range(mapping.address() + offset, len)),
        _ => Err(Errno::INVAL.into()),
    }
}

const fn range(start: usize, len: usize) -> uffdio_range {
    uffdio_range {
        start: start as u64,
        len: len as u64,
    }
}
