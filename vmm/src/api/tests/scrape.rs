//! `--metrics-listen`.

use std::net::{SocketAddr, TcpStream};

use super::*;
use crate::api::{listen, serve_with_metrics};

/// Sends `text`, and reads until the server closes the connection.
fn tell(address: SocketAddr, text: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    // The server may close before it has read everything.
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn metrics_and_nothing_else_are_served_over_tcp() {
    let bench = Bench::new();
    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let taken = listen(address).unwrap_err().to_string();
    assert!(taken.contains("choose another port"), "{taken}");
    let path = bench.folder.path().join("second");
    let front = Front::Machine(bench.machine.clone());
    let server = serve_with_metrics(&path, Some(listener), front).unwrap();
    server.set_machine(bench.machine.clone());

    let text = tell(address, "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(text.contains("\nebb_running{machine=\"test\"}"), "{text}");
    for request in ["GET /", "GET /vm/config", "POST /metrics", "PUT /actions"] {
        let text = tell(address, &format!("{request} HTTP/1.1\r\nHost: h\r\n\r\n"));
        assert!(text.starts_with("HTTP/1.1 404"), "{request}: {text}");
    }
    let text = tell(
        address,
        &format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000)),
    );
    assert!(!text.contains(" 200 "), "{text}");

    // Those who say nothing take no place on the socket.
    let idle: Vec<_> = (0..40)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    let version = request(&path, Method::GET, "/version", None, TIMEOUT).unwrap();
    assert!(version["vmm_version"].is_string());
    drop(server);
    drop(idle);
    assert!(TcpStream::connect(address).is_err());
}
