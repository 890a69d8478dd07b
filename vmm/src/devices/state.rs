//! What a snapshot keeps of a device.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A device whose state can be saved while the machine is paused, and restored in a machine that has not run yet. The state is
/// a plain structure beside the device.
pub trait SaveState: Send {
    /// Its state.
    ///
    /// # Errors
    /// What the device is called, and what to do without it: it cannot be saved.
    fn save(&self) -> Result<Value, String>;

    /// Takes up a state.
    ///
    /// # Errors
    /// Why the state is none of this device.
    fn restore(&mut self, state: &Value) -> Result<(), String>;
}

/// A state as a value.
///
/// # Errors
/// It has no form in JSON.
pub fn to_value(state: &impl Serialize) -> Result<Value, String> {
    serde_json::to_value(state).map_err(|error| error.to_string())
}

/// A value as a state.
///
/// # Errors
/// It is another device's.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| error.to_string())
}
