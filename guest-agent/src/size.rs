//! Sizes with a unit.

/// Parses digits and an optional K, M or G (powers of 1024). Returns bytes.
pub fn parse(text: &str) -> Option<usize> {
    let shift = match text.chars().next_back()?.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        _ => 0,
    };
    let digits = if shift == 0 {
        text
    } else {
        &text[..text.len() - 1]
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_digits_and_a_unit() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("4k", 4096), ("3G", 3 << 30)] {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "4MiB",
            "99999999999999999999",
            "18014398509481984K",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
