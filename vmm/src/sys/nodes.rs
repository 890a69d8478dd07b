//! Memory nodes (NUMA) of the host.

use std::fs;
use std::ptr;
use std::sync::OnceLock;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A node that has memory.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its number in the kernel.
    id: u32,
    /// Its processors, of those that this process may use.
    cpus: CpuSet,
}

#[cfg(test)]
impl Node {
    /// A node with these processors that no machine has.
    pub fn made_up(cpus: CpuSet) -> Self {
        Self { id: u32::MAX, cpus }
    }

    /// Its processors.
    pub const fn cpus(&self) -> &CpuSet {
        &self.cpus
    }
}

/// The nodes that have memory; at least one.
#[must_use]
pub fn all() -> &'static [Node] {
    static ALL: OnceLock<Vec<Node>> = OnceLock::new();
    ALL.get_or_init(|| {
        let allowed = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        let list = fs::read_to_string("/sys/devices/system/node/has_memory");
        let mut ids = list.map(|list| parse(&list)).unwrap_or_default();
        if ids.is_empty() {
            ids.push(0);
        }
        let node = |id| {
            let path = format!("/sys/devices/system/node/node{id}/cpulist");
            let mut cpus = CpuSet::new();
            for cpu in parse(&fs::read_to_string(path).unwrap_or_default()) {
                let cpu = cpu as usize;
                if cpu < CpuSet::MAX_CPU && allowed.is_set(cpu) {
                    cpus.set(cpu);
                }
            }
            Node { id, cpus }
        };
        ids.into_iter().map(node).collect()
    })
}

/// The numbers of a list like `0-3,8`.
fn parse(list: &str) -> Vec<u32> {
    let span = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
    };
    list.trim().split(',').filter_map(span).flatten().collect()
}

/// Binds the calling thread to the processors of a node, if there are any that this process may use. Makes one system call
/// and nothing else.
pub fn bind(node: &Node) {
    if node.cpus.count() > 0 {
        let _ = sched_setaffinity(None, &node.cpus);
    }
}

/// Which of `nodes` holds the page at each of these addresses of this process (move_pages(2)), by its index; `None` where
/// there is no page. Makes one system call and nothing else.
#[must_use]
pub fn nodes_at<const N: usize>(nodes: &[Node], addresses: [usize; N]) -> [Option<usize>; N] {
    let pages = addresses.map(ptr::without_provenance::<libc::c_void>);
    let mut status: [libc::c_int; N] = [-1; N];
    // SAFETY: without a list of nodes the call moves nothing. It reads N addresses, which it looks up without touching
    // what lies there, and writes as many statuses.
    let rc = unsafe {
        let to = ptr::null::<libc::c_int>();
        let (pages, status) = (pages.as_ptr(), status.as_mut_ptr());
        libc::syscall(libc::SYS_move_pages, 0, N, pages, to, status, 0)
    };
    status.map(|status| {
        let id = u32::try_from(status).ok().filter(|_| rc == 0)?;
        nodes.iter().position(|node| node.id == id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_numbers() {
        for (list, numbers) in [
            ("0\n", &[0][..]),
            ("0-3,8", &[0, 1, 2, 3, 8]),
            ("1,3", &[1, 3]),
            ("3-1", &[]),
            ("", &[]),
        ] {
            assert_eq!(parse(list), numbers, "{list}");
        }
    }

    #[test]
    fn a_page_has_a_node_and_a_hole_has_none() {
        let touched = std::hint::black_box(vec![1u8; 8192]);
        let page = (touched.as_ptr().addr() + 4096) & !4095;
        let [there, hole] = nodes_at(all(), [page, 4096]);
        assert!(there.is_some() && hole.is_none());
        // A node that is not asked for is none.
        assert_eq!(nodes_at(&[], [page]), [None]);
    }

    #[test]
    fn a_thread_is_bound_to_the_processors_of_a_node() {
        let allowed = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
        let (mut cpus, none) = (CpuSet::new(), CpuSet::new());
        cpus.set(first.unwrap());
        std::thread::spawn(move || {
            bind(&Node { id: 0, cpus: none });
            assert_eq!(
                sched_getaffinity(None).unwrap(),
                allowed,
                "it has no processor"
            );
            bind(&Node { id: 0, cpus });
            assert_eq!(sched_getaffinity(None).unwrap(), cpus);
        })
        .join()
        .unwrap();
        assert!(all().iter().any(|node| node.cpus.count() > 0));
    }
}
