//! The x86-64 machine that a guest sees: address map, CPUID, initial registers, ACPI tables.

pub mod acpi;
pub mod cpuid;
pub mod layout;
pub mod registers;
pub mod reset;
