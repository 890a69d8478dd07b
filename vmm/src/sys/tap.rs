//! A tap: an Ethernet interface of the host whose other end is a descriptor (Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

/// What a frame may leave to its receiver (`TUN_F_…`, include/uapi/linux/if_tun.h).
pub mod offload {
    /// A checksum is missing.
    pub const CSUM: u32 = libc::TUN_F_CSUM;
    /// A TCP segment over IPv4 is larger than a frame.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// A TCP segment over IPv6 is.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// Such a segment may have ECN bits.
    pub const ECN: u32 = libc::TUN_F_TSO_ECN;
    /// A UDP datagram is larger than a frame, and goes out in fragments.
    pub const UFO: u32 = libc::TUN_F_UFO;
    /// A UDP buffer over IPv4 is larger than a frame, and goes out as datagrams.
    pub const USO4: u32 = libc::TUN_F_USO4;
    /// The same over IPv6. The kernel knows it only together with [`USO4`].
    pub const USO6: u32 = libc::TUN_F_USO6;
}

/// The device by which taps are opened.
const DEVICE: &str = "/dev/net/tun";

/// A tap cannot be used. The message names it and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host has no device for taps.
    #[error("{DEVICE} is missing: load the kernel's module with `modprobe tun`")]
    NoDevice,
    /// The device cannot be opened.
    #[error(
        "{DEVICE} cannot be opened: no permission; change its mode, or pass an open tap with fd="
    )]
    Closed,
    /// There is no such interface.
    #[error("tap {name} does not exist: create it with `ip tuntap add dev {name} mode tap`")]
    Missing {
        /// Its name.
        name: String,
    },
    /// Another process has it.
    #[error(
        "tap {name} is in use by another process, or twice by this one: choose another, or stop the other"
    )]
    Busy {
        /// Its name.
        name: String,
    },
    /// It belongs to somebody else.
    #[error(
        "tap {name} cannot be opened: no permission; create it with `ip tuntap add dev {name} mode tap user USER`"
    )]
    Permission {
        /// Its name.
        name: String,
    },
    /// Another kind of interface.
    #[error(
        "{name} is a network interface, but no tap: create one with `ip tuntap add dev NAME mode tap`"
    )]
    NotATap {
        /// Its name.
        name: String,
    },
    /// The process has no such descriptor.
    #[error("fd={fd}: the monitor was started without this descriptor; let it inherit an open tap")]
    NoDescriptor {
        /// Its number.
        fd: RawFd,
    },
    /// A descriptor of something else.
    #[error(
        "fd={fd} is no tap: pass {DEVICE} after TUNSETIFF with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR"
    )]
    OtherDescriptor {
        /// Its number.
        fd: RawFd,
    },
    /// Another error.
    #[error("tap {name} cannot be used: {operation} failed")]
    Io {
        /// Its name, or its descriptor.
        name: String,
        /// What was tried.
        operation: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
}

/// An open tap. Each frame that is read or written has a virtio-net header of the size that was asked for in front of it.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    supported: u32,
}

/// What has failed with the tap `name`.
fn failed(name: &str, operation: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::Io {
        name: name.to_owned(),
        operation,
        source,
    }
}

/// The device, not attached to an interface yet; it is to be the tap `name`.
fn device(name: &str) -> Result<File, TapError> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(DEVICE);
    device.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => TapError::NoDevice,
        io::ErrorKind::PermissionDenied => TapError::Closed,
        _ if source.raw_os_error() == Some(libc::ENODEV) => TapError::NoDevice,
        _ => failed(name, "open")(source),
    })
}

impl Tap {
    /// Opens the tap `name`, which must exist.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, header: usize) -> Result<Self, TapError> {
        let named = || name.to_owned();
        let failed = |operation| failed(name, operation);
        let file = device(name)?;
        // TUNSETIFF would make a new interface.
        let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None);
        let socket = socket.map_err(|errno| failed("socket")(errno.into()))?;
        name_to_index(&socket, name).map_err(|errno| match errno {
            rustix::io::Errno::NODEV => TapError::Missing { name: named() },
            _ => failed("SIOCGIFINDEX")(errno.into()),
        })?;
        let mode = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let attach = |mode| interface(file.as_fd(), libc::TUNSETIFF, name, mode);
        // An interface with several queues is opened as such only.
        attach(mode)
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => attach(mode | libc::IFF_MULTI_QUEUE),
                _ => Err(error),
            })
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy { name: named() },
                Some(libc::EPERM | libc::EACCES) => TapError::Permission { name: named() },
                Some(libc::EINVAL) => TapError::NotATap { name: named() },
                _ => failed("TUNSETIFF")(error),
            })?;
        Self::ready(file, named(), header)
    }

    /// Makes the tap `name` in the network namespace of the calling thread, for another process to [`Tap::inherit`]. It is gone
    /// when the last copy of the descriptor is closed.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn create(name: &str) -> Result<OwnedFd, TapError> {
        let file = device(name)?;
        let mode = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
        interface(file.as_fd(), libc::TUNSETIFF, name, mode).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy {
                    name: name.to_owned(),
                },
                _ => failed(name, "TUNSETIFF")(error),
            }
        })?;
        Ok(file.into())
    }

    /// Takes over a tap that another process has opened and passed on as descriptor `fd`.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn inherit(fd: RawFd, header: usize) -> Result<Self, TapError> {
        // SAFETY: the call takes a number only.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(TapError::NoDescriptor { fd });
        }
        // It may be a descriptor of the monitor's own.
        // SAFETY: it is open, and whose it is does not matter to a question.
        let (name, mode) = attached(unsafe { BorrowedFd::borrow_raw(fd) })
            .map_err(|_| TapError::OtherDescriptor { fd })?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if mode & wanted != wanted {
            return Err(TapError::OtherDescriptor { fd });
        }
        // SAFETY: the monitor has opened no tap in this way, so it was passed on, and the caller takes each number once.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let unblocked = fcntl_setfd(&file, FdFlags::CLOEXEC)
            .and_then(|()| fcntl_getfl(&file))
            .and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK));
        unblocked.map_err(|errno| TapError::Io {
            name: name.clone(),
            operation: "fcntl",
            source: errno.into(),
        })?;
        Self::ready(file, name, header)
    }

    /// The open tap, for another process to [`Tap::inherit`].
    #[must_use]
    pub fn into_descriptor(self) -> OwnedFd {
        self.file.into()
    }

    /// Sets the header, and finds out what frames may leave to their receiver.
    fn ready(file: File, name: String, header: usize) -> Result<Self, TapError> {
        let set = |operation, request, value| {
            number(file.as_fd(), request, value).map_err(|source| TapError::Io {
                name: name.clone(),
                operation,
                source,
            })
        };
        set(
            "TUNSETVNETHDRSZ",
            libc::TUNSETVNETHDRSZ,
            header as libc::c_int,
        )?;
        set("TUNSETVNETLE", libc::TUNSETVNETLE, 1)?;
        let mut tap = Self {
            file,
            name,
            supported: 0,
        };
        let tcp = offload::CSUM | offload::TSO4 | offload::TSO6 | offload::ECN;
        for more in [tcp, offload::UFO, offload::USO4 | offload::USO6] {
            if tap.try_offload(tap.supported | more).is_ok() {
                tap.supported |= more;
            }
        }
        tap.try_offload(0).map_err(|source| TapError::Io {
            name: tap.name.clone(),
            operation: "TUNSETOFFLOAD",
            source,
        })?;
        Ok(tap)
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Everything that frames may leave to their receiver, see [`offload`].
    #[must_use]
    pub const fn supported(&self) -> u32 {
        self.supported
    }

    /// Says what the frames that are read may leave to the reader: some of [`supported`](Self::supported).
    ///
    /// # Errors
    /// ioctl(2)'s.
    pub fn set_offload(&self, flags: u32) -> io::Result<()> {
        match flags & self.supported {
            // Nothing but 0 was ever set.
            0 if self.supported == 0 => Ok(()),
            flags => self.try_offload(flags),
        }
    }

    fn try_offload(&self, flags: u32) -> io::Result<()> {
        let flags = libc::c_ulong::from(flags);
        // SAFETY: TUNSETOFFLOAD takes a number.
        let rc = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, flags) };
        result(rc)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn empty() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

/// An ioctl that takes an interface's name and flags.
fn interface(fd: BorrowedFd<'_>, request: libc::Ioctl, name: &str, flags: i32) -> io::Result<()> {
    let mut argument = empty();
    // The last byte stays 0.
    let room = argument.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    room.zip(name.bytes())
        .for_each(|(to, from)| *to = from.cast_signed());
    argument.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which `argument` is.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut argument) };
    result(rc)
}

/// Name and flags of the interface that the descriptor is attached to.
fn attached(fd: BorrowedFd<'_>) -> io::Result<(String, i32)> {
    let mut argument = empty();
    // SAFETY: TUNGETIFF writes an ifreq, which `argument` is.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut argument) };
    result(rc)?;
    let bytes = argument.ifr_name.iter().take_while(|byte| **byte != 0);
    let bytes: Vec<u8> = bytes.map(|byte| byte.cast_unsigned()).collect();
    // SAFETY: TUNGETIFF has written the flags.
    let flags = unsafe { argument.ifr_ifru.ifru_flags };
    let name = String::from_utf8_lossy(&bytes).into_owned();
    Ok((name, flags.cast_unsigned().into()))
}

/// An ioctl that takes a pointer to a number.
fn number(fd: BorrowedFd<'_>, request: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ and TUNSETVNETLE read an int.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) };
    result(rc)
}

fn result(rc: libc::c_int) -> io::Result<()> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Tap {
        /// A socket in a tap's place.
        pub fn over(file: File) -> Self {
            Self {
                file,
                name: "test".to_owned(),
                supported: 0,
            }
        }
    }

    #[test]
    fn descriptors_that_are_no_tap() {
        let null = File::open("/dev/null").unwrap();
        let other = Tap::inherit(null.as_raw_fd(), 12).unwrap_err();
        assert!(matches!(other, TapError::OtherDescriptor { .. }), "{other}");
        assert!(null.metadata().is_ok(), "it stays open");
        let closed = Tap::inherit(1 << 20, 12).unwrap_err();
        assert!(matches!(closed, TapError::NoDescriptor { .. }), "{closed}");
    }
}
