//! How a guest finds out that it runs under Ebb, and what the monitor offers.

/// First CPUID leaf at which the monitor may put its signature. KVM's own leaves start at
/// 0x4000_0000; hypervisor leaves are 0x100 apart (Linux, `arch/x86/include/asm/processor.h`,
/// `cpuid_base_hypervisor`).
pub const CPUID_BASE: u32 = 0x4000_0100;

/// A guest looks for the signature at [`CPUID_BASE`] and at every 0x100 after it, below this leaf.
pub const CPUID_END: u32 = 0x4001_0000;

/// Distance between two leaves that may hold the signature.
pub const CPUID_STEP: u32 = 0x100;

/// The signature in EBX, ECX and EDX of the leaf, little-endian, twelve bytes.
pub const CPUID_SIGNATURE: [u8; 12] = *b"EbbLazyMem\0\0";

/// Offset from the signature's leaf of the one that holds the version (EAX), the feature bits (EBX), the
/// port of the second transport (ECX) and the maximum number of descriptors of a batch (EDX).
pub const CPUID_VERSION_OFFSET: u32 = 1;

/// Version of the interface: major in the upper 16 bits, minor in the lower. A guest refuses a major
/// version that it does not know; minor versions only add.
pub const VERSION: u32 = 1 << 16 | 2;

/// The I/O port of the second transport, as the monitor sets it. Guests read it from CPUID.
pub const PORT: u16 = 0x0eb0;

/// The signature as the registers EBX, ECX, EDX.
#[must_use]
pub const fn signature_registers() -> [u32; 3] {
    let s = CPUID_SIGNATURE;
    [
        u32::from_le_bytes([s[0], s[1], s[2], s[3]]),
        u32::from_le_bytes([s[4], s[5], s[6], s[7]]),
        u32::from_le_bytes([s[8], s[9], s[10], s[11]]),
    ]
}

/// What the monitor offers, one bit for each. Bit 31 is always 0, so that the bits never look like an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u32);

impl Features {
    /// The first transport works, with the instruction VMCALL.
    pub const VMCALL: Self = Self(1 << 0);
    /// The first transport works, with the instruction VMMCALL. Never set together with [`Features::VMCALL`].
    pub const VMMCALL: Self = Self(1 << 1);
    /// The second transport works, at the port in ECX.
    pub const PORT: Self = Self(1 << 2);
    /// `LAZY_FREE`, `REUSE` and `RESET`.
    pub const LAZY: Self = Self(1 << 3);
    /// `LAZY_FREE_BATCH` and `REUSE_BATCH`, with as many descriptors as EDX says.
    pub const BATCH: Self = Self(1 << 4);
    /// `REUSE` and `REUSE_BATCH` take the flag `PREFAULT`.
    pub const PREFAULT: Self = Self(1 << 5);
    /// `QUERY`.
    pub const QUERY: Self = Self(1 << 6);
    /// `ARENA_INFO`: the machine has one arena or more.
    pub const ARENA: Self = Self(1 << 7);
    /// `KERNEL_NOTE`: the monitor reads the free lists of Linux kernels.
    pub const KERNEL_NOTE: Self = Self(1 << 8);

    /// These bits.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & (u32::MAX >> 1))
    }

    /// The bits as in EBX.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns true if all of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The interface as CPUID describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// [`VERSION`] of the monitor.
    pub version: u32,
    /// The features.
    pub features: Features,
    /// Port of the second transport.
    pub port: u16,
    /// Maximum number of descriptors of a batch.
    pub batch_max: u32,
}

impl Interface {
    /// The registers EAX to EDX of the leaf at [`CPUID_VERSION_OFFSET`].
    #[must_use]
    pub const fn registers(self) -> [u32; 4] {
        let Self {
            version,
            features,
            port,
            batch_max,
        } = self;
        [version, features.bits(), port as u32, batch_max]
    }

    /// Looks for the interface. `cpuid` returns EAX to EDX of a leaf. `None`: there is none, or one of another major
    /// version.
    pub fn discover(cpuid: impl Fn(u32) -> [u32; 4]) -> Option<Self> {
        let mut base = CPUID_BASE;
        while base < CPUID_END {
            let [last, ebx, ecx, edx] = cpuid(base);
            if [ebx, ecx, edx] == signature_registers() && last > base {
                return Self::from_registers(cpuid(base + CPUID_VERSION_OFFSET));
            }
            base += CPUID_STEP;
        }
        None
    }

    fn from_registers([version, features, port, batch_max]: [u32; 4]) -> Option<Self> {
        (version >> 16 == VERSION >> 16).then_some(Self {
            version,
            features: Features::from_bits(features),
            port: port as u16,
            batch_max,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Interface = Interface {
        version: VERSION + 3,
        features: Features::PORT.union(Features::LAZY),
        port: PORT,
        batch_max: 7,
    };

    fn machine(base: u32, interface: Interface) -> impl Fn(u32) -> [u32; 4] {
        let [ebx, ecx, edx] = signature_registers();
        move |leaf| match leaf.wrapping_sub(base) {
            0 => [base + 1, ebx, ecx, edx],
            1 => interface.registers(),
            _ => [0; 4],
        }
    }

    #[test]
    fn the_interface_is_found_at_every_leaf_where_it_may_stand() {
        for base in [CPUID_BASE, CPUID_BASE + 0x300, CPUID_END - CPUID_STEP] {
            assert_eq!(Interface::discover(machine(base, OURS)), Some(OURS));
        }
        for base in [0x4000_0000, CPUID_BASE + 1, CPUID_END] {
            assert_eq!(Interface::discover(machine(base, OURS)), None);
        }
    }

    #[test]
    fn another_major_version_is_refused() {
        let other = Interface {
            version: VERSION + (1 << 16),
            ..OURS
        };
        assert_eq!(Interface::discover(machine(CPUID_BASE, other)), None);
    }

    #[test]
    fn feature_bits_never_look_like_an_error() {
        assert_eq!(Features::from_bits(u32::MAX).bits() as i32, i32::MAX);
    }
}
