//! Panics on purpose, for the test of what becomes of a machine then.

/// In a debug build, panics if the calling thread has the name that stands in `EBB_PANIC`. Every thread that sees what a
/// guest or a client has made comes here once in each round of its work. In a release build this is nothing.
#[inline]
pub fn panic_point() {
    #[cfg(debug_assertions)]
    {
        use std::sync::LazyLock;

        static THREAD: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("EBB_PANIC").ok());
        let name = THREAD.as_deref();
        assert!(
            name.is_none() || std::thread::current().name() != name,
            "on purpose, by EBB_PANIC"
        );
    }
}
