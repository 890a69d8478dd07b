//! ACPI tables (ACPI 6.5): processors, interrupt controller, devices, power off and reset.

use acpi_tables::Aml;
use acpi_tables::aml::AddressSpaceCacheable::NotCacheable;
use acpi_tables::aml::{self, Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;

const OEM: [u8; 6] = *b"EBB   ";
const OEM_TABLE: [u8; 8] = *b"EBBVMM  ";
/// Sleep type of soft-off (S5) in the sleep control register.
pub const S5: u8 = 5;
/// The value that resets the machine when written to the reset register.
pub const RESET_VALUE: u8 = 1;

/// A virtio-mmio device to describe.
#[derive(Clone, Copy, Debug)]
pub struct VirtioWindow {
    /// Guest-physical address of its window.
    pub base: u64,
    /// Its interrupt.
    pub gsi: u32,
}

/// The tables do not fit into the space for them, or it is not RAM.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Too many processors or devices.
    #[error("the ACPI tables take {0} bytes, more than there is room for")]
    TooLarge(usize),
    /// Guest memory could not be written.
    #[error("ACPI tables could not be written to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Writes all tables to guest memory.
///
/// `fw_cfg` is true if the machine has that device, `pci` if it has devices on a PCI root bus. Returns the guest-physical address of the RSDP.
///
/// # Errors
/// [`AcpiError`].
pub fn write(
    memory: &GuestMemoryMmap,
    vcpus: u32,
    virtio: &[VirtioWindow],
    fw_cfg: bool,
    pci: bool,
) -> Result<u64, AcpiError> {
    let rsdp = layout::ACPI_TABLES;
    // The RSDP comes first but contains the address of the XSDT, so it is written last.
    let mut image = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: &dyn Aml| {
        let at = image.len();
        table.to_aml_bytes(&mut image);
        image.resize(image.len().next_multiple_of(16), 0);
        rsdp + at as u64
    };
    let dsdt = place(&dsdt(virtio, fw_cfg, pci));
    let fadt = place(&fadt(dsdt, pci));
    let madt = place(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);
    let mut head = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut head);
    image[..head.len()].copy_from_slice(&head);
    if image.len() as u64 > layout::ACPI_TABLES_END - rsdp {
        return Err(AcpiError::TooLarge(image.len()));
    }
    memory
        .write_slice(&image, GuestAddress(rsdp))
        .map_err(AcpiError::Write)?;
    Ok(rsdp)
}

/// A hardware-reduced machine: no PM timer, no SCI, no legacy devices but the keyboard controller. Linux then
/// does not look for a CMOS clock or a VGA card (`IAPC_BOOT_ARCH`).
fn fadt(dsdt: u64, pci: bool) -> impl Aml {
    const HAS_8042: u16 = 1 << 1;
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const MSI_NOT_SUPPORTED: u16 = 1 << 3;
    const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
    let port = |offset: u64| {
        let address = layout::POWER_PORT + offset;
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            address,
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let msi = if pci { 0 } else { MSI_NOT_SUPPORTED };
    fadt.iapc_boot_arch = (HAS_8042 | VGA_NOT_PRESENT | msi | CMOS_RTC_NOT_PRESENT).into();
    fadt.sleep_control_reg = port(0);
    fadt.sleep_status_reg = port(1);
    fadt.reset_reg = port(2);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"EbbVMM\0\0").into();
    fadt.finalize()
}

fn madt(vcpus: u32) -> impl Aml {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, local);
    for id in 0..vcpus {
        // APIC ids are 8 bits wide here: the configuration allows no more vCPUs than that.
        let id = id as u8;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(virtio: &[VirtioWindow], fw_cfg: bool, pci: bool) -> Sdt {
    let mut body = Vec::new();
    let zero = 0u8;
    Name::new("_S5_".into(), &Package::new(vec![&S5, &zero, &zero, &zero])).to_aml_bytes(&mut body);
    system_bus(virtio, fw_cfg, &mut body);
    if pci {
        root_bus(&mut body);
    }
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    sdt.append_slice(&body);
    sdt
}

fn system_bus(virtio: &[VirtioWindow], fw_cfg: bool, body: &mut Vec<u8>) {
    let serial_io = IO::new(
        layout::SERIAL_PORT as u16,
        layout::SERIAL_PORT as u16,
        1,
        layout::SERIAL_PORT_LEN as u8,
    );
    let serial_irq = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    let zero = 0u8;
    let mut scope = Vec::new();
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &zero),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&serial_irq, &serial_io]),
            ),
        ],
    )
    .to_aml_bytes(&mut scope);
    keyboard(&mut scope);
    generation(&mut scope);
    qemu_device("PEVT", "QEMU0001", layout::PVPANIC_PORT, 1, &mut scope);
    if fw_cfg {
        let len = layout::FW_CFG_PORT_LEN as u8;
        qemu_device("FWCF", "QEMU0002", layout::FW_CFG_PORT, len, &mut scope);
    }
    for (index, window) in virtio.iter().enumerate() {
        virtio_device(index, *window, &mut scope);
    }
    body.extend(aml::Scope::raw("_SB_".into(), scope));
}

/// The PCI root bus: the configuration ports, and the window that has the memory of all devices. There are no interrupt lines.
fn root_bus(body: &mut Vec<u8>) {
    let (port, ports) = (layout::PCI_PORT as u16, layout::PCI_PORT_LEN as u8);
    let configuration = IO::new(port, port, 1, ports);
    let (start, end) = (layout::PCI_MEMORY as u32, layout::PCI_MEMORY_END as u32 - 1);
    let memory = aml::AddressSpace::new_memory(NotCacheable, true, start, end, None);
    let buses = aml::AddressSpace::new_bus_number(0u16, 0);
    let resources = ResourceTemplate::new(vec![&buses, &configuration, &memory]);
    let zero = 0u8;
    let mut scope = Vec::new();
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &zero),
            &Name::new("_SEG".into(), &zero),
            &Name::new("_BBN".into(), &zero),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(&mut scope);
    body.extend(aml::Scope::raw("_SB_".into(), scope));
}

/// The keyboard controller, by the hardware id of an AT keyboard. There is none for a mouse.
fn keyboard(scope: &mut Vec<u8>) {
    let port = |offset: u64| {
        let port = (layout::I8042_PORT + offset) as u16;
        IO::new(port, port, 1, 1)
    };
    let irq = Interrupt::new(true, true, false, false, layout::KEYBOARD_GSI);
    let (data, command) = (port(0), port(4));
    let resources = ResourceTemplate::new(vec![&data, &command, &irq]);
    Device::new(
        "KBD_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0303")),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(scope);
}

/// Where the generation id is ("Virtual Machine Generation ID", Microsoft, 2018), and the event device by which the guest hears
/// that it has changed (ACPI 6.5, 5.6.9). Linux's driver is `drivers/virt/vmgenid.c`.
fn generation(scope: &mut Vec<u8>) {
    let (low, high) = (layout::VM_GENERATION as u32, 0u32);
    let name = "VM_Gen_Counter";
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &name),
            &Name::new("_DDN".into(), &name),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(scope);
    let irq = Interrupt::new(true, true, false, false, layout::EVENT_GSI);
    let (generation, changed) = (aml::Path::new("\\_SB_.VGEN"), 0x80u8);
    let notify = aml::Notify::new(&generation, &changed);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq])),
            // It has one interrupt, so the argument says nothing.
            &aml::Method::new("_EVT".into(), 1, true, vec![&notify]),
        ],
    )
    .to_aml_bytes(scope);
}

/// A device of QEMU's with `ports` I/O ports, by the hardware id `id` that Linux's driver binds to.
fn qemu_device(name: &str, id: &'static str, port: u64, ports: u8, scope: &mut Vec<u8>) {
    let io = IO::new(port as u16, port as u16, 1, ports);
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &id),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io])),
        ],
    )
    .to_aml_bytes(scope);
}

/// One virtio-mmio device, by the hardware id that Linux's driver binds to
/// (`drivers/virtio/virtio_mmio.c`). The addresses lie below 4 GiB by the layout.
fn virtio_device(index: usize, window: VirtioWindow, scope: &mut Vec<u8>) {
    let base = window.base as u32;
    let memory = aml::Memory32Fixed::new(true, base, layout::VIRTIO_MMIO_SIZE as u32);
    let irq = Interrupt::new(true, true, false, false, window.gsi);
    let name = format!("V{index:03}");
    Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u16)),
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &irq])),
        ],
    )
    .to_aml_bytes(scope);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(vcpus: u32, devices: usize, pci: bool) -> (Vec<u8>, u64) {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let windows: Vec<_> = (0..devices as u64)
            .map(|i| VirtioWindow {
                base: layout::VIRTIO_MMIO + i * layout::VIRTIO_MMIO_SIZE,
                gsi: layout::VIRTIO_GSI + i as u32,
            })
            .collect();
        let rsdp = write(&memory, vcpus, &windows, true, pci).unwrap();
        let mut image = vec![0; (layout::ACPI_TABLES_END - rsdp) as usize];
        memory.read_slice(&mut image, GuestAddress(rsdp)).unwrap();
        (image, rsdp)
    }

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b))
    }

    /// Follows the pointers as a guest does.
    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let (image, rsdp) = tables(255, 19, true);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((checksum(&image[..20]), checksum(&image[..36])), (0, 0));
        let table = |address: u64| {
            let at = (address - rsdp) as usize;
            let len = u32::from_le_bytes(image[at + 4..at + 8].try_into().unwrap()) as usize;
            let bytes = image[at..at + len].to_vec();
            assert_eq!(checksum(&bytes), 0);
            bytes
        };
        let address =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let xsdt = table(address(&image, 24));
        let fadt = table(address(&xsdt, 36));
        let madt = table(address(&xsdt, 44));
        let dsdt = table(address(&fadt, 140));
        assert_eq!(
            (&fadt[..4], &madt[..4], &dsdt[..4]),
            (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..])
        );
        assert_eq!(madt.len(), 44 + 255 * 8 + 12);
        let count = |id: &[u8]| dsdt.windows(8).filter(|window| *window == id).count();
        let devices = [
            &b"LNRO0005"[..],
            b"QEMU0001",
            b"QEMU0002",
            b"VMGENCTR",
            b"ACPI0013",
        ];
        assert_eq!(devices.map(count), [19, 1, 1, 1, 1]);
        let has = |image: &[u8]| image.windows(4).any(|window| window == b"PCI0");
        assert!(has(&image) && !has(&tables(1, 1, false).0));
        assert_eq!(fadt[109] & 1 << 3, 0, "MSI is supported");
    }
}
