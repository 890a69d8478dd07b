//! Extracts the ELF kernel from a bzImage (Documentation/arch/x86/boot.rst, protocol 2.08).

use ebb_pod_image::modules::unxz;

use crate::error::{Context, Error, Result};

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Maximum size of an unpacked kernel, in bytes.
const MAX_KERNEL: usize = 1 << 30;

const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];

/// The ELF image inside `bzimage`, decompressed.
///
/// # Errors
/// If the file is not a bzImage, too old, truncated, or compressed by other means than zstd or xz.
pub fn unpack(bzimage: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(bzimage)?;
    let elf = if payload.starts_with(ZSTD) {
        // The kernel's build appends the unpacked size to the frame.
        let length = payload.len() - 4;
        let size = u32_at(payload, length)? as usize;
        if size > MAX_KERNEL {
            return Err(Error::new(format!(
                "the kernel claims {size} bytes unpacked"
            )));
        }
        zstd::bulk::decompress(&payload[..length], size)
            .context(|| "unpack the zstd frame".into())?
    } else if payload.starts_with(XZ) {
        unxz(payload)?
    } else {
        let magic = &payload[..payload.len().min(6)];
        return Err(Error::new(format!(
            "unknown compression of the kernel, magic {magic:02x?}"
        )));
    };
    if !elf.starts_with(b"\x7fELF") {
        return Err(Error::new("the kernel inside the bzImage is no ELF file"));
    }
    Ok(elf)
}

fn payload(bzimage: &[u8]) -> Result<&[u8]> {
    if bzimage.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        return Err(Error::new("no bzImage: HdrS is missing at offset 0x202"));
    }
    let protocol = u32_at(bzimage, PROTOCOL)? & 0xffff;
    if protocol < 0x208 {
        let text = format!("boot protocol {protocol:#x} does not describe the payload");
        return Err(Error::new(text));
    }
    let sectors = match bzimage[SETUP_SECTS] {
        0 => 4, // According to boot.rst.
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + u32_at(bzimage, PAYLOAD_OFFSET)? as usize;
    let length = u32_at(bzimage, PAYLOAD_LENGTH)? as usize;
    if length < 8 {
        return Err(Error::new(format!(
            "the payload of {length} bytes is too short"
        )));
    }
    bzimage.get(start..start + length).context(|| {
        let size = bzimage.len();
        format!("truncated bzImage: payload {start}+{length}, file {size} bytes")
    })
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32> {
    let field = bytes
        .get(offset..offset + 4)
        .and_then(|field| field.try_into().ok());
    field
        .map(u32::from_le_bytes)
        .context(|| format!("truncated bzImage: no field at {offset:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(content: &[u8]) -> Vec<u8> {
        let mut payload = zstd::bulk::compress(content, 1).unwrap();
        payload.extend((content.len() as u32).to_le_bytes());
        let mut image = vec![0; 1024 + 16];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[PAYLOAD_OFFSET] = 16;
        let length = (payload.len() as u32).to_le_bytes();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length);
        image.extend(payload);
        image
    }

    fn refused(image: &[u8], text: &str) {
        let error = crate::error::chain(&unpack(image).unwrap_err());
        assert!(error.contains(text), "{error}");
    }

    #[test]
    fn the_elf_comes_out() {
        let elf = [b"\x7fELF".as_slice(), &[7; 5000]].concat();
        assert_eq!(unpack(&bzimage(&elf)).unwrap(), elf);
    }

    #[test]
    fn a_truncated_image_is_refused_at_every_length() {
        let image = bzimage(&[b"\x7fELF".as_slice(), &[7; 300]].concat());
        for length in 0..image.len() {
            assert!(unpack(&image[..length]).is_err(), "{length}");
        }
        refused(&image[..image.len() - 1], "truncated");
    }

    #[test]
    fn wrong_magics_are_refused() {
        let good = bzimage(b"\x7fELF");
        let mut image = good.clone();
        image[HEADER_MAGIC] = b'X';
        refused(&image, "HdrS");
        let mut image = good.clone();
        image[1040] = 0;
        refused(&image, "compression");
        let mut image = good.clone();
        image[PROTOCOL] = 7;
        refused(&image, "protocol");
        refused(&bzimage(b"MZ.."), "no ELF");
        refused(&[], "no bzImage");
    }

    #[test]
    fn a_damaged_frame_is_refused() {
        let mut image = bzimage(&[b"\x7fELF".as_slice(), &[7; 300]].concat());
        let last = image.len() - 5;
        image.truncate(last);
        image.extend([0; 5]);
        let size = image.len();
        image[size - 4..].copy_from_slice(&u32::MAX.to_le_bytes());
        refused(&image, "claims");
    }
}
