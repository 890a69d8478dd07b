//! Interrupts that are messages, through KVM's routing table and irqfd.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout::GSI_END;
use crate::irq::{Interrupt, Message, MessageInterrupt};

/// What each number of an interrupt is: those below [`GSI_END`] are lines, the others messages.
pub(super) struct Routes {
    fd: Arc<VmFd>,
    messages: Mutex<Vec<Option<Message>>>,
}

impl Routes {
    pub fn new(fd: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            fd,
            messages: Mutex::default(),
        })
    }

    /// A number that no other interrupt has.
    pub fn allocate(&self) -> u32 {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.push(None);
        GSI_END + messages.len() as u32 - 1
    }

    /// Has KVM take `message` for the interrupt `gsi`. One that it refuses must not spoil the table for the others.
    fn set(&self, gsi: u32, message: Option<Message>) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let index = (gsi - GSI_END) as usize;
        messages[index] = message;
        let set = self.write(&messages);
        if set.is_err() && message.is_some() {
            messages[index] = None;
            self.write(&messages)?;
        }
        set
    }

    /// KVM takes all routes at once.
    fn write(&self, messages: &[Option<Message>]) -> io::Result<()> {
        let of_messages = (GSI_END..).zip(messages);
        let messages =
            of_messages.filter_map(|(gsi, message)| Some(message_entry(gsi, (*message)?)));
        let entries: Vec<_> = lines().chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries);
        let table = table.map_err(|_| io::Error::from(io::ErrorKind::StorageFull))?;
        Ok(self.fd.set_gsi_routing(&table)?)
    }
}

/// The lines, as a new machine has them (Linux, `arch/x86/kvm/irq_comm.c`, `default_routing`).
fn lines() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let pics = (0..16).map(move |gsi| match gsi {
        0..8 => entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    pics.chain((0..GSI_END).map(move |gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
}

fn message_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

/// An interrupt that is a message.
pub struct MsiFd {
    event: EventFd,
    gsi: u32,
    routes: Arc<Routes>,
}

impl MsiFd {
    /// Wraps `event`, which is registered with KVM for the number `gsi` of `routes`.
    pub(super) const fn new(event: EventFd, gsi: u32, routes: Arc<Routes>) -> Self {
        Self { event, gsi, routes }
    }
}

impl Interrupt for MsiFd {
    fn trigger(&self) -> io::Result<()> {
        self.event.write(1)
    }
}

impl MessageInterrupt for MsiFd {
    fn route(&self, message: Option<Message>) -> io::Result<()> {
        self.routes.set(self.gsi, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_what_they_are_in_a_new_machine() {
        let gsis: Vec<u32> = lines().map(|entry| entry.gsi).collect();
        assert_eq!(gsis.len(), 16 + 24);
        assert!(
            (0..24).all(
                |gsi| gsis.iter().filter(|it| **it == gsi).count() == 1 + usize::from(gsi < 16)
            )
        );
        assert!(lines().all(|entry| entry.type_ == KVM_IRQ_ROUTING_IRQCHIP));
    }
}
