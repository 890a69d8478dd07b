//! Whose turn it is to reclaim: one order's at a time, the most urgent one's first, and nobody's after the stop.
//!
//! An order takes a turn for a few steps, asks between two of them whether it may go on, and gives the turn back while it
//! rests. So an order never waits for more than one step of a less urgent one.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long an order that waits looks at nothing but its turn, if something else may end it.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// What an order wants a turn for. Of two turns the greater one goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    /// Fragments: much work for few bytes.
    Fragments,
    /// Whole blocks and granules.
    Blocks,
}

/// What ends an order before it is done, beside the stop.
#[derive(Clone, Copy, Default)]
pub struct Until<'a> {
    /// It is too late.
    pub deadline: Option<Instant>,
    /// Returns true if something else is due. Is called between two steps, by any of the order's threads.
    pub other: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl Until<'_> {
    /// Ends the order after `timeout`, if that is given.
    #[must_use]
    pub fn after(timeout: Option<Duration>) -> Self {
        Self {
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            other: None,
        }
    }

    fn is_over(&self) -> bool {
        let late = self.deadline.is_some_and(|at| Instant::now() >= at);
        late || self.other.is_some_and(|other| other())
    }
}

/// The order ends before it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended;

/// An order's place in the line.
pub(super) struct Ticket<'a> {
    id: u64,
    urgent: bool,
    until: Until<'a>,
}

/// Urgent orders come first, then those that take whole blocks, then those that came first.
type Place = (Reverse<(bool, Work)>, u64);

#[derive(Default)]
struct Line {
    stopped: bool,
    /// An order has the turn.
    taken: bool,
    next_id: u64,
    /// The orders that could work now.
    waiting: BTreeSet<Place>,
}

/// Gives the turns.
#[derive(Default)]
pub(super) struct Turns {
    line: Mutex<Line>,
    changed: Condvar,
}

impl Turns {
    /// A place in the line for a new order.
    pub fn ticket<'a>(&self, urgent: bool, until: Until<'a>) -> Ticket<'a> {
        let mut line = self.line();
        line.next_id += 1;
        Ticket {
            id: line.next_id,
            urgent,
            until,
        }
    }

    /// Waits for a turn, which does not begin before `not_before`.
    ///
    /// # Errors
    /// [`Ended`] after the stop, or when the order's own end has come.
    pub fn take<'a>(
        &'a self,
        ticket: &'a Ticket<'_>,
        work: Work,
        not_before: Option<Instant>,
    ) -> Result<Turn<'a>, Ended> {
        let place = (Reverse((ticket.urgent, work)), ticket.id);
        loop {
            let (over, now) = (ticket.until.is_over(), Instant::now());
            let mut line = self.line();
            if over || line.stopped {
                line.waiting.remove(&place);
                self.changed.notify_all();
                return Err(Ended);
            }
            let rest = not_before.map(|at| at.saturating_duration_since(now));
            let rest = rest.filter(|rest| !rest.is_zero());
            if rest.is_none() {
                line.waiting.insert(place);
                if !line.taken && line.waiting.first() == Some(&place) {
                    line.waiting.remove(&place);
                    line.taken = true;
                    return Ok(Turn {
                        turns: self,
                        until: ticket.until,
                        place,
                    });
                }
            }
            let deadline = ticket.until.deadline;
            let ends = deadline.map(|at| at.saturating_duration_since(now));
            let watch = ticket.until.other.map(|_| WATCH_INTERVAL);
            match [rest, ends, watch].into_iter().flatten().min() {
                Some(time) => drop(self.changed.wait_timeout(line, time)),
                None => drop(self.changed.wait(line)),
            }
        }
    }

    /// Ends all orders, and each later one.
    pub fn stop(&self) {
        self.line().stopped = true;
        self.changed.notify_all();
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of orders that could work now and wait for their turn.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.line().waiting.len()
    }
}

/// An order's turn, until this is dropped.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    until: Until<'a>,
    place: Place,
}

impl Turn<'_> {
    /// Returns true if one more step may follow: the order has not ended, and none is waiting that goes first.
    pub fn goes_on(&self) -> bool {
        if self.until.is_over() {
            return false;
        }
        let line = self.turns.line();
        let first = line.waiting.first();
        !line.stopped && first.is_none_or(|first| *first > self.place)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.line().taken = false;
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn until_waiting(turns: &Turns, orders: usize) {
        while turns.waiting() != orders {
            thread::yield_now();
        }
    }

    #[test]
    fn the_most_urgent_goes_first_then_blocks_then_the_oldest() {
        let turns = Turns::default();
        let log = Mutex::new(Vec::new());
        let orders = [
            (false, Work::Fragments),
            (false, Work::Blocks),
            (true, Work::Fragments),
            (true, Work::Blocks),
            (true, Work::Blocks),
        ];
        let first = turns.ticket(false, Until::default());
        let turn = turns.take(&first, Work::Fragments, None).unwrap();
        thread::scope(|scope| {
            for (number, &(urgent, work)) in orders.iter().enumerate() {
                let ticket = turns.ticket(urgent, Until::default());
                let (turns, log) = (&turns, &log);
                scope.spawn(move || {
                    let _turn = turns.take(&ticket, work, None).unwrap();
                    log.lock().unwrap().push(number);
                });
            }
            until_waiting(&turns, orders.len());
            assert!(!turn.goes_on());
            drop(turn);
        });
        assert_eq!(*log.lock().unwrap(), [3, 4, 2, 1, 0]);
    }

    #[test]
    fn only_who_goes_first_interrupts() {
        let turns = Turns::default();
        let interrupted = |mine: (bool, Work), theirs: (bool, Work)| {
            let ticket = turns.ticket(mine.0, Until::default());
            let turn = turns.take(&ticket, mine.1, None).unwrap();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let later = turns.ticket(theirs.0, Until::default());
                    drop(turns.take(&later, theirs.1, None));
                });
                until_waiting(&turns, 1);
                let interrupted = !turn.goes_on();
                drop(turn);
                interrupted
            })
        };
        let [background, urgent] = [false, true];
        assert!(interrupted(
            (background, Work::Blocks),
            (urgent, Work::Fragments)
        ));
        assert!(interrupted(
            (urgent, Work::Fragments),
            (urgent, Work::Blocks)
        ));
        assert!(!interrupted((urgent, Work::Blocks), (urgent, Work::Blocks)));
        assert!(!interrupted(
            (urgent, Work::Fragments),
            (background, Work::Blocks)
        ));
    }

    #[test]
    fn who_rests_keeps_nobody_waiting_and_the_stop_ends_the_rest() {
        let turns = Turns::default();
        thread::scope(|scope| {
            let resting = scope.spawn(|| {
                let ticket = turns.ticket(true, Until::default());
                let at = Instant::now() + LONG;
                turns.take(&ticket, Work::Fragments, Some(at)).err()
            });
            let ticket = turns.ticket(false, Until::default());
            let turn = turns.take(&ticket, Work::Fragments, None).unwrap();
            assert!(turn.goes_on());
            turns.stop();
            assert!(!turn.goes_on());
            assert_eq!(resting.join().unwrap(), Some(Ended));
            drop(turn);
            assert!(turns.take(&ticket, Work::Blocks, None).is_err());
        });
    }

    #[test]
    fn an_order_ends_when_its_end_has_come_and_leaves_the_line() {
        let turns = Turns::default();
        let first = turns.ticket(false, Until::default());
        let turn = turns.take(&first, Work::Fragments, None).unwrap();
        let late = Until::after(Some(Duration::from_millis(5)));
        let ticket = turns.ticket(true, late);
        assert!(turns.take(&ticket, Work::Blocks, None).is_err());
        let due = AtomicBool::new(false);
        let other = || due.load(Ordering::Relaxed);
        let until = Until {
            deadline: None,
            other: Some(&other),
        };
        let ticket = turns.ticket(true, until);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| turns.take(&ticket, Work::Blocks, None).err());
            until_waiting(&turns, 1);
            due.store(true, Ordering::Relaxed);
            assert_eq!(waiting.join().unwrap(), Some(Ended));
        });
        assert_eq!(turns.waiting(), 0);
        assert!(turn.goes_on());
    }

    #[test]
    fn an_order_is_over_when_it_is_late_or_something_else_is_due() {
        let over = |timeout| Until::after(timeout).is_over();
        assert!(!over(None) && !over(Some(LONG)) && over(Some(Duration::ZERO)));
        for due in [true, false] {
            let until = Until {
                other: Some(&|| due),
                ..Until::after(Some(LONG))
            };
            assert_eq!(until.is_over(), due);
        }
    }

    #[test]
    fn a_turn_does_not_begin_before_its_time() {
        let turns = Turns::default();
        let asked = AtomicBool::new(false);
        let again = || asked.swap(true, Ordering::Relaxed);
        let until = Until {
            other: Some(&again),
            ..Until::default()
        };
        let (ticket, now) = (turns.ticket(false, until), Instant::now());
        let early = turns.take(&ticket, Work::Blocks, Some(now + LONG));
        assert_eq!(early.err(), Some(Ended), "when it was asked again");
        asked.store(false, Ordering::Relaxed);
        assert!(turns.take(&ticket, Work::Blocks, Some(now)).is_ok());
    }
}
