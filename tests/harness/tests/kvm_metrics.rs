//! What a running machine tells those who watch it.

use ebb_harness::error::{Context, Result};
use ebb_harness::{Launch, promtool};

/// The value of the first sample whose line begins with `name`.
fn value(text: &str, name: &str) -> Result<u64> {
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.context(format_args!("{name} in {text}"))
}

#[test]
fn prometheus_reads_a_machine_with_everything() -> Result<()> {
    let launch = Launch::new()?;
    let disk = launch.images().root_disk.clone();
    let launch = launch
        .disk(&disk, true)
        .option("--balloon", "size=0,statistics=1,free_page_reporting=on")
        .option("--arena", "id=heap,size=64M")
        .option(
            "--vsock",
            &format!("cid=3,path={}", launch.folder().join("v").display()),
        )
        .option("--rng", "on");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    guest.must("dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null")?;
    let text = monitor.api().metrics_text()?;
    promtool::check(&["metrics"], &text)?;
    assert!(value(&text, "ebb_disk_read_bytes_total{")? >= 4 << 20);
    assert!(value(&text, "ebb_resident_bytes{")? > 16 << 20, "{text}");
    assert_eq!(value(&text, "ebb_running{")?, 1);
    assert_eq!(value(&text, "ebb_memory_bytes{")?, 256 << 20);
    monitor.api().stop()?;
    assert_eq!(monitor.wait()?, 0);
    Ok(())
}
