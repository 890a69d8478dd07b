//! Clients with one connection for the whole life of a machine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::{Bench, TIMEOUT};
use crate::api::admission::MAX_CONNECTIONS;
use crate::api::server::CROWDED_TIMEOUT;

/// A connection, and a request that is made on it again and again.
struct Client {
    stream: UnixStream,
    request: &'static str,
}

impl Client {
    fn new(bench: &Bench, request: &'static str) -> Self {
        let stream = UnixStream::connect(bench.socket()).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self { stream, request }
    }

    /// The answer; nothing if the server has ended the connection.
    fn ask(&mut self) -> String {
        let mut answer = [0; 1024];
        let sent = self.stream.write_all(self.request.as_bytes());
        let read = sent.and_then(|()| self.stream.read(&mut answer));
        String::from_utf8_lossy(&answer[..read.unwrap_or(0)]).into_owned()
    }
}

/// Firecracker's server keeps connections in HTTP/1.0 open, and firecracker-rs-sdk depends on that.
#[test]
fn a_connection_lasts_as_long_as_nobody_wants_its_place() {
    let (own, firecrackers) = (Bench::new(), Bench::of(true));
    let mut clients = [
        Client::new(&own, "GET /version HTTP/1.1\r\n\r\n"),
        Client::new(&firecrackers, "GET /version HTTP/1.0\r\n\r\n"),
    ];
    for round in 0..2 {
        for client in &mut clients {
            let answer = client.ask();
            assert!(answer.starts_with("HTTP/1.1 200"), "{round}: {answer:?}");
        }
        if round == 0 {
            // Nothing must happen in this time.
            std::thread::sleep(4 * CROWDED_TIMEOUT);
        }
    }
    // It goes when others want it.
    let others: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| Client::new(&own, ""))
        .collect();
    let mut rest = String::new();
    clients[0].stream.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), others.len()), ("", MAX_CONNECTIONS));
}

/// As everywhere else, a connection in HTTP/1.0 ends with its first answer.
#[test]
fn http_1_0_ends_with_an_answer() {
    let bench = Bench::new();
    let mut client = Client::new(&bench, "GET /version HTTP/1.0\r\n\r\n");
    assert!(client.ask().starts_with("HTTP/1.0 200"));
    assert_eq!(client.ask(), "");
}
