//! The function against drivers, good and hostile.

use std::io;
use std::sync::Mutex;

use ebb_core::range::GpaRange;
use proptest::prelude::*;

use super::*;
use crate::devices::state::SaveState;
use crate::devices::virtio::mmio::tests::{Log, MockDevice};
use crate::devices::virtio::queue::tests::driver::{MockQueue, memory};
use crate::guest_memory::{BadNote, Lost, NoteSource};
use crate::irq::{Interrupt, Message};

const BASE: u32 = 0xe000_8000;

/// Number of each interrupt, in order.
#[derive(Clone)]
struct Line(u16, Arc<Mutex<Vec<u16>>>);

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        self.1.lock().unwrap().push(self.0);
        Ok(())
    }
}

impl MessageInterrupt for Line {
    fn route(&self, _: Option<Message>) -> io::Result<()> {
        Ok(())
    }
}

struct Deaf;

impl KernelEvents for Deaf {
    fn note(&self, _: GpaRange, _: NoteSource) -> Result<(), BadNote> {
        Ok(())
    }
    fn lost(&self, _: Lost) {}
}

struct Rig {
    function: PciTransport,
    memory: Arc<GuestMemoryMmap>,
    log: Arc<Mutex<Log>>,
    raised: Arc<Mutex<Vec<u16>>>,
}

impl Rig {
    fn new() -> Self {
        let (memory, log, raised) = (memory(4), Arc::default(), Arc::default());
        let device = Box::new(MockDevice(Arc::clone(&log)));
        let line = |n| Box::new(Line(n, Arc::clone(&raised))) as Box<dyn MessageInterrupt>;
        let lines = (0..3).map(line).collect();
        let function = PciTransport::new(device, Arc::clone(&memory), BASE, lines, Arc::new(Deaf));
        let mut rig = Self {
            function: function.unwrap(),
            memory,
            log,
            raised,
        };
        rig.function.write_config(4, &[6, 4]);
        rig
    }

    fn config(&mut self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.function.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn read(&mut self, offset: usize, width: usize) -> u64 {
        let mut data = [0; 8];
        BusDevice::read(&mut self.function, offset as u64, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn write(&mut self, offset: usize, width: usize, value: u64) {
        let data = value.to_le_bytes();
        let action = BusDevice::write(&mut self.function, offset as u64, &data[..width]);
        assert_eq!(action, Action::Continue);
    }

    /// Offsets of the capabilities with this number, in the order of the list.
    fn capabilities(&mut self, number: u8) -> Vec<usize> {
        let (mut found, mut at) = (Vec::new(), self.config(0x34) as usize & 0xff);
        while at != 0 {
            let head = self.config(at);
            if head as u8 == number {
                found.push(at);
            }
            at = (head >> 8) as usize & 0xff;
        }
        found
    }

    /// What Linux's driver does, with a vector for each queue.
    fn bind(&mut self) {
        self.write(0x14, 1, 0);
        for status in [1, 3] {
            self.write(0x14, 1, status);
        }
        for (select, half) in [(0, 0), (1, 1 | 1 << 1)] {
            self.write(0x08, 4, select);
            self.write(0x0c, 4, half);
        }
        self.write(0x14, 1, 11);
        self.write(CONFIG_VECTOR, 2, 0);
        for (index, vector) in [(0, 1), (1, 2)] {
            let queue = MockQueue::new(&self.memory, 0x10_0000 + (index << 16), 16);
            self.write(0x16, 2, index);
            assert_eq!(self.read(0x18, 2), [256, 16][index as usize]);
            self.write(0x18, 2, 16);
            self.write(0x20, 8, queue.base);
            self.write(0x28, 4, queue.avail());
            self.write(0x2c, 4, 0);
            self.write(0x30, 4, queue.used_ring());
            self.write(0x34, 4, 0);
            self.write(QUEUE_VECTOR, 2, vector);
            assert_eq!(self.read(QUEUE_VECTOR, 2), vector);
            self.write(0x1c, 2, 1);
            assert_eq!([0x1c, 0x1e].map(|at| self.read(at, 2)), [1, index]);
        }
        self.write(0x14, 1, 15);
        assert_eq!(self.read(0x14, 1), 15);
    }

    /// Opens all vectors.
    fn open(&mut self) {
        for vector in 0..3 {
            self.write(TABLE + 16 * vector, 8, 0xfee0_0000);
            self.write(TABLE + 16 * vector + 8, 8, 0x40);
        }
        let at = self.capabilities(0x11)[0];
        self.function.write_config(at + 2, &0x8000u16.to_le_bytes());
    }
}

#[test]
fn a_driver_finds_what_it_needs() {
    let mut rig = Rig::new();
    // Device type 42.
    assert_eq!(rig.config(0), 0x106a_1af4);
    assert_eq!(rig.config(8), 0xff00_0001);
    let parts = rig.capabilities(9);
    let found: Vec<[u32; 3]> = parts
        .iter()
        .map(|at| {
            [
                rig.config(*at) >> 16,
                rig.config(at + 8),
                rig.config(at + 12),
            ]
        })
        .collect();
    let expected = [
        [0x0110, COMMON as u32, 0x38],
        [0x0214, NOTIFY as u32, 0x1000],
        [0x0310, ISR as u32, 1],
        [0x0410, DEVICE as u32, 0x1000],
        [0x0514, 0, 0],
    ];
    assert_eq!(found, expected);
    let msix = rig.capabilities(0x11)[0];
    assert_eq!(rig.config(msix) >> 16, 2, "3 vectors");
    assert_eq!(
        [4, 8].map(|at| rig.config(msix + at)),
        [TABLE as u32, PENDING as u32]
    );
}

#[test]
fn the_base_address_tells_its_size_and_stays() {
    let mut rig = Rig::new();
    assert_eq!(rig.config(0x10), BASE);
    rig.function.write_config(0x10, &[0xff; 4]);
    assert_eq!(rig.config(0x10), 0xffff_8000);
    rig.function
        .write_config(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(rig.config(0x10), BASE);
    for at in (0x14..0x34).step_by(4).filter(|at| *at != 0x2c) {
        rig.function.write_config(at, &[0xff; 4]);
        assert_eq!(rig.config(at), 0, "{at:#x}");
    }
    rig.function.write_config(4, &[0, 0]);
    let mut data = [7; 4];
    BusDevice::read(&mut rig.function, 0, &mut data);
    assert_eq!(data, [7; 4], "nobody answers");
}

#[test]
fn a_driver_binds_goes_and_comes_back() {
    let mut rig = Rig::new();
    for n in 1..4 {
        rig.bind();
        let log = rig.log.lock().unwrap();
        assert_eq!(log.activations, n);
        let queues = &log.current.as_ref().unwrap().queues;
        assert!(queues.iter().all(Option::is_some));
        drop(log);
        rig.write(NOTIFY + 4, 2, 1);
        let notified = |rig: &Rig| {
            let log = rig.log.lock().unwrap();
            let queues = &log.current.as_ref().unwrap().queues;
            [0, 1].map(|n| queues[n].as_ref().unwrap().notified.read().unwrap_or(0))
        };
        assert_eq!(notified(&rig), [0, 1]);
        rig.write(0x14, 1, 0);
        assert_eq!(rig.read(0x14, 1), 0);
        assert_eq!(rig.read(CONFIG_VECTOR, 2), 0xffff);
    }
}

#[test]
fn each_event_has_its_vector() {
    let mut rig = Rig::new();
    rig.open();
    rig.bind();
    let interrupt = Arc::clone(&rig.log.lock().unwrap().current.as_ref().unwrap().interrupt);
    interrupt.used_buffers(1).unwrap();
    interrupt.used_buffers(0).unwrap();
    interrupt.configuration_changed().unwrap();
    interrupt.used_buffers(7).unwrap();
    assert_eq!(*rig.raised.lock().unwrap(), [2, 1, 0]);
    assert_eq!([rig.read(ISR, 1), rig.read(ISR, 1)], [3, 0], "read once");
    assert_eq!(rig.read(0x15, 1), 1, "the generation");
    rig.write(QUEUE_VECTOR, 2, 3);
    assert_eq!(rig.read(QUEUE_VECTOR, 2), 0xffff, "there is no vector 3");
    interrupt.used_buffers(1).unwrap();
    assert_eq!(rig.raised.lock().unwrap().len(), 3);
}

#[test]
fn a_function_goes_on_where_it_was_saved() {
    let mut saved = Rig::new();
    saved.open();
    saved.bind();
    let interrupt = Arc::clone(
        &saved
            .log
            .lock()
            .unwrap()
            .current
            .as_ref()
            .unwrap()
            .interrupt,
    );
    saved.write(TABLE + 16 * 2 + 12, 4, 1);
    interrupt.used_buffers(1).unwrap();
    interrupt.configuration_changed().unwrap();
    saved.function.write_config(4, &[2, 0]);
    saved.function.write_config(0x10, &[0xff; 4]);
    let state = saved.function.save().unwrap();

    let mut restored = Rig::new();
    restored.function.restore(&state).unwrap();
    for at in (0..256).step_by(4) {
        assert_eq!(restored.config(at), saved.config(at), "{at:#x}");
    }
    for at in [COMMON, TABLE, PENDING]
        .into_iter()
        .flat_map(|part| (part..part + 0x40).step_by(4))
    {
        assert_eq!(restored.read(at, 4), saved.read(at, 4), "{at:#x}");
    }
    assert_eq!(restored.read(PENDING, 1), 1 << 2);
    assert_eq!(restored.log.lock().unwrap().activations, 0);
    restored.function.registers().lock().unwrap().resume();
    assert_eq!(restored.log.lock().unwrap().activations, 1);
    // What may not have come before is told again; what is masked goes on waiting.
    assert_eq!(*restored.raised.lock().unwrap(), [0, 1]);
    restored.write(TABLE + 16 * 2 + 12, 4, 0);
    assert_eq!(*restored.raised.lock().unwrap(), [0, 1, 2]);
}

#[test]
fn memory_is_reached_through_the_configuration_space() {
    let mut rig = Rig::new();
    let at = rig.capabilities(9)[4];
    let point = |rig: &mut Rig, bar: u8, offset: u32, len: u32| {
        rig.function.write_config(at + 4, &[bar]);
        rig.function.write_config(at + 8, &offset.to_le_bytes());
        rig.function.write_config(at + 12, &len.to_le_bytes());
    };
    point(&mut rig, 0, 0x14, 1);
    rig.function.write_config(at + 16, &[1]);
    assert_eq!(rig.read(0x14, 1), 1);
    assert_eq!(rig.config(at + 16), 1);
    for (bar, offset, len) in [
        (1, 0x14, 1),
        (0, 0x14, 3),
        (0, 0x15, 2),
        (0, SIZE, 4),
        (0, u32::MAX, 1),
        (0, 0x14, u32::MAX),
    ] {
        point(&mut rig, bar, offset, len);
        rig.function.write_config(at + 16, &[0; 4]);
        rig.config(at + 16);
    }
    assert_eq!(rig.read(0x14, 1), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_accesses_leave_a_function_that_binds(
        accesses in prop::collection::vec((any::<bool>(), any::<bool>(), 0..SIZE as usize, 0..4u32, any::<u64>()), 0..200)
    ) {
        let mut rig = Rig::new();
        for (configure, write, at, width, value) in accesses {
            let mut data = value.to_le_bytes();
            let data = &mut data[..1 << width];
            match (configure, write) {
                (true, true) => rig.function.write_config(at % 259, data),
                (true, false) => rig.function.read_config(at % 259, data),
                (false, true) => drop(BusDevice::write(&mut rig.function, at as u64, data)),
                (false, false) => BusDevice::read(&mut rig.function, at as u64, data),
            }
        }
        rig.function.write_config(4, &[6, 4]);
        rig.open();
        rig.bind();
        prop_assert_eq!(rig.config(0x10) & 0xfff, 0);
    }
}
