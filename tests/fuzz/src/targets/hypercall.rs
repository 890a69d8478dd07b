//! Calls with any arguments and blocks.

use std::sync::Arc;

use ebb_hypercall_abi::Features;
use ebb_hypercall_abi::call::MAGIC;
use ebb_vmm::hypercall::{Arguments, Hypercalls, offer};
use vm_memory::{Bytes as _, GuestAddress};

use super::machine::{ARENA, MIB, REACH_MIB, memory};
use crate::Bytes;

pub fn run(input: &[u8]) {
    let mut input = Bytes::new(input);
    let memory = memory();
    let more = Features::ARENA.union(Features::KERNEL_NOTE);
    let view = memory.ram().memory();
    let calls = Hypercalls::new(
        offer(None, more),
        Arc::clone(&view),
        Arc::clone(&memory) as _,
    );
    while !input.is_empty() {
        let kind = input.u8();
        let gpa = match kind & 7 {
            7 => ARENA + u64::from(input.u16()) * 4096,
            _ => input.address(REACH_MIB),
        };
        if kind & 8 != 0 {
            // A block. Where no RAM is, nothing is written.
            let len = input.u8().into();
            let _ = view.write_slice(input.take(len), GuestAddress(gpa & !0xfff));
            continue;
        }
        let pages = match kind & 0x30 {
            0 => 1,
            0x10 => input.u16().into(),
            0x20 => input.u64(),
            _ => 2,
        };
        let word = input.u16();
        let attributes = match kind & 0x40 {
            0 => MAGIC << 20 | u64::from(word & 0xf) << 8 | u64::from(word & 0x10) << 12,
            _ => input.u64(),
        };
        let status = calls.call(Arguments {
            gpa,
            pages,
            attributes,
        });
        assert!(
            i32::try_from(status).is_ok(),
            "{status} does not fit into the register"
        );
    }
    let stats = memory.lazy().snapshot();
    assert!(stats.lazy_bytes + stats.discarded_bytes + stats.unmapped_bytes <= 16 * MIB);
}
