//! Rebinds the balloon driver, which resets its device.

use std::fs;
use std::io;
use std::path::Path;

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_balloon";

/// Unbinds and binds the driver of every balloon. Returns the devices' names.
pub fn rebind() -> io::Result<Vec<String>> {
    let devices = bound_devices(Path::new(DRIVER))?;
    for device in &devices {
        fs::write(format!("{DRIVER}/unbind"), device)?;
        fs::write(format!("{DRIVER}/bind"), device)?;
    }
    Ok(devices)
}

fn bound_devices(driver: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(driver)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name
            .strip_prefix("virtio")
            .is_some_and(|n| n.parse::<u32>().is_ok())
        {
            names.push(name);
        }
    }
    if names.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "no balloon device is bound to virtio_balloon; start the machine with --balloon",
        ));
    }
    Ok(names)
}
