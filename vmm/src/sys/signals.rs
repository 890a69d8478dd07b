//! Termination signals as a descriptor that can be polled (signalfd(2)).

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr;

/// The signals by which an operator or a supervisor ends a program.
const SIGNALS: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// The termination signals of this process, blocked and turned into readable events.
pub struct TerminationSignals(File);

impl TerminationSignals {
    /// Blocks SIGTERM, SIGINT, SIGHUP and SIGQUIT in the calling thread, and so in the threads that it
    /// starts from now on.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initializes the set before anything reads it; the other calls get that
        // set, valid signal numbers, and a null pointer where the old mask is not wanted.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in SIGNALS {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and nobody else has it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The number of the next signal that has arrived, if any.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn take(&mut self) -> io::Result<Option<u32>> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match self.0.read(&mut info) {
            // The signal's number is the first field.
            Ok(n) if n >= 4 => Ok(Some(u32::from_ne_bytes([
                info[0], info[1], info[2], info[3],
            ]))),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for TerminationSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
