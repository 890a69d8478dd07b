//! Pods through containerd's CRI: as a kubelet asks for them.

use std::fs;
use std::path::Path;

use ebb_cri::{Cri, PARAMETER, Pod, Wanted};
use ebb_harness::containerd::Containerd;
use ebb_harness::error::{Context, Result};
use ebb_harness::network::{fetch, serve_once};
use ebb_harness::wait::{LONG, until};

use crate::behaviour::{HOLDER, check_restricted, check_shrinking, check_stop};
use crate::{find, kill};

const MIB: i64 = 1 << 20;

/// What a kubelet makes for a pod: a volume that starts empty, and one with a configuration.
fn volumes(folder: &Path) -> Result<()> {
    let config = folder.join("kubernetes.io~configmap/settings");
    fs::create_dir_all(config.join("..2026")).context(config.display())?;
    fs::write(config.join("..2026/key"), "value").context("a configuration")?;
    // As kubelet lays it out: it exchanges a link to replace all of them at once.
    for (to, link) in [("..2026", "..data"), ("..data/key", "key")] {
        std::os::unix::fs::symlink(to, config.join(link)).context(link)?;
    }
    let empty = folder.join("kubernetes.io~empty-dir/scratch");
    fs::create_dir_all(&empty).context(empty.display())
}

#[test]
fn containers_of_a_pod_share_its_guest_its_network_and_its_volumes() -> Result<()> {
    let containerd = Containerd::start_with_pods()?;
    let cri = Cri::connect(&containerd.socket())?;
    let folder = tempfile::TempDir::with_prefix("ebb-pod-").context("a folder")?;
    volumes(folder.path())?;
    let pod = cri.run_pod("pod", 96 * MIB, folder.path())?;
    let empty = folder.path().join("kubernetes.io~empty-dir/scratch");
    let config = folder.path().join("kubernetes.io~configmap/settings");
    let program =
        "cat /config/key; echo; echo from the pod >/scratch/word; exec httpd -f -h /scratch";
    let one = cri.start(
        &pod,
        &Wanted {
            name: "one",
            program: &["sh", "-c", program],
            limit: 64 * MIB,
            mounts: &[
                ("/scratch", empty.clone(), true),
                ("/config", config.clone(), false),
            ],
        },
    )?;
    let two = cri.start(
        &pod,
        &Wanted {
            name: "two",
            program: &["sh", "-c", HOLDER],
            limit: 32 * MIB,
            mounts: &[("/shared", empty, false), ("/config", config, true)],
        },
    )?;
    check_network(&cri, &pod, &two)?;
    check_volumes(&cri, &one, &two)?;
    check_namespaces(&cri, &one, &two)?;
    let log = || fs::read_to_string(folder.path().join("one.log")).context("the log");
    let found = until("the container's output is in its log", LONG, || {
        Ok(Some(log()?).filter(|log| log.contains("value")))
    })?;
    assert!(found.contains(" stdout "), "{found}");
    check_limits(&containerd, &cri, &one)?;
    check_restricted(&cri, &pod, folder.path())?;
    check_stop(&cri, &pod, folder.path())?;
    cri.remove(&one)?;
    assert_eq!(cri.exec(&two, &["cat", "/shared/word"])?, "from the pod\n");
    check_shrinking(&cri, &two)?;
    check_death_of_shim(&containerd, &cri, &pod)?;

    let pod = cri.run_pod("next", 32 * MIB, folder.path())?;
    let id = cri.start(&pod, &sleeping("one"))?;
    assert_eq!(cri.exec(&id, &["hostname"])?, "next\n");
    cri.remove_pod(&pod)?;
    containerd.vanished()?;
    assert_eq!(containerd.addresses()?, 0);
    Ok(())
}

fn sleeping(name: &str) -> Wanted<'_> {
    Wanted {
        name,
        program: &["sleep", "1000000"],
        limit: 16 * MIB,
        mounts: &[],
    }
}

/// Nothing is left of a pod whose shim dies, and the CRI knows that.
fn check_death_of_shim(containerd: &Containerd, cri: &Cri, pod: &Pod) -> Result<()> {
    let containers = [
        cri.start(pod, &sleeping("three"))?,
        cri.start(pod, &sleeping("four"))?,
    ];
    let cgroup = Path::new("/sys/fs/cgroup/k8s.io").join(&pod.id);
    assert!(cgroup.exists(), "{}", cgroup.display());
    let interfaces = containerd.interfaces()?;
    assert!(
        interfaces.contains("ebb0") && interfaces.contains("ingress"),
        "{interfaces}"
    );
    kill(&find(containerd, "containerd-shim")?)?;
    for id in containers {
        // 137, or what the CRI says when it could not hear: 255.
        assert_ne!(cri.await_end(&id)?.code, 0);
    }
    until("the pod is not ready", LONG, || {
        Ok((!cri.is_ready(pod)?).then_some(()))
    })?;
    containerd.vanished()?;
    let interfaces = containerd.interfaces()?;
    assert!(
        !interfaces.contains("ebb0") && !interfaces.contains("ingress"),
        "{interfaces}"
    );
    assert!(!cgroup.exists(), "{}", cgroup.display());
    cri.remove_pod(pod)?;
    assert_eq!(containerd.addresses()?, 0);
    Ok(())
}

/// The host reaches the container "one", and the container `two` both.
fn check_network(cri: &Cri, pod: &Pod, two: &str) -> Result<()> {
    let address = cri.address(pod)?;
    let word = until(
        "the pod answers",
        LONG,
        || Ok(fetch(&address, "/word").ok()),
    )?;
    assert_eq!(String::from_utf8_lossy(&word), "from the pod\n");
    let get = |address: &str| cri.exec(two, &["wget", "-q", "-O", "-", address]);
    assert_eq!(get("http://127.0.0.1/word")?, "from the pod\n");
    let gateway = ebb_harness::containerd::GATEWAY;
    let port = serve_once(gateway, b"from the host".to_vec())?;
    assert_eq!(get(&format!("http://{gateway}:{port}/"))?, "from the host");
    Ok(())
}

fn check_volumes(cri: &Cri, one: &str, two: &str) -> Result<()> {
    assert_eq!(cri.exec(two, &["cat", "/shared/word"])?, "from the pod\n");
    assert_eq!(cri.exec(two, &["cat", "/config/key"])?, "value");
    let write = |id, path: &str| cri.exec(id, &["sh", "-c", &format!("echo new >{path}")]);
    for (id, path) in [(one, "/config/key"), (two, "/shared/word")] {
        let error = write(id, path).unwrap_err().to_string();
        assert!(error.contains("Read-only file system"), "{error}");
    }
    // Each has a copy of its own.
    write(two, "/config/key")?;
    assert_eq!(cri.exec(one, &["cat", "/config/key"])?, "value");
    Ok(())
}

fn check_namespaces(cri: &Cri, one: &str, two: &str) -> Result<()> {
    let script = "for name in ipc uts net pid; do readlink /proc/self/ns/$name; done";
    let links = |id| -> Result<Vec<String>> {
        let said = cri.exec(id, &["sh", "-c", script])?;
        Ok(said.lines().map(str::to_owned).collect())
    };
    let [name, value] = PARAMETER;
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    assert_eq!(cri.exec(two, &["cat", &path])?.trim(), value);
    let (one, two) = (links(one)?, links(two)?);
    assert_eq!(one[..3], two[..3]);
    assert_ne!(one[3], two[3]);
    Ok(())
}

/// A limit counts in the guest, and the balloon takes what the limits leave.
fn check_limits(containerd: &Containerd, cri: &Cri, one: &str) -> Result<()> {
    assert!(cri.memory(one)? > 0);
    let machine = containerd.machine()?;
    let before = machine.balloon()?.actual_mib;
    cri.limit(one, 32 * MIB)?;
    let limit = cri.exec(one, &["cat", "/sys/fs/cgroup/memory.max"])?;
    assert_eq!(limit, format!("{}\n", 32 * MIB));
    until("the balloon has what the limit leaves", LONG, || {
        let now = machine.balloon()?.actual_mib;
        Ok((now == before + 32).then_some(()))
    })
}
