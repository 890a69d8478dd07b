//! What a container of the CRI finds, and how it ends: as runc has it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ebb_cri::v1::{Capability, ContainerConfig, Int64Value, KeyValue};
use ebb_cri::{Cri, Ended, Pod, Wanted};
use ebb_harness::error::{Context, Result};
use ebb_harness::wait::{LONG, until};

const MIB: i64 = 1 << 20;

/// What a restricted program says of itself, and leaves.
const RESTRICTED: &str = r#"
exec 2>&1
echo "user $(id -u) groups $(id -G)" >/dev/stdout
echo "in $(readlink /proc/self/cwd) with $HOME and $KEY on $(hostname)"
cat /var/run/secrets/key; echo
grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status
cat /proc/self/oom_score_adj
echo x >/file || echo refused
echo the end >/dev/termination-log
dd if=/dev/zero bs=1k count=20 2>/dev/null | tr '\0' a
echo; echo this is all
exit 3
"#;

/// What has come of a container's log, without what the CRI writes in front of each line.
fn log(folder: &Path, name: &str, last: &str) -> Result<String> {
    let path = folder.join(format!("{name}.log"));
    until("the output is in the log", LONG, || {
        let text = fs::read_to_string(&path).context(path.display())?;
        let lines = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        let text = lines.collect::<Vec<_>>().join("\n");
        Ok(Some(text).filter(|text| text.contains(last)))
    })
}

fn restricted(mut config: ContainerConfig) -> ContainerConfig {
    config.working_dir = "/new/folder".to_owned();
    config.envs = vec![KeyValue {
        key: "KEY".to_owned(),
        value: "a=b c".to_owned(),
    }];
    if let Some(linux) = &mut config.linux {
        if let Some(resources) = &mut linux.resources {
            resources.oom_score_adj = 500;
        }
        if let Some(context) = &mut linux.security_context {
            context.run_as_user = Some(Int64Value { value: 33 });
            context.supplemental_groups = vec![44];
            context.readonly_rootfs = true;
            context.no_new_privs = true;
            context.capabilities = Some(Capability {
                drop_capabilities: vec!["ALL".to_owned()],
                add_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
                ..Capability::default()
            });
        }
    }
    config
}

/// A container that may do little finds what its specification says, and leaves its message and its exit status.
pub fn check_restricted(cri: &Cri, pod: &Pod, folder: &Path) -> Result<()> {
    let message = folder.join("pods/uid/containers/restricted/1f");
    let parent = message.parent().context("a folder")?;
    fs::create_dir_all(parent).context("a folder")?;
    fs::write(&message, "").context("the message")?;
    fs::set_permissions(&message, Permissions::from_mode(0o666)).context("the message")?;
    let wanted = Wanted {
        name: "restricted",
        program: &["sh", "-c", RESTRICTED],
        limit: 16 * MIB,
        mounts: &[
            ("/dev/termination-log", message.clone(), true),
            // In a folder that is a link to another one in the image.
            (
                "/var/run/secrets",
                folder.join("kubernetes.io~configmap/settings"),
                false,
            ),
        ],
    };
    let id = cri.start_config(pod, restricted(wanted.config()))?;
    let ended = Ended {
        code: 3,
        reason: "Error".to_owned(),
    };
    assert_eq!(cri.await_end(&id)?, ended);
    let said = log(folder, "restricted", "this is all")?;
    for wanted in [
        "user 33 groups 33 44\n",
        "in /new/folder with /home/web and a=b c on pod\n",
        "\nvalue\n",
        "CapBnd:\t0000000000000400\n",
        "CapEff:\t0000000000000000\n",
        "NoNewPrivs:\t1\n",
        "\n500\n",
        "Read-only file system\nrefused\n",
    ] {
        assert!(said.contains(wanted), "{wanted:?} is not in {said}");
    }
    // The CRI writes lines of 16 KiB at most; none of it is lost.
    let long = said
        .lines()
        .filter(|line| line.bytes().all(|byte| byte == b'a'));
    assert_eq!(long.map(str::len).sum::<usize>(), 20 << 10, "{said}");
    let left = fs::read_to_string(&message).context("the message")?;
    assert_eq!(left, "the end\n");
    Ok(())
}

/// A program with a terminal has it as its console; a probe that takes too long is ended; a container may end by itself when it is
/// told to stop.
pub fn check_stop(cri: &Cri, pod: &Pod, folder: &Path) -> Result<()> {
    let program = "trap 'exit 5' TERM; echo to the console >/dev/console; sleep 1000000 & wait";
    let mut config = Wanted {
        name: "polite",
        program: &["sh", "-c", program],
        limit: 16 * MIB,
        mounts: &[],
    }
    .config();
    config.tty = true;
    let id = cri.start_config(pod, config)?;
    log(folder, "polite", "to the console")?;
    let error = cri
        .exec_within(&id, &["sleep", "1000001"], 1)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("deadline") || error.contains("timeout"),
        "{error}"
    );
    let left = cri.exec(
        &id,
        &["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'"],
    )?;
    assert!(
        !left.contains("1000001") && left.contains("1000000"),
        "{left}"
    );
    cri.stop(&id, 300)?;
    assert_eq!(cri.await_end(&id)?.code, 5);
    Ok(())
}

/// The program of a container that holds 16 MiB of memory for as long as it lives.
pub const HOLDER: &str = "mkfifo /tmp/fifo; exec 3<>/tmp/fifo; dd if=/dev/zero bs=1M count=16 >&3 & exec tail -c 16777216 <&3";

/// A limit that shrinks leaves alone what fits, and ends what does not: the kernel does so in the guest as it does for runc.
pub fn check_shrinking(cri: &Cri, holder: &str) -> Result<()> {
    until("the container holds its memory", LONG, || {
        Ok((cri.memory(holder)? >= 16 << 20).then_some(()))
    })?;
    cri.limit(holder, 24 * MIB)?;
    let said = cri.exec(
        holder,
        &[
            "cat",
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory.events",
        ],
    )?;
    assert!(said.starts_with(&format!("{}\n", 24 * MIB)), "{said}");
    assert!(said.contains("oom_kill 0\n"), "{said}");
    // It may have ended before the answer is there.
    let _ = cri.limit(holder, 8 * MIB);
    // The CRI hears of the end and of its reason on two ways.
    until("the container was killed for want of memory", LONG, || {
        let ended = cri.await_end(holder)?;
        Ok((ended.code == 137 && ended.reason == "OOMKilled").then_some(()))
    })
}
