//! What the output of a test binary says of its failures.

/// Whether a failed test has shown a guest that broke or went silent, rather than an assertion that did not hold.
/// An emulated processor does that to kernels now and then, on a busy host above all; the nested machine's own kernel,
/// which runs below all of our code, suffers it too.
pub fn kernel_broke(printed: &[u8]) -> bool {
    let text = String::from_utf8_lossy(printed);
    let signs = [
        "Oops:",
        "Kernel panic - not syncing",
        "BUG: ",
        ": triple fault",
        ": not within ",
    ];
    signs.iter().any(|sign| text.contains(sign))
}

/// The tests that failed, by the list at the end of libtest's output; none when it did not come so far.
pub fn failed_tests(printed: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(printed);
    let Some((_, list)) = text.rsplit_once("\nfailures:\n") else {
        return Vec::new();
    };
    list.lines()
        .map_while(|line| line.strip_prefix("    "))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_kernel_is_told_from_a_failed_assertion() {
        assert!(kernel_broke(
            b"[    1.2] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"
        ));
        assert!(kernel_broke(b"ERROR ebb_vmm::vcpu: vCPU 0: triple fault"));
        assert!(kernel_broke(b"no \"ready\": not within 120 s"));
        assert!(!kernel_broke(b"assertion `left == right` failed"));
    }

    #[test]
    fn failed_tests_are_named_after_what_they_printed() {
        let printed = b"test a ... FAILED\n\nfailures:\n\n---- a stdout ----\n    no\n\nfailures:\n    a\n    m::b\n\n\
                        test result: FAILED. 1 passed\n";
        assert_eq!(failed_tests(printed), ["a", "m::b"]);
        assert!(failed_tests(b"test a ... ok\n\ntest result: ok\n").is_empty());
    }
}
