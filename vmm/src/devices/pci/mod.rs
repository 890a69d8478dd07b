//! PCI: the configuration ports of a root bus, the configuration space of a function, and MSI-X.

mod config;
mod msix;
mod root;

pub use config::{ConfigSpace, Identity};
pub use msix::{ENTRY_SIZE, Msix, VectorSaved};
pub use root::{PciFunction, PciRoot};
