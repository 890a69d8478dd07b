//! Deliberate mistakes that the models in `tests/models` must catch.
//!
//! A model that passes proves little unless it fails when the code is wrong. `fault_point!("name")` is true
//! while a model has armed that name, and the code then does the wrong thing. In a build without loom it is the
//! constant `false`.

/// Returns true if the named mistake is to be made.
#[cfg(not(loom))]
macro_rules! fault_point {
    ($name:literal) => {
        false
    };
}

/// Returns true if the named mistake is to be made.
#[cfg(loom)]
macro_rules! fault_point {
    ($name:literal) => {
        $crate::fault::is_armed($name)
    };
}

pub(crate) use fault_point;

#[cfg(loom)]
std::thread_local! {
    // loom runs all threads of a model on the thread that explores it.
    static ARMED: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Returns true if `name` is armed.
#[cfg(loom)]
pub(crate) fn is_armed(name: &str) -> bool {
    ARMED.get() == Some(name)
}

/// Arms one fault point for the models that this thread explores; `None` disarms all.
#[cfg(loom)]
pub fn arm(name: Option<&'static str>) {
    ARMED.set(name);
}
