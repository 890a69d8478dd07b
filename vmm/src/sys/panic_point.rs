//! Panics on purpose, for the test of what becomes of a machine then.

/// In a debug build, panics if the calling thread has the name that stands in `EBB_PANIC`. Every thread that sees what a
/// guest or a client has made comes here once in each round of its work. In a release build this is nothing.
#[inline]
pub fn panic_point() {
    #[cfg(debug_assertions)]
    if let Some(name) = std::thread::current().name() {
        panic_point_at(name);
    }
}

/// As [`panic_point`], at a place that no thread's name says: `building`, or in the process `ebb-guardian`.
#[inline]
pub fn panic_point_at(place: &str) {
    #[cfg(debug_assertions)]
    {
        use std::sync::LazyLock;

        static PLACE: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("EBB_PANIC").ok());
        assert!(PLACE.as_deref() != Some(place), "on purpose, by EBB_PANIC");
    }
    #[cfg(not(debug_assertions))]
    let _ = place;
}
