//! Takes the balloon's driver from its device and gives it back.

use std::fs;
use std::io;
use std::path::Path;

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_balloon";

/// Unbinds and binds every balloon; their names.
pub fn rebind() -> io::Result<Vec<String>> {
    let devices = devices(Path::new(DRIVER))?;
    for device in &devices {
        fs::write(format!("{DRIVER}/unbind"), device)?;
        fs::write(format!("{DRIVER}/bind"), device)?;
    }
    Ok(devices)
}

/// The devices that a driver is bound to.
fn devices(driver: &Path) -> io::Result<Vec<String>> {
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
            "no balloon is bound",
        ));
    }
    Ok(names)
}
