//! What a running machine tells those who watch it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use ebb_harness::error::{Context, Result};
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Launch, Monitor, prometheus};
use serde_json::{Value, json};

/// The value of the first sample whose line begins with `name`.
fn value(text: &str, name: &str) -> Result<u64> {
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.context(format_args!("{name} in {text}"))
}

/// `ebb ps` and `ebb top` show the machine.
fn listed(monitor: &Monitor, ebb: &Path) -> Result<()> {
    let run = |program: &Path, words: &[&str]| -> Result<String> {
        let output = Command::new(program).args(words).output();
        let output = output.context(program.display())?;
        assert!(output.status.success(), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let listed = run(ebb, &["ps", "--json"])?;
    let listed: Value = serde_json::from_str(&listed).context(&listed)?;
    let is_it = |machine: &&Value| machine["pid"] == monitor.pid();
    let machine = listed.as_array().and_then(|all| all.iter().find(is_it));
    let machine = machine.context(&listed)?;
    assert_eq!(machine["info"]["state"], "Running");
    assert_eq!(machine["memory_bytes"], 256 << 20);
    assert_eq!(machine["balloon"]["actual_mib"], 64);
    let shown = run(ebb, &["ps"])?;
    let row = format!("{}  Running", monitor.pid());
    assert!(shown.contains(&row), "{shown}");
    // It becomes ebb-top.
    let shown = run(ebb, &["top", "--once", &monitor.pid().to_string()])?;
    assert!(
        shown.contains("1 machine") && shown.contains("lazily free"),
        "{shown}"
    );
    Ok(())
}

/// Where the machine serves its metrics over TCP.
const METRICS: &str = "127.0.0.1:9180";

/// What Prometheus gets there.
fn scrape() -> Result<String> {
    let mut stream = TcpStream::connect(METRICS).context(METRICS)?;
    let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(request).context("the request")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("the answer")?;
    Ok(answer)
}

/// What the machine has told of itself, by the kinds of events.
fn told(events: &Path) -> Result<Vec<(String, Value)>> {
    let text = fs::read_to_string(events).context(events.display())?;
    let parse = |line: &str| {
        let event: Value = serde_json::from_str(line).context(line)?;
        assert!(
            event["timestamp_ms"].is_u64() && event["machine"] == "ebb",
            "{line}"
        );
        let kind = event["event"].as_str().context(line)?;
        Ok((kind.to_owned(), event))
    };
    text.lines().map(parse).collect()
}

#[test]
fn prometheus_reads_a_machine_with_everything() -> Result<()> {
    let launch = Launch::new()?;
    let ebb = launch.images().ebb.clone();
    let socket = launch.folder().join("v");
    let disk = launch.images().root_disk.clone();
    let launch = launch
        .disk(&disk, true)
        .option("--balloon", "size=0,statistics=1,free_page_reporting=on")
        .option("--arena", "id=heap,size=64M")
        .option("--vsock", &format!("cid=3,path={}", socket.display()))
        .option("--rng", "on");
    let metrics = launch.folder().join("metrics");
    let events = launch.folder().join("events");
    let launch = launch
        .option("--metrics-path", &metrics.to_string_lossy())
        .option("--metrics-listen", METRICS)
        .option("--event-monitor", &events.to_string_lossy());
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    guest.must("dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null")?;
    let api = monitor.api();
    api.set_balloon(64 << 20)?;
    until("the balloon", LONG, || {
        Ok((api.balloon()?.actual_mib == 64).then_some(()))
    })?;
    let taken = api.reclaim(32 << 20)?.reclaimed_bytes;
    let text = api.metrics_text()?;
    prometheus::check(&["metrics"], &text)?;
    assert!(value(&text, "ebb_disk_read_bytes_total{")? >= 4 << 20);
    let scraped = scrape()?;
    assert!(scraped.starts_with("HTTP/1.1 200"), "{scraped}");
    assert!(value(&scraped, "ebb_disk_read_bytes_total{")? >= 4 << 20);
    assert!(value(&text, "ebb_resident_bytes{")? > 16 << 20, "{text}");
    assert_eq!(value(&text, "ebb_running{")?, 1);
    assert_eq!(value(&text, "ebb_memory_bytes{")?, 256 << 20);
    listed(&monitor, &ebb)?;
    // The line of the start, one on request, and one of the end; each tells what was counted since the last.
    let action = json!({ "action_type": "FlushMetrics" });
    monitor.api().must("PUT", "/actions", &action)?;
    guest.must("dd if=/dev/vda of=/dev/null bs=1M count=1 iflag=direct 2>/dev/null")?;
    monitor.api().stop()?;
    assert_eq!(monitor.wait()?, 0);
    let text = fs::read_to_string(&metrics).context(metrics.display())?;
    let read = |line: &str| -> Result<u64> {
        let line: Value = serde_json::from_str(line).context(line)?;
        line["block_disk0"]["read_bytes"].as_u64().context(line)
    };
    let read: Vec<u64> = text.lines().map(read).collect::<Result<_>>()?;
    assert!(
        matches!(*read, [_, a, b] if a >= 4 << 20 && (1 << 20..4 << 20).contains(&b)),
        "{text}"
    );
    let told = told(&events)?;
    let kinds: Vec<&str> = told.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!((kinds[0], kinds[1]), ("building", "running"), "{kinds:?}");
    let of = |kind: &str| told.iter().find(|it| it.0 == kind).map(|it| &it.1);
    assert_eq!(of("reclaim").context("a reclaim")?["bytes"], taken);
    assert_eq!(of("ending").context("the end")?["reason"], "Stop");
    let (kind, last) = &told[told.len() - 1];
    // A small machine frees its memory itself.
    let step = last["step"].as_str().context(last)?;
    assert!(kind == "teardown" && step.starts_with("memory_"), "{last}");
    Ok(())
}
