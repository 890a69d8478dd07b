//! Where the log and the events of a machine go.

use std::path::PathBuf;
use std::sync::Arc;

use ebb_vmm::output::{EventFile, EventTarget, Log, for_log};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Options of every command that runs a machine.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Outputs {
    /// Write the log to this file instead of standard error
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// Append what happens to the machine to this file, FIFO or open descriptor, as JSON in lines
    #[arg(long, value_name = "FILE|fd=N")]
    event_monitor: Option<EventTarget>,
    /// Log more: -v for information, -vv for debugging
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Outputs {
    /// The files, by option.
    pub fn files(&mut self) -> Vec<(&'static str, &mut PathBuf)> {
        let log = self.log_file.as_mut().map(|path| ("--log-file", path));
        let events = match &mut self.event_monitor {
            Some(EventTarget::Path(path)) => Some(("--event-monitor", path)),
            _ => None,
        };
        log.into_iter().chain(events).collect()
    }

    /// The open descriptor for events, if they go to one.
    pub const fn descriptor(&self) -> Option<i32> {
        match self.event_monitor {
            Some(EventTarget::Descriptor(number)) => Some(number),
            _ => None,
        }
    }

    /// Sends log and events of the machine of this name where the operator wants them. To be called once.
    ///
    /// # Errors
    /// A file cannot be written; the text names the option and the remedy.
    pub fn start(self, machine: &str) -> Result<Log, String> {
        let level = match self.verbose {
            0 => LevelFilter::WARN,
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        };
        let log = match self.log_file {
            None => Log::to_stderr(),
            Some(path) => Log::to_file(&path).map_err(|error| {
                format!(
                    "--log-file {}: {error}; name a file that you may write",
                    path.display()
                )
            })?,
        };
        let lines = tracing_subscriber::fmt::layer().with_writer(Arc::new(log.clone()));
        let events = open_events(self.event_monitor.as_ref(), machine, &log)?;
        tracing_subscriber::registry()
            .with(lines.with_filter(for_log(level)))
            .with(events.map(EventFile::layer))
            .init();
        Ok(log)
    }
}

/// Opens the file of events, which starts and ends with `log`.
///
/// # Errors
/// It cannot be written; the text names the option and the remedy.
pub fn open_events(
    target: Option<&EventTarget>,
    machine: &str,
    log: &Log,
) -> Result<Option<EventFile>, String> {
    let events = target.map(|target| EventFile::open(target, machine));
    let events = events.transpose()?;
    events.iter().cloned().for_each(|it| log.set_events(it));
    Ok(events)
}
