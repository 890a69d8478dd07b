//! `--event-monitor`: what happens to a machine, as JSON in lines. Whoever has something to tell does so by
//! `event!`, which costs a load where nobody listens.

use std::fmt::{self, Debug, Display};
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, FilterFn, filter_fn};
use tracing_subscriber::layer::{Context, Filter};
use tracing_subscriber::registry::LookupSpan;

use super::{Lines, Outlet};
use crate::sys;

/// The target of events; others go to the log.
const TARGET: &str = "ebb::event";

/// Bytes of events that may wait to be written.
const CAPACITY: usize = 256 << 10;

/// Where events go: a file or FIFO by its path, or an open descriptor by its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventTarget {
    /// A path.
    Path(PathBuf),
    /// A descriptor that this process was started with.
    Descriptor(i32),
}

impl Display for EventTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Descriptor(number) => write!(f, "fd={number}"),
        }
    }
}

impl FromStr for EventTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("fd=") {
            Some(number) => match number.parse() {
                Ok(number @ 0..) => Ok(Self::Descriptor(number)),
                _ => Err(format!(
                    "fd={number}: write the number of an open descriptor"
                )),
            },
            None => Ok(Self::Path(
                text.strip_prefix("path=").unwrap_or(text).into(),
            )),
        }
    }
}

/// The file of events. Clones are the same.
#[derive(Clone, Debug)]
pub struct EventFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The machine's name.
    machine: String,
    /// Until there is a thread that writes them.
    lines: Mutex<Option<Lines>>,
    outlet: OnceLock<Outlet>,
}

impl EventFile {
    /// Opens the target, for events of the machine of this name. What happens before a thread writes them is not told.
    ///
    /// # Errors
    /// open(2)'s or fcntl(2)'s, with the remedy.
    pub fn open(target: &EventTarget, machine: &str) -> Result<Self, String> {
        let opened = match target {
            EventTarget::Path(path) => Lines::open(path),
            EventTarget::Descriptor(number) => sys::inherited_file(*number).map(Lines::to),
        };
        let lines = opened.map_err(|error| {
            format!("--event-monitor {target}: {error}; name a file that you may write, or an open descriptor")
        })?;
        Ok(Self(Arc::new(Inner {
            machine: machine.to_owned(),
            lines: Mutex::new(Some(lines)),
            outlet: OnceLock::new(),
        })))
    }

    /// From now on a thread, `ebb-events`, writes them.
    ///
    /// # Errors
    /// The thread could not be started.
    pub(super) fn start(&self) -> io::Result<()> {
        let mut lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lines) = lines.take() {
            let outlet = Outlet::of_json("ebb-events", CAPACITY, lines)?;
            // Nobody else has had the lines.
            let _ = self.0.outlet.set(outlet);
        }
        Ok(())
    }

    /// Bytes that were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.0.outlet.get().map_or(0, Outlet::dropped)
    }

    /// Waits until all is written, see [`Outlet::finish`].
    pub(super) fn finish(&self) {
        if let Some(outlet) = self.0.outlet.get() {
            outlet.finish();
        }
    }

    /// Takes events, and nothing else.
    pub fn layer<S>(self) -> impl Layer<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        Listener(self).with_filter(only(|it| it.target() == TARGET, LevelFilter::INFO))
    }
}

/// Lets through what `level` does, and no events: the filter of the log.
pub fn for_log<S>(level: impl Filter<S>) -> impl Filter<S> {
    level.and(only(|it| it.target() != TARGET, LevelFilter::TRACE))
}

fn only(
    is_wanted: fn(&Metadata<'_>) -> bool,
    most: LevelFilter,
) -> FilterFn<fn(&Metadata<'_>) -> bool> {
    filter_fn(is_wanted).with_max_level_hint(most)
}

struct Listener(EventFile);

impl<S: Subscriber> Layer<S> for Listener {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let Inner {
            machine, outlet, ..
        } = &*self.0.0;
        if let Some(outlet) = outlet.get() {
            outlet.put(line(machine, event).as_bytes());
        }
    }
}

fn line(machine: &str, event: &Event<'_>) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |it| it.as_millis() as u64);
    let mut fields = Fields(Map::new());
    fields.0.insert("timestamp_ms".to_owned(), now.into());
    fields.0.insert("machine".to_owned(), machine.into());
    event.record(&mut fields);
    format!("{}\n", Value::Object(fields.0))
}

/// The fields of an event.
struct Fields(Map<String, Value>);

impl Fields {
    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.set(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    use tracing::subscriber::with_default;
    use tracing_subscriber::fmt;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::output::Log;

    /// What stands in the events and in the log of level `level` when `tell` has run.
    fn told(level: LevelFilter, tell: impl Fn(&EventFile)) -> (String, String) {
        let folder = tempfile::tempdir().unwrap();
        let [events, log] = ["events", "log"].map(|name| folder.path().join(name));
        let file = EventFile::open(&EventTarget::Path(events.clone()), "web").unwrap();
        let lines = fmt::layer().with_writer(Arc::new(Log::to_file(&log).unwrap()));
        let subscriber = tracing_subscriber::registry()
            .with(lines.with_filter(for_log(level)))
            .with(file.clone().layer());
        with_default(subscriber, || tell(&file));
        file.finish();
        (
            fs::read_to_string(events).unwrap(),
            fs::read_to_string(log).unwrap(),
        )
    }

    #[test]
    fn events_are_json_in_lines() {
        let tell = |number: u64| {
            event!("test", number, name = "a \"b\"", shown = %number, debug = ?Some(1), on = true);
            tracing::info!("for the log");
        };
        let (events, _) = told(LevelFilter::TRACE, |file| {
            tell(1);
            file.start().unwrap();
            tell(2);
        });
        let lines: Vec<Value> = events
            .lines()
            .map(|it| serde_json::from_str(it).unwrap())
            .collect();
        let [line] = lines.as_slice() else {
            panic!("what comes before the start is not told: {events}");
        };
        let field = |name: &str| line[name].clone();
        assert_eq!(field("event"), "test");
        assert_eq!(field("machine"), "web");
        assert_eq!(field("number"), 2);
        assert_eq!(field("on"), true);
        assert_eq!(field("name"), "a \"b\"");
        assert_eq!(field("shown"), "2");
        assert_eq!(field("debug"), "Some(1)");
        assert!(field("timestamp_ms").as_u64().unwrap() > 1_600_000_000_000);
    }

    #[test]
    fn log_and_events_are_apart() {
        for (level, lines) in [
            (LevelFilter::OFF, 0),
            (LevelFilter::WARN, 1),
            (LevelFilter::TRACE, 2),
        ] {
            let (events, log) = told(level, |file| {
                file.start().unwrap();
                event!("test");
                tracing::info!("one");
                tracing::warn!("two");
            });
            assert_eq!(events.lines().count(), 1, "{level}: {events}");
            assert_eq!(log.lines().count(), lines, "{level}: {log}");
            assert!(!log.contains("event="), "{log}");
        }
    }

    #[test]
    fn events_that_nobody_takes_are_dropped_and_counted() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let target = EventTarget::Descriptor(writer.as_raw_fd());
        let file = EventFile::open(&target, "web").unwrap();
        drop(writer);
        file.start().unwrap();
        let text = "x".repeat(1000);
        let subscriber = tracing_subscriber::registry().with(file.clone().layer());
        // More than the pipe and the buffer hold together.
        with_default(subscriber, || (0..400).for_each(|_| event!("test", text)));
        let dropped = file.dropped();
        assert!(dropped > 0);
        // Reads until the file's descriptor is closed, too.
        let reader = std::thread::spawn(move || {
            let mut read = String::new();
            reader.read_to_string(&mut read).map(|_| read)
        });
        file.finish();
        let read = reader.join().unwrap().unwrap();
        let told = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            line["dropped_bytes"].as_u64()
        };
        assert_eq!(read.lines().filter_map(told).sum::<u64>(), dropped);
    }

    #[test]
    fn a_target_is_a_path_or_a_descriptor() {
        let parse = |text: &str| text.parse::<EventTarget>();
        assert_eq!(parse("fd=7"), Ok(EventTarget::Descriptor(7)));
        assert_eq!(parse("path=/e"), Ok(EventTarget::Path("/e".into())));
        assert_eq!(parse("/e"), Ok(EventTarget::Path("/e".into())));
        for text in ["fd=", "fd=-1", "fd=x"] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("open descriptor"), "{error}");
        }
        let closed = EventFile::open(&EventTarget::Descriptor(1_000_000), "web");
        let error = closed.unwrap_err();
        assert!(error.contains("fd=1000000: Bad file descriptor"), "{error}");
    }
}
