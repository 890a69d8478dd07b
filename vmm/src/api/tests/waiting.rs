//! A server without a machine, which gets one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use hyper::Method;
use serde_json::{Value, json};

use super::{Bench, TIMEOUT};
use crate::api::before::{self, Draft, Process, Step};
use crate::api::{Asks, ClientError, Fault, Front, Reply, request, serve, waiting};

/// Tells the thread that answers to end, also when an assertion has failed: the test waits for it.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Answers until the start is asked for, or the test is `over`.
fn answer(
    asks: Asks,
    draft: &mut Draft,
    start: impl Fn() -> Result<Reply, Fault>,
    over: &AtomicBool,
) {
    while !over.load(Ordering::Relaxed) {
        let Some(ask) = asks.take() else {
            thread::yield_now();
            continue;
        };
        match before::step(draft, &ask) {
            Ok(Step::Start(_)) => {
                let started = start();
                let is_over = started.is_ok();
                ask.answer(started);
                if is_over {
                    return;
                }
            }
            Ok(Step::Reply(reply)) => ask.answer(Ok(reply)),
            Ok(_) => ask.answer(Err(Fault::bad_request("another step"))),
            Err(fault) => ask.answer(Err(fault)),
        }
    }
}

#[test]
fn requests_go_to_the_draft_until_there_is_a_machine() {
    let bench = Bench::being_built();
    let kernel = bench.folder.path().join("kernel");
    let socket = bench.folder.path().join("waiting");
    let (asker, asks) = waiting().unwrap();
    let server = serve(&socket, Front::Waiting(asker)).unwrap();
    let ask = |method: Method, path: &str, body: Value| {
        request(&socket, method, path, Some(&body), TIMEOUT)
    };
    let status = |asked: Result<Value, ClientError>| match asked {
        Err(ClientError::Refused { status, message }) => (status, message),
        other => panic!("{other:?}"),
    };
    let fails = AtomicBool::new(true);
    let start = || {
        server.set_instance(Some(Arc::clone(&bench.machine) as _));
        // Nobody but the machine itself can answer now.
        let info = ask(Method::GET, "/", Value::Null).unwrap();
        assert_eq!(info["id"], "test");
        if fails.swap(false, Ordering::Relaxed) {
            server.set_instance(None);
            return Err(Fault::bad_request("cannot be built"));
        }
        server.set_machine(Arc::clone(&bench.machine) as _);
        Ok(Reply::Done)
    };
    let mut draft = Draft::new(Process {
        id: "vm".to_owned(),
        api_socket: None,
        words: Vec::new(),
    });
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| answer(asks, &mut draft, start, &over));
        let _at_end = AtEnd(&over);
        let state = |info: Value| info["state"].as_str().map(str::to_owned);
        let info = ask(Method::GET, "/", Value::Null).unwrap();
        assert_eq!(state(info).as_deref(), Some("Not started"));
        assert_eq!(status(ask(Method::GET, "/lazy-memory", Value::Null)).0, 400);
        assert_eq!(status(ask(Method::GET, "/nowhere", Value::Null)).0, 404);
        assert_eq!(status(ask(Method::PUT, "/version", Value::Null)).0, 405);
        let start = json!({ "action_type": "InstanceStart" });
        let (refused, message) = status(ask(Method::PUT, "/actions", start.clone()));
        assert!(
            refused == 400 && message.contains("boot-source"),
            "{message}"
        );
        let source = json!({ "kernel_image_path": kernel });
        ask(Method::PUT, "/boot-source", source.clone()).unwrap();
        // One that waits for the machine while that is being built in vain.
        let early = scope.spawn(|| status(ask(Method::GET, "/lazy-memory", Value::Null)));
        let (failed, message) = status(ask(Method::PUT, "/actions", start.clone()));
        assert_eq!((failed, message.as_str()), (400, "cannot be built"));
        assert_eq!(early.join().unwrap().0, 400);
        let info = ask(Method::GET, "/", Value::Null).unwrap();
        assert_eq!(state(info).as_deref(), Some("Not started"));
        ask(Method::PUT, "/actions", start).unwrap();
        let info = ask(Method::GET, "/", Value::Null).unwrap();
        assert_eq!(state(info).as_deref(), Some("Building"));
        let (late, message) = status(ask(Method::PUT, "/boot-source", source));
        assert!(late == 400 && message.contains("only before"), "{message}");
        let lazy = ask(Method::GET, "/lazy-memory", Value::Null).unwrap();
        assert_eq!(lazy["lazy_bytes"], 4096);
    });
}
