//! Addresses where no RAM is, and RAM that is special.

use super::{Case, case};
use crate::machine::RAM;
use crate::virtio::{DISK, STATUS};

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;

pub const CASES: &[Case] = &[
    case(
        "addresses_without_anything",
        "reads and writes where no RAM and no device is, at all widths, unaligned",
        |s| {
            for at in [
                RAM,
                RAM + 1,
                0x4000_0001,
                0xbfff_fffd,
                0xcfff_fffc,
                0xd000_3000,
                0xe000_0007,
                0xffff_fff0,
                0x1_fff0_0000,
            ] {
                for width in [1, 2, 4, 8] {
                    s.store(at, width, u64::MAX).load(at, width);
                }
            }
            s.load(0xc000_0000, 8).expect(u64::MAX);
        },
    ),
    case(
        "the_end_of_ram",
        "reads and writes eight bytes of which the last ones are no RAM",
        |s| {
            for at in [RAM - 7, RAM - 4, RAM - 1] {
                s.store(at, 8, u64::MAX).load(at, 8);
            }
        },
    ),
    case(
        "firmware_tables",
        "overwrites the ACPI tables, the memory map and the reset code",
        |s| {
            // The last of them end where the guest's own code begins.
            for at in [0x500, 0x6000, 0x7000, 0xe_0000, 0xf_ff00] {
                s.store(at, 8, u64::MAX).times(32, 8);
            }
        },
    ),
    case(
        "kvms_own_pages",
        "accesses the pages that KVM keeps for itself",
        |s| {
            for at in [0xfffb_c000, 0xfffb_d000, 0xfffb_ffff, 0xfeff_c000] {
                s.load(at, 8).store(at, 4, 0x5a5a);
            }
        },
    ),
    case(
        "addresses_beyond_the_page_tables",
        "accesses what it has not mapped",
        |s| {
            for at in [1 << 33, 1 << 46, u64::MAX - 8, 1 << 63] {
                s.load(at, 8).expect_fault();
                s.store(at, 8, 1).expect_fault();
            }
        },
    ),
    case(
        "atomic_access_to_a_device",
        "compares and swaps, adds, and swaps registers of a device",
        |s| {
            // mov edx, 0xd0000070; then lock cmpxchg, lock xadd and xchg of [rdx], 4 and 8 bytes wide
            for code in [
                &[0xf0, 0x0f, 0xb1, 0x0a][..],
                &[0xf0, 0x0f, 0xc1, 0x0a],
                &[0x87, 0x0a],
                &[0xf0, 0x48, 0x0f, 0xb1, 0x0a],
            ] {
                let mut all = vec![0xba, 0x70, 0, 0, 0xd0, 0x31, 0xc9];
                all.extend(code);
                all.push(0xc3);
                s.run(&all);
            }
            DISK.set(s, STATUS, 0);
        },
    ),
    case(
        "strings_between_devices",
        "copies from one device to another, and from a device to itself",
        |s| {
            // mov esi, from; mov edi, to; mov ecx, 64; rep movsb (or movsd); ret
            for (from, to) in [
                (0xd000_0000u32, 0xd000_1000u32),
                (0xd000_0000, 0xd000_0000),
                (0xd000_0100, PLAY as u32),
                (RAM as u32 - 8, RAM as u32),
            ] {
                for copy in [0xa4, 0xa5] {
                    let mut code = vec![0xbe];
                    code.extend(from.to_le_bytes());
                    code.push(0xbf);
                    code.extend(to.to_le_bytes());
                    code.extend([0xb9, 64, 0, 0, 0, 0xf3, copy, 0xc3]);
                    s.run(&code);
                }
            }
            DISK.set(s, STATUS, 0);
        },
    ),
    case(
        "wide_access_to_a_device",
        "reads and writes 16 bytes of a device's registers at once",
        |s| {
            // mov edx, 0xd0000000; movups xmm0, [rdx]; movups [rdx], xmm0; ret
            s.run(&[
                0xba, 0, 0, 0, 0xd0, 0x0f, 0x10, 0x02, 0x0f, 0x11, 0x02, 0xc3,
            ]);
            DISK.set(s, STATUS, 0);
        },
    ),
    case(
        "words_across_pages",
        "writes eight bytes in two pages, and reads them",
        |s| {
            s.store(PLAY, 8, 1)
                .store(PLAY + 4092, 8, u64::MAX)
                .load(PLAY + 4096, 4)
                .expect(0xffff_ffff);
        },
    ),
];
