//! The way from the API's threads to the first thread while the machine is not started: that thread owns what clients have
//! asked for so far, and opens the files that they name. The threads of the API may not do that.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use hyper::Method;
use hyper::body::Bytes;
use rustix::event::{EventfdFlags, eventfd};

use super::routes::{Fault, Reply};

/// A request to a machine that is not started.
pub struct Ask {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) body: Bytes,
    answer: Sender<Result<Reply, Fault>>,
}

impl Ask {
    /// Answers it. Nobody may be there any more who wants to know.
    pub fn answer(self, answer: Result<Reply, Fault>) {
        let _ = self.answer.send(answer);
    }
}

/// The API's end.
#[derive(Clone)]
pub struct Asker {
    asks: Sender<Ask>,
    wake: Arc<OwnedFd>,
}

/// The end of the thread that answers. When it is dropped the machine is started, or will never be.
pub struct Asks {
    asks: Receiver<Ask>,
    wake: Arc<OwnedFd>,
}

/// Makes both ends.
///
/// # Errors
/// eventfd(2)'s.
pub fn waiting() -> io::Result<(Asker, Asks)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let (sender, asks) = mpsc::channel();
    let asker = Asker {
        asks: sender,
        wake: Arc::clone(&wake),
    };
    Ok((asker, Asks { asks, wake }))
}

impl Asker {
    /// Asks, and waits for the answer; `None` if there is nobody any more who answers.
    pub(super) fn ask(
        &self,
        method: Method,
        path: String,
        body: Bytes,
    ) -> Option<Result<Reply, Fault>> {
        let (answer, answered) = mpsc::channel();
        let ask = Ask {
            method,
            path,
            body,
            answer,
        };
        self.asks.send(ask).ok()?;
        // It fails only if it would overflow, and then the other side is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        answered.recv().ok()
    }
}

impl Asks {
    /// The next request, if there is one.
    pub fn take(&self) -> Option<Ask> {
        let ask = self.asks.try_recv().ok();
        if ask.is_none() {
            // A request that comes now makes it readable again.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        ask.or_else(|| self.asks.try_recv().ok())
    }
}

impl AsFd for Asks {
    /// Readable when there may be a request.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
