//! The targets.

mod api;
mod book;
mod boot;
mod config;
mod devices;
mod free_lists;
mod hypercall;
mod machine;
mod pci;
mod reclaim;
mod snapshot;
mod vsock;

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Reads an input.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "snapshot",
        run: snapshot::run,
    },
    Target {
        name: "hypercall",
        run: hypercall::run,
    },
    Target {
        name: "book",
        run: book::run,
    },
    Target {
        name: "reclaim",
        run: reclaim::run,
    },
    Target {
        name: "balloon",
        run: devices::balloon,
    },
    Target {
        name: "block",
        run: devices::block,
    },
    Target {
        name: "vsock",
        run: vsock::run,
    },
    Target {
        name: "mmio",
        run: devices::mmio,
    },
    Target {
        name: "pci",
        run: pci::run,
    },
    Target {
        name: "api",
        run: api::run,
    },
    Target {
        name: "boot",
        run: boot::run,
    },
    Target {
        name: "config",
        run: config::run,
    },
    Target {
        name: "free_lists",
        run: free_lists::run,
    },
];
