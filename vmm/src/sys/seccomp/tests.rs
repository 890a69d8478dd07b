use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use rustix::process::{WaitOptions, waitpid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use super::*;
use crate::sys::process::{block_all_signals, fork_for_test};

const ROLES: [Role; 15] = [
    Role::Main,
    Role::Vcpu,
    Role::Block,
    Role::Net,
    Role::Rng,
    Role::Vsock,
    Role::Balloon,
    Role::Api,
    Role::Snapshot,
    Role::Reclaim,
    Role::Strict,
    Role::Pages,
    Role::Output,
    Role::Reaper,
    Role::Guardian,
];

/// How a child ends in which a thread `ebb-test` of `role` does `action`, and what it has written to its log.
fn ends(mode: Mode, role: Role, action: impl FnOnce() + Send) -> (i32, String) {
    let (mut text, (reader, writer)) = (String::new(), rustix::pipe::pipe().unwrap());
    let child = fork_for_test(|| {
        start(mode, Some(writer.as_fd())).unwrap();
        let name = thread::Builder::new().name("ebb-test".into());
        thread::scope(|scope| {
            let run = || {
                role.enter();
                action();
            };
            let _ = name.spawn_scoped(scope, run).unwrap().join();
        });
        0
    });
    let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
    drop(writer);
    File::from(reader).read_to_string(&mut text).unwrap();
    (status.exit_status().unwrap_or(-1), text)
}

/// A call that nobody needs. It changes nothing; personality(2) returns 0, or what somebody has set.
fn forbidden() -> libc::c_long {
    // SAFETY: the call takes numbers only.
    unsafe { libc::syscall(libc::SYS_personality, 0xffff_ffff_u64, 0xabc_u64, 0_u64) }
}

#[test]
fn a_forbidden_call_ends_the_process_with_a_line_that_names_it() {
    for role in ROLES {
        let (status, text) = ends(Mode::On, role, || _ = forbidden());
        assert_eq!(status, i32::from(FORBIDDEN_CALL), "{role:?}: {text}");
        let expected = "ebb: the thread ebb-test wanted to make the system call \
                        personality(0xffffffff, 0xabc, 0x0, ...), which its seccomp filter forbids; \
                        the process ends with status 37\n";
        assert_eq!(text, expected, "{role:?}");
    }
}

#[test]
fn a_thread_that_blocks_its_signals_reports_it_too() {
    let (status, text) = ends(Mode::On, Role::Output, || {
        block_all_signals();
        forbidden();
    });
    assert_eq!(status, i32::from(FORBIDDEN_CALL), "{text}");
    assert!(text.contains("personality"), "{text}");
}

/// Lets a system call fail in the calling thread and those that it starts.
fn refuse(call: libc::c_long, error: libc::c_int) {
    let calls = [(call, Vec::new())].into();
    let refuse = SeccompAction::Errno(error as u32);
    let arch = seccompiler::TargetArch::x86_64;
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, refuse, arch).unwrap();
    let filter: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&filter).unwrap();
}

#[test]
fn a_thread_that_is_refused_its_filter_ends_the_process() {
    let (mut text, (reader, writer)) = (String::new(), rustix::pipe::pipe().unwrap());
    let child = fork_for_test(|| {
        start(Mode::On, Some(writer.as_fd())).unwrap();
        // As if there was no memory.
        refuse(libc::SYS_seccomp, libc::ENOMEM);
        let name = thread::Builder::new().name("ebb-test".into());
        let _ = name.spawn(|| Role::Block.enter()).unwrap().join();
        0
    });
    let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
    drop(writer);
    File::from(reader).read_to_string(&mut text).unwrap();
    assert_eq!(status.exit_status(), Some(FORBIDDEN_CALL.into()), "{text}");
    let line = "ebb: the thread ebb-test was refused its seccomp filter";
    assert!(
        text.starts_with(line) && text.ends_with("status 37\n"),
        "{text}"
    );
}

/// As in a container, or in a unit with `RestrictNamespaces=`.
#[test]
fn threads_are_started_where_clone3_is_refused() {
    for role in [
        Role::Main,
        Role::Api,
        Role::Reclaim,
        Role::Snapshot,
        Role::Guardian,
    ] {
        let (mut text, (reader, writer)) = (String::new(), rustix::pipe::pipe().unwrap());
        let child = fork_for_test(|| {
            start(Mode::On, Some(writer.as_fd())).unwrap();
            refuse(libc::SYS_clone3, libc::ENOSYS);
            role.enter();
            thread::spawn(|| {}).join().map_or(1, |()| 0)
        });
        let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
        drop(writer);
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(
            (status.exit_status(), text.as_str()),
            (Some(0), ""),
            "{role:?}: {status:?}"
        );
    }
}

#[test]
fn a_filter_that_is_off_or_only_logs_forbids_nothing() {
    for mode in [Mode::Off, Mode::Log] {
        let call = || assert!(forbidden() >= 0);
        assert_eq!(
            ends(mode, Role::Output, call),
            (0, String::new()),
            "{mode:?}"
        );
    }
}

#[test]
fn a_thread_with_a_filter_may_allocate_and_free() {
    let child = fork_for_test(|| {
        start(Mode::On, None).unwrap();
        prepare_allocator().unwrap();
        let run = || {
            Role::Vcpu.enter();
            grow_and_shrink();
        };
        thread::spawn(run).join().map_or(1, |()| 0)
    });
    let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.exit_status(), Some(0));
}

#[test]
fn what_a_filtered_process_starts_gains_no_privileges() {
    for (mode, expected) in [(Mode::Off, false), (Mode::On, true)] {
        let child = fork_for_test(|| {
            let before = rustix::thread::no_new_privs().unwrap();
            start(mode, None).unwrap();
            u8::from(rustix::thread::no_new_privs().unwrap() != (before || expected))
        });
        let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0), "{mode:?}");
    }
}

#[test]
fn no_line_is_longer_than_its_buffer() {
    let mut line = Line::default();
    for number in [0, 16, -1, i32::MAX] {
        line.describe(number, [i64::MIN; 3]);
    }
    assert_eq!(line.len, line.bytes.len());
    let mut line = Line::default();
    line.describe(9999, [0; 3]);
    let text = String::from_utf8_lossy(&line.bytes[..line.len]).into_owned();
    assert!(text.contains("call 0x270f(0x0, 0x0, 0x0, ...)"), "{text}");
}
