//! What KVM allows on a host.

use super::KvmError;

/// Limits of KVM on this host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Maximum number of vCPUs of a machine.
    pub vcpus: u32,
    /// Width of guest-physical addresses in bits.
    pub address_bits: u32,
}

impl Limits {
    /// Checks a machine with so many `vcpus` and memory up to `memory_end`.
    pub fn check(self, vcpus: u32, memory_end: u64) -> Result<(), KvmError> {
        if vcpus > self.vcpus {
            return Err(KvmError::TooManyVcpus {
                asked: vcpus,
                max: self.vcpus,
            });
        }
        let bits = self.address_bits;
        if memory_end.checked_shr(bits).unwrap_or(0) > 0 {
            return Err(KvmError::AddressWidth {
                end: memory_end,
                bits,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exceeds_kvm_is_named_with_the_limit_and_the_remedy() {
        let limits = Limits {
            vcpus: 8,
            address_bits: 39,
        };
        assert!(limits.check(8, 1 << 38).is_ok());
        assert_eq!(
            limits.check(9, 0).unwrap_err().to_string(),
            "9 vCPUs were asked for, but KVM allows 8 here; lower --cpus boot="
        );
        let error = limits.check(1, 1 << 40).unwrap_err().to_string();
        for part in ["0x10000000000", "39 bits", "lower --memory size="] {
            assert!(error.contains(part), "{error}: lacks {part}");
        }
    }
}
