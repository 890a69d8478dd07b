//! Scripts: what a guest does, step by step, as the host has put it into memory.

/// One step. What the fields mean depends on the kind, see [`Kind`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Step {
    /// A [`Kind`].
    pub kind: u64,
    /// An address, a port, or the number of a register.
    pub at: u64,
    /// Bytes of an access: 1, 2, 4 or 8.
    pub width: u64,
    /// First argument.
    pub a: u64,
    /// Second argument.
    pub b: u64,
    /// How often the step is done, at least once.
    pub times: u64,
    /// What is added to `at` each time.
    pub stride: u64,
}

/// Number of words in a [`Step`].
pub const STEP_WORDS: usize = size_of::<Step>() / 8;

/// What a guest sends in place of a step's number when all steps went as expected.
pub const PASSED: u64 = u64::MAX;

/// Kinds of steps. Each has a result, and either faults, by an exception of the processor, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Kind {
    /// The end of the script.
    End = 0,
    /// Writes `a` to port `at`.
    Output,
    /// Reads port `at`.
    Input,
    /// Writes `b` elements from address `a` on to port `at`, with one instruction.
    OutputString,
    /// Reads `b` elements from port `at` to address `a`, with one instruction.
    InputString,
    /// Writes `a` to address `at`.
    Store,
    /// Reads address `at`.
    Load,
    /// Makes a hypercall by port: `at`, `a` pages, attributes `b`.
    PortCall,
    /// The same by VMMCALL, or on Intel by VMCALL.
    InstructionCall,
    /// KVM's hypercall number `at`, with arguments of 0.
    KvmCall,
    /// Writes `a` to model-specific register `at`.
    WriteMsr,
    /// Reads model-specific register `at`.
    ReadMsr,
    /// CPUID: leaf `at`, sub-leaf `a`; the result is register number `b`.
    Cpuid,
    /// Calls the code at `at`.
    Call,
    /// The result of the step before, and with `a`, must be `b`, and it must not have faulted.
    Expect,
    /// The step before must have faulted.
    ExpectFault,
    /// Waits until what is read at `at`, and with `a`, is `b`.
    Wait,
    /// Writes `b` plus the page's address to the start of each of `a` pages from `at` on.
    Fill,
    /// The result is the number of those pages that begin so.
    CountFilled,
    /// The second vCPU runs the script at address `at`, again and again; 0: it stops.
    Side,
    /// Makes `a` random accesses and calls, see [`crate::mischief`], with seed `b`.
    Mischief,
    /// A triple fault.
    Crash,
    /// Powers off.
    PowerOff,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 23] = [
        Self::End,
        Self::Output,
        Self::Input,
        Self::OutputString,
        Self::InputString,
        Self::Store,
        Self::Load,
        Self::PortCall,
        Self::InstructionCall,
        Self::KvmCall,
        Self::WriteMsr,
        Self::ReadMsr,
        Self::Cpuid,
        Self::Call,
        Self::Expect,
        Self::ExpectFault,
        Self::Wait,
        Self::Fill,
        Self::CountFilled,
        Self::Side,
        Self::Mischief,
        Self::Crash,
        Self::PowerOff,
    ];
}

impl Step {
    /// The step as words.
    #[must_use]
    pub const fn to_words(self) -> [u64; STEP_WORDS] {
        [
            self.kind,
            self.at,
            self.width,
            self.a,
            self.b,
            self.times,
            self.stride,
        ]
    }

    /// The step from its words.
    #[must_use]
    pub const fn from_words(words: [u64; STEP_WORDS]) -> Self {
        let [kind, at, width, a, b, times, stride] = words;
        Self {
            kind,
            at,
            width,
            a,
            b,
            times,
            stride,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_steps_are_numbered_as_they_are_sent() {
        for (number, kind) in (0..).zip(Kind::ALL) {
            assert_eq!(kind as u64, number);
        }
        let words = [1, 2, 3, 4, 5, 6, 7];
        assert_eq!(Step::from_words(words).to_words(), words);
    }
}
