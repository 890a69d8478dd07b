//! `docs/openapi.json`, compared with the routes, with what they read, and with what they answer.

use std::collections::BTreeSet;
use std::path::Path;

use hyper::Method;
use serde_json::{Value, json};

use super::Bench;
use crate::api::before::{self, Draft, Process, Step};
use crate::api::routes::{Fault, Handler, REFUSED, ROUTES, Reply, find};

fn document() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Every operation: method, path, description.
fn operations(document: &Value) -> Vec<(Method, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let all = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().iter();
        methods.map(move |(method, operation)| {
            let method = method.to_ascii_uppercase().parse().unwrap();
            (method, path.clone(), operation.clone())
        })
    });
    all.collect()
}

/// Follows a reference.
fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(name) => document.pointer(name.trim_start_matches('#')).expect(name),
        None => schema,
    }
}

/// What the server does with a body: before the start, and afterwards.
fn carry_out(bench: &Bench, method: &Method, path: &str, body: &Value) -> [Option<Fault>; 2] {
    let path = path.replace("{id}", "a");
    let Ok(found) = find(method, &path) else {
        return [None, None];
    };
    let mut draft = Draft::new(Process {
        id: "vm".to_owned(),
        api_socket: None,
        words: Vec::new(),
    });
    let body = body.to_string();
    let before = found.before.map(|handler| {
        let done = handler(&mut draft, "a", body.as_bytes());
        done.map(|_: Step| ()).err()
    });
    let machine = bench.machine.as_ref();
    let after = found.after.map(|handler| {
        let done = match handler {
            Handler::Always(handler) => handler(machine, body.as_bytes()),
            Handler::Running(handler) => handler(machine, body.as_bytes()),
            Handler::Named(handler) => handler(machine, "a", body.as_bytes()),
            Handler::Metrics => Ok(Reply::Done),
        };
        done.err()
    });
    [before.flatten(), after.flatten()]
}

/// The names in backticks behind `expected` in serde's complaint of an unknown field.
fn known_fields(complaint: &str) -> Option<BTreeSet<String>> {
    let (_, known) = complaint.split_once("unknown field `?`, expected ")?;
    Some(
        known
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect(),
    )
}

#[test]
fn every_route_is_described_and_nothing_else() {
    let document = document();
    let described: BTreeSet<_> = operations(&document)
        .iter()
        .map(|(method, path, _)| format!("{method} {path}"))
        .collect();
    let after = ROUTES.iter().map(|it| (&it.0, it.1));
    let before = before::ROUTES.iter().map(|it| (&it.0, it.1));
    let refused = REFUSED.iter().map(|it| (&it.0, it.1));
    let served: BTreeSet<_> = after
        .chain(before)
        .chain(refused)
        .map(|(method, path)| format!("{method} {path}"))
        .collect();
    assert_eq!(described, served);
    for (method, path, operation) in operations(&document) {
        let responses = operation["responses"].as_object().unwrap();
        let is_refused = REFUSED.iter().any(|it| it.0 == method && it.1 == path);
        let succeeds = responses.keys().any(|status| status.starts_with('2'));
        assert_eq!(succeeds, !is_refused, "{method} {path}");
        assert_eq!(
            operation["parameters"].is_array(),
            path.contains('{'),
            "{path}"
        );
    }
}

#[test]
fn bodies_have_the_fields_that_are_read() {
    let (document, bench) = (document(), Bench::new());
    let (mut compared, mut with_body) = (BTreeSet::new(), BTreeSet::new());
    for (method, path, operation) in operations(&document) {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let schema = resolve(&document, schema);
        if !operation["requestBody"].is_null() {
            with_body.insert(format!("{method} {path}"));
        }
        let properties = schema["properties"].as_object();
        let described: BTreeSet<_> = properties
            .into_iter()
            .flatten()
            .map(|it| it.0.clone())
            .collect();
        for fault in carry_out(&bench, &method, &path, &json!({ "?": 1 }))
            .into_iter()
            .flatten()
        {
            let Some(known) = known_fields(&fault.message) else {
                continue;
            };
            assert_eq!(described, known, "{method} {path}");
            compared.insert(format!("{method} {path}"));
        }
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        for fault in carry_out(&bench, &method, &path, &json!({}))
            .into_iter()
            .flatten()
        {
            let missing = fault.message.split_once("missing field `");
            let Some((field, _)) = missing.and_then(|(_, rest)| rest.split_once('`')) else {
                continue;
            };
            assert!(required.contains(&json!(field)), "{method} {path}: {field}");
        }
    }
    assert_eq!(compared, with_body);
}

#[test]
fn answers_are_what_is_described() {
    let (document, bench) = (document(), Bench::new());
    for (method, path, operation) in operations(&document) {
        let content = &operation["responses"]["200"]["content"];
        if method != Method::GET || content["application/json"].is_null() {
            continue;
        }
        let schema = &content["application/json"]["schema"];
        check(&document, schema, &bench.get(&path), &path);
    }
    let mut draft = Draft::new(Process {
        id: "vm".to_owned(),
        api_socket: None,
        words: Vec::new(),
    });
    for (method, path, handler) in before::ROUTES {
        if *method == Method::GET
            && let Ok(Step::Reply(Reply::Json(answer))) = handler(&mut draft, "a", b"")
        {
            let schema = &document["paths"][path]["get"]["responses"]["200"];
            let schema = &schema["content"]["application/json"]["schema"];
            check(&document, schema, &answer, path);
        }
    }
}

/// Fails if `value` is not what the schema says, as far as these schemas go.
fn check(document: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = resolve(document, schema);
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let allowed = match &schema["type"] {
        Value::String(allowed) => vec![json!(allowed)],
        allowed => allowed.as_array().cloned().unwrap_or_default(),
    };
    assert!(
        allowed.contains(&json!(kind)),
        "{at}: {value} is no {allowed:?}"
    );
    if let Some(words) = schema["enum"].as_array() {
        assert!(words.contains(value), "{at}: {value} is none of {words:?}");
    }
    for item in value.as_array().into_iter().flatten() {
        check(document, &schema["items"], item, at);
    }
    let (Some(fields), Some(properties)) = (value.as_object(), schema["properties"].as_object())
    else {
        return;
    };
    for (name, value) in fields {
        match properties.get(name) {
            Some(schema) => check(document, schema, value, &format!("{at} {name}")),
            None => assert_eq!(schema["additionalProperties"], true, "{at}: {name}"),
        }
    }
    for name in schema["required"].as_array().into_iter().flatten() {
        let name = name.as_str().unwrap();
        assert!(fields.contains_key(name), "{at}: no {name}");
    }
}
