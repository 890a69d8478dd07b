//! Disks over the API.

use hyper::Method;
use serde_json::{Value, json};

use super::Bench;
use crate::control::RateLimits;

#[test]
fn drives_are_shown_and_changed_in_firecrackers_names() {
    let bench = Bench::new();
    let drive = &bench.get("/drives")[0];
    assert_eq!(drive["drive_id"], "disk0");
    assert_eq!(drive["engine"], "io_uring");
    assert_eq!(drive["size_bytes"], 512);
    let (size, time) = (Some(1000), Some(100));
    let bucket = json!({ "size": size, "refill_time": time, "one_time_burst": null });
    let limited = "rate 1000/100+0";
    for (body, told) in [
        (json!({}), "disk7 None None"),
        (
            json!({ "drive_id": "disk7", "path_on_host": "/x" }),
            "disk7 Some(\"/x\") None",
        ),
        (
            json!({ "path_on_host": "/x", "rate_limiter": null }),
            "disk7 Some(\"/x\") None",
        ),
        (json!({ "rate_limiter": {} }), "disk7 None None"),
        (
            json!({ "rate_limiter": "{\"ops\":null}" }),
            "disk7 None None",
        ),
        (json!({ "rate_limiter": { "bandwidth": bucket } }), limited),
        (json!({ "rate_limiter": { "bandwidth": {} } }), "rate 0/0+0"),
    ] {
        let answer = bench.ask(Method::PATCH, "/drives/disk7", Some(body.clone()));
        assert_eq!(answer.unwrap(), Value::Null, "{body}");
        let told = match told.strip_prefix("rate ") {
            Some(rate) => format!(
                "disk7 None {:?}",
                Some(RateLimits {
                    bandwidth: rate.parse().ok(),
                    operations: None,
                })
            ),
            None => told.to_owned(),
        };
        assert_eq!(
            bench.machine.told.lock().unwrap().pop(),
            Some(told),
            "{body}"
        );
    }
}

#[test]
fn drives_that_cannot_be_changed_say_why() {
    let bench = Bench::new();
    for (path, body, message) in [
        (
            "/drives/disk7",
            json!({ "drive_id": "disk8" }),
            "drive_id is disk8, but the path names disk7",
        ),
        (
            "/drives/disk7",
            json!({ "size": 1 }),
            "the body is not what is due here",
        ),
        (
            "/drives/disk7",
            json!({ "rate_limiter": { "bw": {} } }),
            "rate_limiter is not what is due",
        ),
        (
            "/drives/disk7",
            json!({ "rate_limiter": { "ops": { "refill_time": 1_u64 << 40 } } }),
            "is not a limit",
        ),
        ("/drives/", json!({}), "there is no /drives/"),
        ("/drives/a/b", json!({}), "there is no /drives/a/b"),
    ] {
        let refused = bench.ask(Method::PATCH, path, Some(body)).unwrap_err();
        assert!(refused.to_string().contains(message), "{refused}");
    }
}
