//! Sizes in messages.

/// `bytes` with the largest suffix that divides it, as [`super::parse_size`] reads it.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Formats `bytes` with three digits in the largest unit that does not exceed it.
#[must_use]
pub fn human(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    let mut rest = bytes;
    while rest >= 1 << 20 && unit + 1 < units.len() {
        rest >>= 10;
        unit += 1;
    }
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = rest as f64 / 1024.0;
    let digits = match value {
        _ if rest.is_multiple_of(1024) => 0,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_three_digits() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (1_234_567, "1.18 MiB"),
            (300 << 20, "300 MiB"),
            (1536 << 20, "1.50 GiB"),
            (64 << 40, "64 TiB"),
        ] {
            assert_eq!(human(bytes), expected);
        }
    }
}
