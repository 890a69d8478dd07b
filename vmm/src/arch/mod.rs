//! The x86-64 machine as its guest sees it: address map, CPUID, initial registers, ACPI tables.

pub mod acpi;
pub mod cpuid;
pub mod layout;
pub mod registers;
pub mod reset;
