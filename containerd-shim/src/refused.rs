//! What a container may ask of the host that a guest cannot have. It is refused: without it the container would be another one.

use ebb_pod::error::{Error, Result};
use oci_spec::runtime::{Hooks, Linux, LinuxDeviceType, LinuxNamespaceType, Spec};

/// The namespaces without which a container has those of the host, and what they hold.
const NAMESPACES: [(LinuxNamespaceType, &str); 2] = [
    (LinuxNamespaceType::Pid, "processes (hostPID)"),
    (LinuxNamespaceType::Ipc, "IPC (hostIPC)"),
];

/// Refuses a specification that wants what only the host has.
pub fn check(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    let namespaces = namespaces.unwrap_or_default();
    for (kind, what) in NAMESPACES {
        if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
            return Err(Error::new(format!(
                "the host's {what}: a guest cannot have them; give the pod its own"
            )));
        }
    }
    if let Some(linux) = linux
        && let Some(device) = linux.devices().as_deref().unwrap_or_default().first()
        && !is_privileged(linux)
    {
        return Err(Error::new(format!(
            "the host's device {}: a guest cannot have it; take it out of the specification",
            device.path().display()
        )));
    }
    if spec.hooks().as_ref().is_some_and(has_some) {
        return Err(Error::new(
            "hooks: they are programs of the host that change a container there; take them out of the specification",
        ));
    }
    Ok(())
}

/// True if the container may use all devices. Then those that it names are all that the host has, and none is meant: it has all of
/// the guest.
fn is_privileged(linux: &Linux) -> bool {
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_deref());
    rules.unwrap_or_default().iter().any(|rule| {
        let kind = rule.typ().unwrap_or_default();
        rule.allow()
            && kind == LinuxDeviceType::A
            && rule.major().is_none()
            && rule.minor().is_none()
    })
}

/// True if there is a program for any of the moments.
fn has_some(hooks: &Hooks) -> bool {
    let all = serde_json::to_value(hooks).unwrap_or_default();
    let mut all = all.as_object().into_iter().flat_map(|all| all.values());
    all.any(|of_a_moment| of_a_moment.as_array().is_some_and(|it| !it.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_the_host_has_is_refused_by_name() {
        let spec = |namespaces: &[&str], hooks: serde_json::Value| -> Spec {
            let namespaces: Vec<_> = namespaces
                .iter()
                .map(|kind| serde_json::json!({"type": kind}))
                .collect();
            let spec = serde_json::json!({
                "ociVersion": "1.0.2",
                "linux": {"namespaces": namespaces},
                "hooks": hooks,
            });
            serde_json::from_value(spec).unwrap()
        };
        let none = || serde_json::json!({"poststop": []});
        check(&spec(&["ipc", "pid"], none())).unwrap();
        let said = |spec: Spec| check(&spec).unwrap_err().to_string();
        assert!(said(spec(&["ipc"], none())).contains("hostPID"));
        assert!(said(spec(&["pid"], none())).contains("hostIPC"));
        let hooks = serde_json::json!({"prestart": [{"path": "/bin/true"}]});
        assert!(said(spec(&["ipc", "pid"], hooks)).starts_with("hooks"));
    }

    #[test]
    fn a_device_of_the_host_is_refused_unless_all_are_allowed() {
        let spec = |rules: serde_json::Value| -> Spec {
            let spec = serde_json::json!({
                "ociVersion": "1.0.2",
                "linux": {
                    "namespaces": [{"type": "ipc"}, {"type": "pid"}],
                    "devices": [{"path": "/dev/xvdz", "type": "b", "major": 202, "minor": 1}],
                    "resources": {"devices": rules},
                },
            });
            serde_json::from_value(spec).unwrap()
        };
        let rules = serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 202, "minor": 1, "access": "rwm"},
        ]);
        let error = check(&spec(rules)).unwrap_err().to_string();
        assert!(error.contains("/dev/xvdz"), "{error}");
        check(&spec(serde_json::json!([{"allow": true, "access": "rwm"}]))).unwrap();
    }
}
