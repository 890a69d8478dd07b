//! Interrupts that are messages, through KVM's routing table and irqfd.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, mem};

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
    table: Mutex<Table>,
}

/// The messages that KVM has, and what some of them will be.
#[derive(Default)]
struct Table {
    messages: Vec<Option<Message>>,
    prepared: Vec<(usize, Message)>,
}

impl Routes {
    pub fn new(fd: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            fd,
            table: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that no other interrupt has.
    pub fn allocate(&self) -> u32 {
        let mut table = self.lock();
        table.messages.push(None);
        GSI_END + table.messages.len() as u32 - 1
    }

    /// Has KVM take `message` for the interrupt `gsi`.
    fn set(&self, gsi: u32, message: Option<Message>) -> io::Result<()> {
        let index = (gsi - GSI_END) as usize;
        self.lock().set(index, message, |all| self.write(all))
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

impl Table {
    /// Has the kernel take `message` for a number, and with it all that is prepared. `write` gives it all messages. One that it
    /// refuses must not spoil the table for the others.
    fn set(
        &mut self,
        index: usize,
        message: Option<Message>,
        write: impl Fn(&[Option<Message>]) -> io::Result<()>,
    ) -> io::Result<()> {
        let prepared = mem::take(&mut self.prepared);
        if prepared.is_empty() && self.messages[index] == message {
            return Ok(());
        }
        let before = self.messages.clone();
        for (index, message) in prepared {
            self.messages[index] = Some(message);
        }
        self.messages[index] = message;
        if write(&self.messages).is_ok() {
            return Ok(());
        }
        // Then without what is prepared, and without this one.
        self.messages = before;
        self.messages[index] = message;
        let set = write(&self.messages);
        if set.is_err() && message.is_some() {
            self.messages[index] = None;
            write(&self.messages)?;
        }
        set
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

    fn prepare(&self, message: Message) {
        let index = (self.gsi - GSI_END) as usize;
        self.routes.lock().prepared.push((index, message));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What a kernel is given that refuses messages with the data 0.
    #[derive(Default)]
    struct Kernel(RefCell<Vec<Vec<u32>>>);

    impl Kernel {
        fn write(&self, all: &[Option<Message>]) -> io::Result<()> {
            let data: Vec<u32> = all.iter().flatten().map(|it| it.data).collect();
            let is_bad = data.contains(&0);
            self.0.borrow_mut().push(data);
            if is_bad {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            Ok(())
        }
    }

    const fn message(data: u32) -> Message {
        let address = 0xfee0_0000;
        Message { address, data }
    }

    #[test]
    fn what_is_prepared_is_written_once() {
        let kernel = Kernel::default();
        let mut table = Table {
            messages: vec![None; 4],
            prepared: (0..3).map(|it| (it, message(it as u32 + 1))).collect(),
        };
        for index in 0..3 {
            let message = Some(message(index as u32 + 1));
            table.set(index, message, |all| kernel.write(all)).unwrap();
        }
        assert_eq!(kernel.0.take(), [[1, 2, 3]]);
        table.set(0, None, |all| kernel.write(all)).unwrap();
        table.set(0, None, |all| kernel.write(all)).unwrap();
        assert_eq!(kernel.0.take(), [[2, 3]]);
    }

    #[test]
    fn one_that_is_refused_spoils_no_other() {
        let kernel = Kernel::default();
        let data = [1, 0, 2];
        let mut table = Table {
            messages: vec![None; 3],
            prepared: (0..).zip(data.map(message)).collect(),
        };
        let set = |(index, data)| {
            let set = table.set(index, Some(message(data)), |all| kernel.write(all));
            set.is_ok()
        };
        let done: Vec<bool> = (0..).zip(data).map(set).collect();
        assert_eq!(done, [true, false, true]);
        assert_eq!(kernel.0.take().last(), Some(&vec![1, 2]));
    }

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
