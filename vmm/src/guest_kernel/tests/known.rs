//! Which kernel counts, and until when.

use super::*;

/// Where vCPU 0 has its clock on.
fn known() -> KnownKernel {
    let known = KnownKernel::new();
    known.clock_set(0, true);
    known
}

fn offer(known: &KnownKernel, machine: &Machine) -> Result<(), String> {
    let offered = known.offer(&machine.memory, machine.note(), NoteSource::FwCfg);
    offered.map_err(|BadNote(why)| why)
}

#[test]
fn a_note_counts_until_its_kernel_ends() {
    let machine = Machine::stock();
    for why in [Lost::KernelLeft, Lost::DeviceReset, Lost::OtherKernel] {
        let known = known();
        offer(&known, &machine).unwrap();
        let state = known.status();
        assert_eq!(state.note_from, Some(NoteSource::FwCfg));
        assert_eq!(state.kernel.as_deref(), Some("6.12.117+deb12-cloud-amd64"));
        assert_eq!(state.why_not, None);
        assert!(known.current().is_some());
        known.forget(why);
        assert!(known.current().is_none());
        assert_eq!(known.status().why_not, Some(why.to_string()));
        // Another end changes nothing; the guest may offer a note again.
        known.forget(Lost::KernelLeft);
        assert_eq!(known.status().why_not, Some(why.to_string()));
        offer(&known, &machine).unwrap();
        assert!(known.current().is_some());
    }
}

#[test]
fn a_kernel_without_kvmclock_is_refused() {
    let machine = Machine::stock();
    let known = KnownKernel::new();
    assert!(offer(&known, &machine).unwrap_err().contains("kvmclock"));
    known.clock_set(0, true);
    known.clock_set(1, true);
    known.clock_set(0, false);
    offer(&known, &machine).unwrap();
    // The clocks of the kernel before are off.
    known.clock_set(1, false);
    known.forget(Lost::KernelLeft);
    assert!(offer(&known, &machine).unwrap_err().contains("kvmclock"));
    assert!(known.current().is_none());
}

/// Memory in which the kernel ends while it is read.
struct Ending<'a>(&'a Memory, &'a KnownKernel);

impl ReadGuest for Ending<'_> {
    fn load(&self, gpa: u64) -> Option<u64> {
        self.1.forget(Lost::KernelLeft);
        self.0.load(gpa)
    }
}

#[test]
fn a_kernel_that_ends_while_its_note_is_looked_at_does_not_count() {
    let (machine, known) = (Machine::stock(), known());
    let memory = Ending(&machine.memory, &known);
    let offered = known.offer(&memory, machine.note(), NoteSource::Hypercall);
    assert!(offered.is_err());
    assert!(known.current().is_none());
}

#[test]
fn a_bad_note_takes_the_place_of_a_good_one() {
    let (machine, known) = (Machine::stock(), known());
    offer(&known, &machine).unwrap();
    let nowhere = range(RAM - 2 * PAGE, 2 * PAGE);
    let offered = known.offer(&machine.memory, nowhere, NoteSource::Hypercall);
    assert!(offered.is_err());
    assert!(known.current().is_none());
    let why = known.status().why_not.unwrap();
    assert!(why.starts_with("the note is not accepted: "), "{why}");
}

#[test]
fn nothing_counts_once_it_is_off() {
    let machine = Machine::stock();
    let (turned_off, off) = (known(), KnownKernel::off("why"));
    offer(&turned_off, &machine).unwrap();
    turned_off.turn_off("why");
    off.clock_set(0, true);
    for known in [turned_off, off] {
        assert!(!known.is_enabled());
        assert_eq!(offer(&known, &machine), Err("why".into()));
        known.forget(Lost::KernelLeft);
        assert!(known.current().is_none());
        assert_eq!(known.status().why_not.as_deref(), Some("why"));
    }
}
