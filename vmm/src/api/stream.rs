//! A client's connection. hyper closes one in HTTP/1.0 after an answer, as the protocol wants it; Firecracker's server does not,
//! and its clients in that version (firecracker-rs-sdk) go on with the connection. So a request in HTTP/1.0 is read as one in 1.1.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

/// How a request line in the older version ends.
const OLD: &[u8] = b" HTTP/1.0";

/// A connection on which requests in HTTP/1.0 need not end it.
pub(super) struct Stream {
    inner: UnixStream,
    /// Requests in HTTP/1.0 are read as ones in 1.1.
    renews: bool,
    /// What is read next begins a request: nothing was read yet, or something was written since.
    is_at_start: bool,
}

impl Stream {
    /// `renews`: a request in HTTP/1.0 does not end it.
    pub const fn new(inner: UnixStream, renews: bool) -> Self {
        Self {
            inner,
            renews,
            is_at_start: true,
        }
    }
}

/// Changes the version of the request that `bytes` begin with. A request line that comes in pieces stays as it is, and so does a
/// body, which begins with a brace.
fn renew(bytes: &mut [u8]) {
    let end = bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
    let Some(line) = end.and_then(|end| bytes.get_mut(..end)) else {
        return;
    };
    if line.first().is_some_and(u8::is_ascii_uppercase)
        && line.ends_with(OLD)
        && let Some(minor) = line.last_mut()
    {
        *minor = b'1';
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        if std::mem::take(&mut self.is_at_start) && self.renews {
            renew(buffer.filled_mut().get_mut(before..).unwrap_or_default());
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.is_at_start = true;
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.is_at_start = true;
        Pin::new(&mut self.inner).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_version_of_a_whole_request_line_changes() {
        for (read, expected) in [
            ("GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"),
            ("PUT /vm HTTP/1.0\nA: b\n", "PUT /vm HTTP/1.1\nA: b\n"),
            ("GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\n"),
            ("GET / HTTP/1.0", "GET / HTTP/1.0"),
            ("GET / HTTP/1.0 \r\n", "GET / HTTP/1.0 \r\n"),
            ("{\"a\": 1} HTTP/1.0\r\n", "{\"a\": 1} HTTP/1.0\r\n"),
            ("\r\n", "\r\n"),
            ("", ""),
        ] {
            let mut bytes = read.as_bytes().to_vec();
            renew(&mut bytes);
            assert_eq!(String::from_utf8_lossy(&bytes), expected);
        }
    }
}
