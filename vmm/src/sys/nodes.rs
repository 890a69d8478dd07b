//! Memory nodes (NUMA) of the host.

use std::fs;
use std::ptr;
use std::sync::OnceLock;

/// How many nodes have memory; 1 if the kernel does not say.
#[must_use]
pub fn count() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| {
        let list = fs::read_to_string("/sys/devices/system/node/has_memory");
        list.map_or(1, |list| parse(&list)).max(1)
    })
}

/// How many numbers a list like `0-3,8` holds.
fn parse(list: &str) -> usize {
    let span = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim().split(',').filter_map(span).sum()
}

/// The node that holds the page at `address` of this process (move_pages(2)); `None` if there is no page.
#[must_use]
pub fn node_at(address: usize) -> Option<u32> {
    let page = ptr::without_provenance::<libc::c_void>(address);
    let mut status: libc::c_int = -1;
    // SAFETY: without a list of nodes the call moves nothing. It reads one address, which it looks up without touching
    // what lies there, and writes one status.
    let rc = unsafe {
        let nodes = ptr::null::<libc::c_int>();
        libc::syscall(
            libc::SYS_move_pages,
            0,
            1,
            &raw const page,
            nodes,
            &raw mut status,
            0,
        )
    };
    (rc == 0).then(|| u32::try_from(status).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes() {
        for (list, count) in [("0\n", 1), ("0-3,8", 5), ("1,3", 2), ("3-1", 0), ("", 0)] {
            assert_eq!(parse(list), count, "{list}");
        }
        assert!(count() >= 1);
    }

    #[test]
    fn a_page_has_a_node_and_a_hole_has_none() {
        let touched = std::hint::black_box(vec![1u8; 8192]);
        assert!(node_at((touched.as_ptr().addr() + 4096) & !4095).is_some());
        assert_eq!(node_at(4096), None);
    }
}
