//! readv(2) and writev(2) on guest memory.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// The most pieces that one call moves (`UIO_MAXIOV`, include/uapi/linux/uio.h).
pub const MOST: usize = 1024;

/// The list of pieces for one call. It is kept so that a call allocates nothing; between calls it is empty.
#[derive(Default)]
pub struct Vectors(Vec<libc::iovec>);

impl Vectors {
    /// Room for as many pieces as a call can have.
    #[must_use]
    pub fn new() -> Self {
        Self(Vec::with_capacity(MOST))
    }

    /// Reads into `guest`, what does not fit there into `rest`, and no more. At most [`MOST`] pieces in all.
    ///
    /// # Errors
    /// readv(2)'s.
    pub fn read<'a, 'm: 'a>(
        &mut self,
        from: BorrowedFd<'_>,
        guest: impl Iterator<Item = &'a VolatileSlice<'m>>,
        rest: &mut [u8],
    ) -> io::Result<usize> {
        self.0.extend(guest.map(piece));
        self.0.push(libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        });
        let count = self.0.len() as libc::c_int;
        // SAFETY: each piece is memory that is borrowed until this function returns: guest memory, to which there are no
        // references, or `rest`, which is borrowed mutably. The kernel writes nowhere else, and refuses too many pieces.
        let moved = unsafe { libc::readv(from.as_raw_fd(), self.0.as_ptr(), count) };
        self.0.clear();
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Writes all of `guest`, at most [`MOST`] pieces.
    ///
    /// # Errors
    /// writev(2)'s.
    pub fn write<'a, 'm: 'a>(
        &mut self,
        to: BorrowedFd<'_>,
        guest: impl Iterator<Item = &'a VolatileSlice<'m>>,
    ) -> io::Result<usize> {
        self.0.extend(guest.map(piece));
        let count = self.0.len() as libc::c_int;
        // SAFETY: each piece is guest memory that is borrowed until this function returns. The kernel only reads it, and
        // refuses too many pieces.
        let moved = unsafe { libc::writev(to.as_raw_fd(), self.0.as_ptr(), count) };
        self.0.clear();
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }
}

fn piece(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn one_message_is_cut_into_pieces_and_put_together() {
        let (one, other) = UnixDatagram::pair().unwrap();
        let (mut left, mut right) = ([1_u8, 2, 3], [4_u8, 5]);
        let mut vectors = Vectors::new();
        let slices = [
            VolatileSlice::from(&mut left[..]),
            VolatileSlice::from(&mut right[..]),
        ];
        assert_eq!(vectors.write(one.as_fd(), slices.iter()).unwrap(), 5);
        let (mut near, mut rest) = ([0_u8; 2], [0_u8; 8]);
        let slice = VolatileSlice::from(&mut near[..]);
        let read = vectors.read(other.as_fd(), [slice].iter(), &mut rest);
        assert_eq!(read.unwrap(), 5);
        assert_eq!((near, &rest[..4]), ([1, 2], &[3, 4, 5, 0][..]));
    }

    #[test]
    fn errors_leave_nothing_behind() {
        let (one, _other) = UnixDatagram::pair().unwrap();
        one.set_nonblocking(true).unwrap();
        let mut vectors = Vectors::new();
        let read = vectors.read(one.as_fd(), [].iter(), &mut [0; 4]);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(vectors.0.is_empty());
    }
}
