//! Waits for conditions, with a limit.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::host::monitors;

/// How often a condition is looked at.
const PERIOD: Duration = Duration::from_millis(100);

/// Long enough for anything that a guest does on an emulated machine with other work to do.
pub const LONG: Duration = Duration::from_secs(300);

/// Asks until there is an answer.
///
/// # Errors
/// The first error of `probe`, or that the time is up.
pub fn until<T>(
    what: impl Display,
    limit: Duration,
    probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    every(PERIOD, what, limit, probe)
}

/// As [`until`], but looks each millisecond: for what is measured, or soon to come.
///
/// # Errors
/// As for [`until`].
pub fn until_often<T>(
    what: impl Display,
    limit: Duration,
    probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    every(Duration::from_millis(1), what, limit, probe)
}

fn every<T>(
    period: Duration,
    what: impl Display,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            return Err(Error::new(format!(
                "{what}: not within {} s{}",
                limit.as_secs_f32(),
                monitors()
            )));
        }
        thread::sleep(period);
    }
}

/// Asks until a value has not changed for `quiet`, and returns it.
///
/// # Errors
/// As for [`until`].
pub fn settled<T: PartialEq>(
    what: impl Display,
    quiet: Duration,
    mut probe: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut last = (probe()?, Instant::now());
    until(what, LONG, || {
        let value = probe()?;
        if value != last.0 {
            last = (value, Instant::now());
            return Ok(None);
        }
        Ok((last.1.elapsed() >= quiet).then_some(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_awaited_and_given_up() {
        let mut count = 0;
        let found = until("three", LONG, || {
            count += 1;
            Ok((count == 3).then_some(count))
        });
        assert_eq!(found.unwrap(), 3);
        let error = until("never", Duration::ZERO, || Ok(None::<()>)).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("never: not within 0 s"), "{text}");
    }

    #[test]
    fn a_value_that_moves_has_not_settled() {
        let mut values = [1, 2, 2, 2].into_iter();
        let settled = settled("value", PERIOD, || Ok(values.next().unwrap_or(2))).unwrap();
        assert_eq!(settled, 2);
    }
}
