//! Sources whose triggers and files are those of the test.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendFlags, send};

use super::*;

/// Longer than a test may wait.
const LONG: Duration = Duration::from_secs(20);
const DAY: Duration = Duration::from_hours(24);

fn not_stopped() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn with_triggers(host: impl Into<OwnedFd>, own: impl Into<OwnedFd>) -> PressureSource {
    PressureSource {
        host: Some(PsiTrigger::from_file(host.into())),
        own: Some(PsiTrigger::from_file(own.into())),
        ..PressureSource::watermark_only()
    }
}

/// Two ends of a connection. The second one polls `POLLPRI` after the first one has sent urgent data.
fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (sender, listener.accept().unwrap().0)
}

#[test]
fn a_trigger_that_fires_ends_the_wait_and_a_stall_is_one_of_the_own_cgroup() {
    for own in [true, false] {
        let (host_end, own_end) = (connection(), connection());
        let mut source = with_triggers(host_end.1, own_end.1);
        assert!(!source.is_reported());
        let sender = if own { &own_end.0 } else { &host_end.0 };
        send(sender, &[1], SendFlags::OOB).unwrap();
        // Else this would not end.
        let sample = source.wait(not_stopped().as_fd(), DAY).unwrap().unwrap();
        assert_eq!(sample.stalled, own);
        assert!(source.host.is_some() && source.own.is_some());
    }
}

/// The kernel tells a stall once. Whoever has asked whether there is one must not keep the next wait from it.
#[test]
fn what_was_heard_between_two_waits_ends_the_next_one() {
    for (heard, stalled) in [(STALL, false), (STALL | OWN_STALL, true)] {
        let mut source = PressureSource::watermark_only();
        source.heard.store(heard, Relaxed);
        assert!(source.is_reported() && source.is_reported());
        let sample = source.wait(not_stopped().as_fd(), LONG).unwrap().unwrap();
        assert_eq!(sample.stalled, stalled);
        assert!(!source.is_reported());
    }
    let (host, own) = (connection(), connection());
    let source = with_triggers(host.1, own.1);
    send(&own.0, &[1], SendFlags::OOB).unwrap();
    // The other end of the connection may take a moment.
    while !source.is_reported() {}
    assert_eq!(source.heard.load(Relaxed), STALL | OWN_STALL);
}

#[test]
fn a_trigger_that_fails_is_no_stall_and_is_given_up() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let quiet = connection();
    let mut source = with_triggers(quiet.1, writer);
    assert!(!source.is_reported());
    let pause = Duration::from_millis(1);
    let sample = source.wait(not_stopped().as_fd(), pause).unwrap().unwrap();
    assert!(!sample.stalled && source.has_psi());
    assert!(source.host.is_some() && source.own.is_none());
}

#[test]
fn a_sample_has_the_memory_of_the_host_and_stop_ends_the_wait() {
    let stop = not_stopped();
    let mut source = PressureSource::watermark_only();
    assert!(!source.has_psi() && !source.is_reported());
    let sample = source.wait(stop.as_fd(), Duration::ZERO).unwrap().unwrap();
    let room = sample.host.room;
    assert!(!sample.stalled && room.available > 0 && room.available <= room.total);
    rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(
        PressureSource::open().wait(stop.as_fd(), LONG).unwrap(),
        None
    );
}

#[test]
fn psi_is_used_where_the_kernel_has_it() {
    let armed = PsiTrigger::arm(Path::new(HOST_PRESSURE), STALLS[1].0, STALLS[1].1);
    let source = PressureSource::open();
    assert!(armed.is_err() || source.has_psi());
    println!("PSI: {}", source.has_psi());
}

#[test]
fn pauses_are_spread_around_what_was_asked_for() {
    let pause = Duration::from_millis(1024);
    assert_eq!(spread(pause, 0), Duration::from_millis(768));
    assert_eq!(spread(pause, 512), pause);
    assert_eq!(
        spread(pause, 1023 + 5 * 1024),
        Duration::from_micros(1_279_500)
    );
    assert_eq!(spread(Duration::ZERO, 77), Duration::ZERO);
}

/// A cgroup of this test: its folder, and what there is in it.
fn cgroup(available: u64, events: u64) -> tempfile::TempDir {
    let folder = tempfile::TempDir::new().unwrap();
    write_cgroup(folder.path(), available, events);
    folder
}

fn write_cgroup(folder: &Path, available: u64, events: u64) {
    let used = (1 << 30) - available;
    for (name, text) in [
        ("high", format!("{}", 1 << 30)),
        ("max", "max".into()),
        ("current", used.to_string()),
        ("stat", String::new()),
        ("events.local", format!("high {events}\n")),
    ] {
        fs::write(folder.join(format!("memory.{name}")), text).unwrap();
    }
}

#[test]
fn a_limit_that_is_reached_is_an_event_and_the_next_one_waits_a_moment() {
    let folder = cgroup(0, 3);
    let mut source = PressureSource {
        cgroup: Some(Cgroup::at(folder.path(), "")),
        ..PressureSource::watermark_only()
    };
    let start = source.start;
    assert!(!source.limit_reached(start), "that was before");
    write_cgroup(folder.path(), 0, 4);
    assert!(source.limit_reached(start) && source.limit_events == 1);
    write_cgroup(folder.path(), 0, 5);
    let soon = start + EVENT_PAUSE;
    assert!(!source.limit_reached(soon - Duration::from_nanos(1)));
    assert!(source.limit_reached(soon) && source.take_limit_events() == 2);
    assert_eq!(source.take_limit_events(), 0);
}

#[test]
fn a_sample_has_the_room_of_the_own_cgroup() {
    let folder = cgroup(5 << 20, 0);
    let mut source = PressureSource {
        cgroup: Some(Cgroup::at(folder.path(), "")),
        ..PressureSource::watermark_only()
    };
    let sample = source.sample(false);
    let room = Room {
        total: 1 << 30,
        available: 5 << 20,
    };
    assert_eq!((sample.own.room, sample.above), (room, Limit::default()));
}

#[test]
fn a_process_that_is_moved_is_followed() {
    let folder = cgroup(5 << 20, 0);
    let mut source = PressureSource {
        cgroup: Some(Cgroup::at(folder.path(), "")),
        ..with_triggers(connection().1, connection().1)
    };
    source.wait(not_stopped().as_fd(), Duration::ZERO).unwrap();
    let own = Cgroup::own();
    let ids = |cgroup: &Cgroup| cgroup.levels().iter().map(Level::id).collect::<Vec<_>>();
    assert_eq!(source.cgroup.as_ref().map(ids), Some(ids(&own)));
    assert!(source.own.is_none() || own.pressure_file().is_some());
}

#[test]
fn monitors_hear_of_each_other_when_memory_is_short() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("peers");
    // Two of them are in one cgroup, below a tighter one.
    let cgroup = cgroup(0, 0);
    let one = cgroup.path().join("one");
    fs::create_dir(&one).unwrap();
    write_cgroup(&one, 1 << 30, 0);
    let mut sources: Vec<_> = (0..3)
        .map(|index| PressureSource {
            cgroup: (index != 1).then(|| Cgroup::at(cgroup.path(), "one")),
            ..PressureSource::watermark_only().with_peers(Peers::at(&path).unwrap())
        })
        .collect();
    let room = Room {
        total: 1 << 40,
        available: 0,
    };
    let mut told = |index: usize, lazy| {
        let sample = sources[index].sample(false);
        assert!(sample.at > Duration::ZERO);
        sources[index].shared(Sample {
            host: Limit {
                room,
                ..Limit::default()
            },
            lazy,
            unmapped: lazy,
            given: lazy,
            ..sample
        })
    };
    told(0, 1);
    told(1, 10);
    told(2, 100);
    let sample = told(1, 10);
    let others = sample.host.others;
    assert_eq!((others.before, others.after, others.given), (2, 200, 101));
    assert_eq!(
        sample.own.others,
        Default::default(),
        "no cgroup of its own"
    );
    let sample = told(0, 1);
    assert_eq!(
        (sample.host.others.after, sample.own.others.after),
        (220, 200)
    );
    assert_eq!(sample.above.others.after, 200);
    assert_eq!(sample.above.room.available, 0);
    let calm = sources[0].shared(Sample {
        lazy: 1,
        ..Sample::default()
    });
    assert_eq!(calm.host.others, Default::default(), "nobody is asked");
}

#[test]
fn a_wait_lasts_as_long_as_its_pause_unless_events_count_again_before() {
    let stop = not_stopped();
    let mut source = PressureSource::watermark_only();
    let (start, ms) = (source.start, Duration::from_millis);
    source.events_from = start + ms(10);
    let timeout = |now, until| source.timeout(start + ms(now), start + ms(until));
    assert_eq!((timeout(0, 20), timeout(4, 20)), (ms(10), ms(6)));
    assert_eq!((timeout(10, 20), timeout(0, 5)), (ms(10), ms(5)));
    assert_eq!(timeout(30, 20), Duration::ZERO);
    let start = Instant::now();
    source.wait(stop.as_fd(), ms(40)).unwrap();
    assert!(start.elapsed() >= ms(30));
}
