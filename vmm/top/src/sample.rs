//! What is shown of each machine: its state now, and how its counters have moved since it was last looked at.

use std::collections::VecDeque;
use std::time::Instant;

use ebb_vmm::api::machines::Machine;
use ebb_vmm::control::InstanceState;

use crate::seconds;

/// Looks that a sparkline goes back.
pub const HISTORY: usize = 120;

/// All machines, in the order of their process ids.
#[derive(Default)]
pub struct View {
    /// One row for each.
    pub rows: Vec<Row>,
    /// The process id of the one whose details are shown.
    selected: Option<u32>,
}

/// A machine.
#[derive(Default)]
pub struct Row {
    /// What it has answered.
    pub machine: Machine,
    /// Of the last interval.
    pub rates: Rates,
    /// Resident bytes, the latest last.
    pub resident: VecDeque<u64>,
    /// Bytes a second that went to the host, the latest last.
    pub taken: VecDeque<u64>,
    /// Kicks a second, the latest last.
    pub kicks: VecDeque<u64>,
    at: Option<Instant>,
}

/// How counters move, each in units a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Bytes that the guest frees lazily.
    pub freed: u64,
    /// Bytes that it takes back.
    pub reused: u64,
    /// Bytes that the host takes, of lazily free memory and by the kernel's free lists.
    pub taken: u64,
    /// Kicks of vCPUs.
    pub kicks: u64,
    /// Microseconds that vCPUs were kept out.
    pub paused_us: u64,
}

impl View {
    /// Takes what the machines have answered at this time.
    pub fn take(&mut self, machines: &[Machine], now: Instant) {
        let mut old = std::mem::take(&mut self.rows);
        for machine in machines {
            // The same process, not another one with its number.
            let is_same = |row: &Row| row.machine.pid == machine.pid && name(row) == id(machine);
            let row = old.iter().position(is_same).map(|at| old.swap_remove(at));
            let mut row = row.unwrap_or_default();
            row.take(machine.clone(), now);
            self.rows.push(row);
        }
        if !self
            .rows
            .iter()
            .any(|row| Some(row.machine.pid) == self.selected)
        {
            self.selected = self.rows.first().map(|row| row.machine.pid);
        }
    }

    /// The index of the row whose details are shown; `None` if there are no machines.
    pub fn selection(&self) -> Option<usize> {
        let is_it = |row: &Row| Some(row.machine.pid) == self.selected;
        self.rows.iter().position(is_it)
    }

    /// Moves the selection.
    pub fn select(&mut self, step: isize) {
        let last = self.rows.len().saturating_sub(1);
        let now = self.selection().unwrap_or_default();
        let next = now.saturating_add_signed(step).min(last);
        self.selected = self.rows.get(next).map(|row| row.machine.pid);
    }
}

fn id(machine: &Machine) -> &str {
    machine.info.as_ref().map_or("-", |info| &info.id)
}

/// The machine's name.
pub fn name(row: &Row) -> &str {
    id(&row.machine)
}

impl Row {
    fn take(&mut self, machine: Machine, now: Instant) {
        if let Some(at) = self.at {
            self.rates = rates(&self.machine, &machine, seconds(now.duration_since(at)));
            remember(&mut self.taken, self.rates.taken);
            remember(&mut self.kicks, self.rates.kicks);
        }
        remember(&mut self.resident, machine.resident_bytes);
        self.at = Some(now);
        self.machine = machine;
    }

    /// What it is doing, in a word.
    pub fn state(&self) -> &'static str {
        match (&self.machine.info, &self.machine.trouble) {
            (None, _) | (_, Some(_)) => "no answer",
            (Some(info), None) => match info.state {
                InstanceState::NotStarted => "waiting",
                InstanceState::Building => "building",
                InstanceState::Running => "running",
                InstanceState::Paused => "paused",
            },
        }
    }
}

fn remember(values: &mut VecDeque<u64>, value: u64) {
    if values.len() == HISTORY {
        values.pop_front();
    }
    values.push_back(value);
}

fn rates(before: &Machine, now: &Machine, seconds: f64) -> Rates {
    let (Some(before), Some(now)) = (&before.lazy_memory, &now.lazy_memory) else {
        return Rates::default();
    };
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a number to look at"
    )]
    let rate = |before: u64, now: u64| (now.saturating_sub(before) as f64 / seconds) as u64;
    let taken = |it: &ebb_vmm::control::LazyMemoryState| {
        it.lazy
            .reclaimed_bytes_total
            .saturating_add(it.free_pages.stats.taken_bytes_total)
    };
    Rates {
        freed: rate(before.lazy.freed_bytes_total, now.lazy.freed_bytes_total),
        reused: rate(before.lazy.reused_bytes_total, now.lazy.reused_bytes_total),
        taken: rate(taken(before), taken(now)),
        kicks: rate(before.gate.kicks_total, now.gate.kicks_total),
        paused_us: rate(before.gate.pause_us_total, now.gate.pause_us_total),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ebb_vmm::control::{InstanceInfo, LazyMemoryState};

    use super::*;

    fn machine(pid: u32, freed: u64) -> Machine {
        let mut lazy = LazyMemoryState::default();
        lazy.lazy.freed_bytes_total = freed;
        Machine {
            pid,
            info: Some(InstanceInfo::default()),
            lazy_memory: Some(lazy),
            ..Machine::default()
        }
    }

    #[test]
    fn rates_are_by_the_second_and_history_is_bounded() {
        let mut view = View::default();
        let start = Instant::now();
        view.take(&[machine(1, 0)], start);
        view.take(&[machine(1, 1000)], start + Duration::from_secs(2));
        assert_eq!(view.rows[0].rates.freed, 500);
        // A counter that falls is that of another machine.
        view.take(&[machine(1, 10)], start + Duration::from_secs(3));
        assert_eq!(view.rows[0].rates.freed, 0);
        for second in 4..500 {
            view.take(&[machine(1, 0)], start + Duration::from_secs(second));
        }
        assert_eq!(view.rows[0].resident.len(), HISTORY);
    }

    #[test]
    fn the_selection_stays_with_its_machine() {
        let mut view = View::default();
        let now = Instant::now();
        view.take(&[], now);
        view.select(1);
        assert_eq!(view.selection(), None);
        view.take(&[machine(1, 0), machine(2, 0), machine(3, 0)], now);
        view.select(1);
        view.take(&[machine(2, 0), machine(3, 0)], now);
        assert_eq!(view.selection(), Some(0));
        view.select(isize::MAX);
        assert_eq!(view.selection(), Some(1));
        view.take(&[machine(2, 0)], now);
        assert_eq!(view.selection(), Some(0));
    }
}
