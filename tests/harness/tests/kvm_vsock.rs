//! virtio-vsock with the stock driver and a stock program of the guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use ebb_harness::debian::Debian;
use ebb_harness::error::{Context, Result};
use ebb_harness::network::connect_through;
use ebb_harness::refusal::Bench;
use ebb_harness::size::MIB;
use ebb_harness::taker::Taker;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Images, Launch};
use rustix::process::Signal;

const BYTES: usize = 64 << 20;
const SERVER: &str = "python3 /tmp/vsock.py serve";

/// The bytes that `vsock.py` sends.
fn content(count: usize) -> Vec<u8> {
    let pattern: Vec<u8> = (0..65521_usize)
        .map(|at| (at * 7 + at / 251) as u8)
        .collect();
    pattern.into_iter().cycle().take(count).collect()
}

/// Checksum (RFC 1950, 9) and number of bytes, as `vsock.py` prints them.
fn summed(content: &[u8]) -> String {
    let (mut a, mut b) = (1_u32, 0_u32);
    for chunk in content.chunks(5552) {
        for byte in chunk {
            a += u32::from(*byte);
            b += a;
        }
        (a, b) = (a % 65521, b % 65521);
    }
    format!("{:08x} {}", b << 16 | a, content.len())
}

struct Rig {
    debian: Debian,
    path: PathBuf,
}

impl Rig {
    fn start() -> Result<Self> {
        let launch = Launch::new()?;
        let path = launch.folder().join("vsock");
        let option = format!("cid=77,path={}", path.display());
        let launch = launch.memory("size=512M").option("--vsock", &option);
        let debian = Debian::boot(launch.option("--balloon", "size=0"))?;
        Ok(Self { debian, path })
    }

    /// Has the guest serve at `port`; returns when it does.
    fn serve(&mut self, port: u32) -> Result<()> {
        let debian = Debian::path("");
        let command = format!("chroot {debian} {SERVER} {port} >/dev/null 2>&1 &");
        self.debian.guest.must(&command)?;
        until("a server in the guest", LONG, || {
            Ok(self.connect(port).ok())
        })?;
        Ok(())
    }

    /// A connection of the host to `port` of the guest.
    fn connect(&self, port: u32) -> Result<UnixStream> {
        connect_through(&self.path, port)
    }

    fn listen(&self, port: u32) -> Result<UnixListener> {
        let path = format!("{}_{port}", self.path.display());
        UnixListener::bind(&path).context(path)
    }

    fn run(&mut self, words: &str) -> Result<String> {
        self.debian.run(&format!("python3 /tmp/vsock.py {words}"))
    }

    fn counter(&self, name: &str) -> Result<u64> {
        let devices = self.debian.monitor.api().get("/devices")?;
        let value = devices["vsock"][name].as_u64();
        value.context(format!("{name} in {devices}"))
    }
}

/// Sends `content` and its end, and returns the answer.
fn exchange(mut stream: UnixStream, content: &[u8]) -> Result<String> {
    stream.write_all(content).context("send")?;
    stream.shutdown(Shutdown::Write).context("send")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("receive")?;
    Ok(answer)
}

#[test]
fn guest_and_host_talk_both_ways() -> Result<()> {
    let mut rig = Rig::start()?;
    assert_eq!(rig.run("cid")?, "77");
    let config = rig.debian.monitor.api().get("/vm/config")?;
    assert_eq!(config["vsock"]["guest_cid"], 77);
    let content = content(BYTES);
    let sum = summed(&content);
    rig.serve(5000)?;

    // Host to guest and back, each with a half that is closed first. Much of it lands in memory that was taken a moment ago.
    let taker = Taker::start(rig.debian.monitor.api(), 128 * MIB);
    let asked = [b"sum\n", &content[..]].concat();
    assert_eq!(exchange(rig.connect(5000)?, &asked)?, sum);
    let mut stream = rig.connect(5000)?;
    stream
        .write_all(format!("give {BYTES}\n").as_bytes())
        .context("ask")?;
    let mut given = Vec::new();
    stream.read_to_end(&mut given).context("receive")?;
    assert!(given == content, "{} bytes", given.len());
    taker.end()?;

    // Guest to host and back.
    let content = content[..BYTES / 8].to_vec();
    let server = rig.listen(6000)?;
    let expected = content.clone();
    let served = thread::spawn(move || -> Result<()> {
        let (mut stream, _) = server.accept().context("accept")?;
        let mut sent = Vec::new();
        stream.read_to_end(&mut sent).context("receive")?;
        assert!(sent == expected, "{} bytes", sent.len());
        stream.write_all(b"all is there").context("answer")?;
        drop(stream);
        let (mut stream, _) = server.accept().context("accept")?;
        stream.write_all(&expected).context("send")
    });
    let few = content.len();
    assert_eq!(rig.run(&format!("sum 6000 {few}"))?, "all is there");
    assert_eq!(rig.run("get 6000")?, summed(&content));
    served.join().expect("the server")?;
    let (status, said) = rig.debian.guest.shell(&format!(
        "chroot {} python3 /tmp/vsock.py get 6001 2>&1",
        Debian::path("")
    ))?;
    assert!(status != "0" && said.contains("reset"), "{status} {said}");

    for (name, least) in [
        ("host_connections_total", 3),
        ("guest_connections_total", 2),
        ("rx_bytes_total", (BYTES + BYTES / 8) as u64),
        ("tx_bytes_total", (BYTES + BYTES / 8) as u64),
    ] {
        let value = rig.counter(name)?;
        assert!(value >= least, "{name}: {value}");
    }
    assert_eq!(rig.counter("errors_total")?, 0);
    let path = rig.path.clone();
    rig.debian.end()?;
    assert!(!path.exists(), "the socket is left");
    Ok(())
}

#[test]
fn connections_end_with_whoever_ends_first() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.serve(5000)?;
    // Many at once, all of them open before the first is used.
    let streams: Result<Vec<_>> = (0..100).map(|_| rig.connect(5000)).collect();
    thread::scope(|scope| {
        let all: Vec<_> = streams?
            .into_iter()
            .enumerate()
            .map(|(number, stream)| {
                scope.spawn(move || {
                    let part = content(10_000 + 1000 * number);
                    let answer = exchange(stream, &[b"sum\n", &part[..]].concat())?;
                    assert_eq!(answer, summed(&part));
                    Ok(())
                })
            })
            .collect();
        all.into_iter()
            .try_for_each(|it| it.join().expect("a client"))
    })?;

    // A client that vanishes in the middle, and one that never reads.
    let mut stream = rig.connect(5000)?;
    stream.write_all(b"give 1000000000\n").context("ask")?;
    stream.read_exact(&mut [0; 100_000]).context("receive")?;
    drop(stream);
    let mut stuck = rig.connect(5000)?;
    stuck.write_all(b"give 100000000\n").context("ask")?;
    let part = content(100_000);
    let asked = [b"sum\n", &part[..]].concat();
    assert_eq!(exchange(rig.connect(5000)?, &asked)?, summed(&part));

    // The program in the guest is killed; what has come by then is still there.
    rig.debian.guest.must("killall -9 python3")?;
    let mut rest = Vec::new();
    stuck.read_to_end(&mut rest).context("receive")?;
    assert!(rest == content(rest.len()), "{} bytes", rest.len());
    assert!(rig.connect(5000).is_err(), "nobody listens");

    // The driver goes and comes back.
    rig.serve(5001)?;
    let mut open = rig.connect(5001)?;
    rig.debian.guest.must(
        "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport && device=$(echo virtio*) && \
         echo $device >unbind && echo $device >bind",
    )?;
    assert_eq!(open.read(&mut [0; 1]).context("receive")?, 0);
    assert_eq!(exchange(rig.connect(5001)?, &asked)?, summed(&part));
    until("all connections end", LONG, || {
        let opened = rig.counter("host_connections_total")?;
        Ok((rig.counter("closed_total")? >= opened).then_some(()))
    })?;

    // The guardian removes the socket of a killed monitor.
    rig.debian.monitor.signal(Signal::KILL)?;
    until("the socket is removed", LONG, || {
        Ok((!rig.path.exists()).then_some(()))
    })
}

#[test]
fn what_is_no_vsock_is_refused() -> Result<()> {
    let bench = Bench::new()?;
    let kernel = Images::from_environment()?.vmlinuz;
    let kernel = kernel.to_string_lossy().into_owned();
    let refused = |vsock: &str, parts: &[&str]| {
        bench.run_refused(&["--kernel", &kernel, "--vsock", vsock], parts)
    };
    refused("cid=2,path=v", &["cid=2", "choose 3 to 4294967294"])?;
    refused("cid=4294967296,path=v", &["cid=4294967296", "at most"])?;
    refused("cid=3", &["path is missing"])?;
    refused(
        "cid=3,path=none/v",
        &["--vsock", "there is no folder", "create it"],
    )?;
    let long = "x".repeat(100);
    refused(&format!("cid=3,path={long}"), &["at most 96", "shorter"])?;
    bench.file("file", b"")?;
    refused("cid=3,path=file", &["is there already, and no socket"])?;
    let taken = bench.path("taken");
    let _server = UnixListener::bind(&taken).context("bind")?;
    refused("cid=3,path=taken", &["a running server has this socket"])?;
    assert!(is_served(&taken), "somebody else's socket");
    Ok(())
}

fn is_served(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}
