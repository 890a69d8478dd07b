//! What a call returns: a signed number, negative for errors. KVM itself returns the same numbers for calls that it
//! does not pass on (Linux, `include/uapi/linux/kvm_para.h`).

/// Why a call failed. Unless the text says otherwise, nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Error {
    /// VMCALL or VMMCALL was executed outside privilege level 0. This comes from KVM; the monitor never sees the
    /// call.
    Permission = -1,
    /// A block is not in the guest's RAM.
    Fault = -14,
    /// A range or a block is not aligned to pages, is empty, wraps, or is not wholly RAM; a count is 0 or too large;
    /// a bit is set that must be 0. A batch has processed the descriptors before the bad one.
    Invalid = -22,
    /// The monitor's tracker is full: some of the memory, or all, stays in use. A batch has processed all its
    /// descriptors.
    NoSpace = -28,
    /// There is no such operation; or, from KVM, the monitor does not offer the interface.
    NoSuchCall = -1000,
}

impl Error {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Permission,
        Self::Fault,
        Self::Invalid,
        Self::NoSpace,
        Self::NoSuchCall,
    ];

    /// The status that the guest gets.
    #[must_use]
    pub const fn code(self) -> i64 {
        self as i64
    }
}

/// The status of `REUSE`, `REUSE_BATCH` and `RESET` if no lazy range is left in the machine, like `ENOMEM` of
/// `MADV_REUSE`. It is not an error.
pub const LAST_RANGE: i64 = 12;

/// A call succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Success {
    /// Done; 0.
    Done,
    /// Done, and no lazy range is left; [`LAST_RANGE`].
    LastRange,
    /// The operation returns a number of its own.
    Value(u32),
}

impl Success {
    /// The status that the guest gets.
    #[must_use]
    pub const fn code(self) -> i64 {
        match self {
            Self::Done => 0,
            Self::LastRange => LAST_RANGE,
            Self::Value(value) => (value & (u32::MAX >> 1)) as i64,
        }
    }
}

/// The status for `result`.
#[must_use]
pub const fn encode(result: Result<Success, Error>) -> i64 {
    match result {
        Ok(success) => success.code(),
        Err(error) => error.code(),
    }
}

/// The meaning of `status`. An unknown negative number means [`Error::NoSuchCall`]: later versions add no errors to
/// the present operations.
///
/// # Errors
/// The error of the call.
pub fn decode(status: i64) -> Result<Success, Error> {
    match status {
        0 => Ok(Success::Done),
        LAST_RANGE => Ok(Success::LastRange),
        _ if status > 0 => Ok(Success::Value(
            u32::try_from(status).map_err(|_| Error::NoSuchCall)?,
        )),
        _ => {
            let known = Error::ALL.into_iter().find(|error| error.code() == status);
            Err(known.unwrap_or(Error::NoSuchCall))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        for error in Error::ALL {
            assert_eq!(decode(encode(Err(error))), Err(error));
        }
        for success in [Success::Done, Success::LastRange, Success::Value(77)] {
            assert_eq!(decode(encode(Ok(success))), Ok(success));
        }
        for odd in [i64::MIN, -2, i64::MAX] {
            assert_eq!(decode(odd), Err(Error::NoSuchCall));
        }
    }
}
