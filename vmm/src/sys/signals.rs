//! Signals from operators and supervisors, as a descriptor that can be polled (signalfd(2)).

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Signals that are read. One that was ignored when the program was started, as nohup(1) does, stays ignored.
const SIGNALS: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Signals that stop a program in the background which uses its terminal. With these blocked its output goes on, and
/// it gets no input.
const JOB_CONTROL: [libc::c_int; 2] = [libc::SIGTTOU, libc::SIGTTIN];

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// SIGTERM, SIGINT or SIGQUIT, and SIGHUP where it ends the machine: the end.
    End,
    /// SIGHUP: the log begins a new file, or the terminal is gone.
    HangUp,
}

/// The signals of this process that ask for something, blocked and turned into readable events.
pub struct Signals {
    file: File,
    hang_up: Request,
}

impl Signals {
    /// Blocks SIGTERM, SIGINT, SIGHUP and SIGQUIT, unless they are ignored, in the calling thread, and so in the threads that
    /// it starts from now on; and those of job control. SIGHUP asks for `hang_up`.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn block(hang_up: Request) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initializes the set before anything reads it; the other calls get that
        // set, valid signal numbers, and a null pointer where the old mask is not wanted.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in SIGNALS.into_iter().filter(|signal| !is_ignored(*signal)) {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let mut job_control = std::mem::zeroed();
            libc::sigemptyset(&raw mut job_control);
            for signal in JOB_CONTROL {
                libc::sigaddset(&raw mut job_control, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const job_control, ptr::null_mut());
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
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file, hang_up })
    }

    /// Another descriptor of the same signals: whoever takes one first has it.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn try_clone(&self) -> io::Result<Self> {
        let (file, hang_up) = (self.file.try_clone()?, self.hang_up);
        Ok(Self { file, hang_up })
    }

    /// Returns true if there is one that nobody has taken.
    #[must_use]
    pub fn are_pending(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    /// What the next signal that has arrived asks for, if there is one.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn take(&self) -> io::Result<Option<Request>> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match (&self.file).read(&mut info) {
            // The signal's number is the first field.
            Ok(n) if n >= 4 => {
                let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                Ok(Some(match number {
                    libc::SIGHUP => self.hang_up,
                    _ => Request::End,
                }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Returns true if this process ignores the signal.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: sigaction only writes the action that is in force to `action`, of which all zeroes are a value.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
