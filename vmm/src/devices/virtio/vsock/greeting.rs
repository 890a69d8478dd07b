//! What a client of the host says first: `CONNECT port\n`, as with Firecracker.

use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// The longest line, its end included. More than `CONNECT 4294967295\r\n` needs.
const LONGEST: usize = 32;

/// The beginning of the line.
#[derive(Default)]
pub struct Greeting {
    line: [u8; LONGEST],
    len: usize,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeted {
    /// There is more to come.
    Waiting,
    /// The client wants this port of the guest.
    Port(u32),
    /// It is gone, or says something else.
    Over,
}

impl Greeting {
    /// Reads what there is of the line, and nothing behind it.
    pub fn read(&mut self, stream: &UnixStream) -> Greeted {
        const LOOK: RecvFlags = RecvFlags::PEEK.union(RecvFlags::DONTWAIT);
        loop {
            let Some(space) = self.line.get_mut(self.len..).filter(|it| !it.is_empty()) else {
                return Greeted::Over;
            };
            let seen = match recv(stream, &mut *space, LOOK) {
                Ok((0, _)) => return Greeted::Over,
                Ok((seen, _)) => seen,
                Err(Errno::AGAIN) => return Greeted::Waiting,
                Err(Errno::INTR) => continue,
                Err(_) => return Greeted::Over,
            };
            let line = space.get(..seen).unwrap_or_default();
            let end = line.iter().position(|byte| *byte == b'\n');
            let wanted = end.map_or(seen, |end| end + 1);
            let space = space.get_mut(..wanted).unwrap_or_default();
            // They were just there, and nobody else reads them.
            match recv(stream, space, RecvFlags::DONTWAIT) {
                Ok((read, _)) => self.len += read,
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(_) => return Greeted::Over,
            }
            if end.is_some() {
                let port = self.line.get(..self.len).and_then(port_of);
                return port.map_or(Greeted::Over, Greeted::Port);
            }
        }
    }
}

fn port_of(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (verb, port) = (words.next()?, words.next()?);
    let is_request = verb.eq_ignore_ascii_case("connect") && words.next().is_none();
    port.parse()
        .ok()
        .filter(|_| is_request && !port.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn greet(pieces: &[&str]) -> (Greeted, String) {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (mut greeting, mut greeted) = (Greeting::default(), Greeted::Waiting);
        for piece in pieces {
            assert_eq!(greeted, Greeted::Waiting, "{pieces:?}");
            client.write_all(piece.as_bytes()).unwrap();
            greeted = greeting.read(&server);
        }
        drop(client);
        let mut rest = String::new();
        (&server).read_to_string(&mut rest).unwrap();
        (greeted, rest)
    }

    #[test]
    fn a_line_names_the_port_and_nothing_behind_it_is_read() {
        for (pieces, port, rest) in [
            (&["CONNECT 52\nGET /\n"][..], 52, "GET /\n"),
            (&["CON", "NECT ", "4294967295", "\n"], u32::MAX, ""),
            (&["connect 1\r\n\n"], 1, "\n"),
        ] {
            assert_eq!(greet(pieces), (Greeted::Port(port), rest.to_owned()));
        }
    }

    #[test]
    fn what_is_no_request_ends_it() {
        for text in [
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "LISTEN 1\n",
            "\n",
            "CONNECT 1                                              \n",
        ] {
            assert_eq!(greet(&[text]).0, Greeted::Over, "{text:?}");
        }
        let (client, server) = UnixStream::pair().unwrap();
        let mut greeting = Greeting::default();
        assert_eq!(greeting.read(&server), Greeted::Waiting);
        drop(client);
        assert_eq!(greeting.read(&server), Greeted::Over);
    }
}
