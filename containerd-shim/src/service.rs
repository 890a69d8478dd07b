//! containerd's task service (version 2): what concerns the machine happens here, the rest in the guest.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, Mount, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim::protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::ttrpc;
use containerd_shim::protos::ttrpc::context::{Context as Call, with_duration};
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::{ExitSignal, Task, TtrpcContext};
use ebb_pod::answers::{Exit, answer};
use ebb_pod::error::{Context, Error, Result};
use ebb_pod::{CONTAINER_TYPE, rootfs::LAYER};

use crate::pod::{Guest, Pod, Process, Progress, memory_limit};
use crate::settings::Settings;
use crate::streams::Paths;
use crate::{copies, rootfs};

/// How long the guest's agent may take for an answer. The guest may do with it what it wants, and never give one.
const PATIENCE: Duration = Duration::from_secs(60);

/// The exit status of a process that SIGKILL has ended.
const KILLED: u32 = 128 + SIGKILL;

/// The number of that signal.
const SIGKILL: u32 = 9;

/// The service of one pod.
pub struct Service {
    shared: Arc<Shared>,
    exit: Arc<ExitSignal>,
}

/// What its threads share.
struct Shared {
    pod: Pod,
    publisher: RemotePublisher,
}

/// A call of the agent, which has to answer in time.
fn call() -> Call {
    with_duration(PATIENCE)
}

/// What the agent says.
fn told(error: ttrpc::Error) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) => Error::new(status.message),
        other => Error::new(format!("the guest's agent: {other}")),
    }
}

impl Shared {
    /// containerd hears of it; if it does not listen, the pod goes on.
    fn publish(&self, event: impl Event) {
        let topic = event.topic();
        let namespace = self.pod.namespace();
        let sent = self
            .publisher
            .publish(Call::default(), &topic, namespace, Box::new(event));
        if let Err(error) = sent {
            containerd_shim::warn!("{topic}: {error}");
        }
    }

    fn create(&self, request: &CreateTaskRequest) -> Result<u32> {
        let settings = Settings::read()?;
        let bundle = Path::new(&request.bundle);
        let container = copies::container(bundle)?;
        let linux = container.spec.linux().as_ref();
        let limit = memory_limit(linux.and_then(|linux| linux.resources().as_ref()));
        let image = rootfs::image(&settings.images, &request.rootfs)?;
        let paths = Paths {
            input: request.stdin.clone(),
            output: request.stdout.clone(),
            errors: request.stderr.clone(),
            terminal: request.terminal,
        };
        let kept = self.pod.add(&request.id, bundle, limit, paths)?;
        let start = || -> Result<u32> {
            let guest = self.pod.guest_for(&settings, limit)?;
            guest.machine.set_disk(kept.disk, Some(&image))?;
            let value = serde_json::to_vec(&container).context("the container")?;
            let wanted = CreateTaskRequest {
                rootfs: vec![layer(kept.disk)],
                options: MessageField::some(Any {
                    type_url: CONTAINER_TYPE.to_owned(),
                    value,
                    ..Any::default()
                }),
                ..request.clone()
            };
            guest.agent.create(call(), &wanted).map_err(told)?;
            Ok(guest.machine.pid)
        };
        start().inspect_err(|_| self.pod.remove(&request.id))
    }

    /// Starts a process; a thread waits for its end.
    fn start(self: &Arc<Self>, request: &StartRequest) -> Result<u32> {
        let guest = self.pod.guest()?;
        let process = self.pod.process(&request.id, &request.exec_id)?;
        guest.agent.start(call(), request).map_err(told)?;
        process.started();
        let streams = &process.streams;
        streams.start(
            &guest.machine,
            &request.id,
            &request.exec_id,
            &process.paths,
        )?;
        let pid = guest.machine.pid;
        let (own, request) = (Arc::clone(self), request.clone());
        std::thread::spawn(move || own.await_end(&guest, &process, &request));
        Ok(pid)
    }

    fn await_end(&self, guest: &Guest, process: &Process, request: &StartRequest) {
        let wanted = WaitRequest {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            ..WaitRequest::default()
        };
        let exit = match guest.agent.wait(Call::default(), &wanted) {
            Ok(answer) => Exit {
                status: answer.exit_status,
                at: answer.exited_at.clone().unwrap_or_default().into(),
            },
            // With the machine all its processes are gone.
            Err(_) => Exit::now(KILLED),
        };
        process.streams.finish();
        self.end(process, &request.id, &request.exec_id, exit);
    }

    /// Notes how a process ended, and tells containerd.
    fn end(&self, process: &Process, id: &str, exec_id: &str, exit: Exit) {
        process.ended(exit);
        let pid = self.pod.guest().map_or(0, |guest| guest.machine.pid);
        self.publish(TaskExit {
            container_id: id.to_owned(),
            id: if exec_id.is_empty() { id } else { exec_id }.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..TaskExit::default()
        });
    }

    fn delete(&self, request: &DeleteRequest) -> Result<(u32, Exit)> {
        let container = self.pod.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = match process.progress() {
            Progress::Ended(exit) => exit,
            Progress::Created => Exit::now(0),
            Progress::Running => return Err(Error::new("the process has not ended")),
        };
        let guest = self.pod.guest()?;
        if !guest.machine.has_ended() {
            match guest.agent.delete(call(), request) {
                Ok(_) => {}
                Err(ttrpc::Error::RpcStatus(status)) => return Err(Error::new(status.message)),
                Err(error) => {
                    containerd_shim::warn!("delete: {error}: the machine is ended");
                    guest.machine.stop();
                }
            }
        }
        if request.exec_id.is_empty() {
            if !guest.machine.has_ended() {
                guest.machine.set_disk(container.disk, None)?;
            }
            self.pod.remove(&request.id);
        } else {
            container.forget(&request.exec_id);
        }
        Ok((guest.machine.pid, exit))
    }

    fn describe(&self, request: &StateRequest) -> Result<StateResponse> {
        let container = self.pod.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let (status, exit) = match process.progress() {
            Progress::Created => (Status::CREATED, None),
            Progress::Running if container.is_paused() => (Status::PAUSED, None),
            Progress::Running => (Status::RUNNING, None),
            Progress::Ended(exit) => (Status::STOPPED, Some(exit)),
        };
        let paths = process.paths.clone();
        Ok(StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: container.bundle.display().to_string(),
            pid: self.pod.guest()?.machine.pid,
            status: status.into(),
            stdin: paths.input,
            stdout: paths.output,
            stderr: paths.errors,
            terminal: paths.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(Exit::timestamp).unwrap_or_default(),
            ..StateResponse::default()
        })
    }

    /// The limit counts in the guest's cgroup, and the guest's balloon takes what all limits leave.
    fn update(&self, request: &UpdateTaskRequest) -> Result<()> {
        let resources = serde_json::from_slice(&request.resources.value).context("resources")?;
        let guest = self.pod.guest()?;
        guest.agent.update(call(), request).map_err(told)?;
        let container = self.pod.container(&request.id)?;
        if let Some(limit) = memory_limit(Some(&resources)) {
            container.set_limit(Some(limit));
        }
        guest.machine.limit(&guest.settings, self.pod.limit())
    }
}

/// A disk as the guest names it: the first is vda.
fn layer(disk: usize) -> Mount {
    let letter = char::from(b'a' + u8::try_from(disk).unwrap_or(0));
    Mount {
        type_: LAYER.to_owned(),
        source: format!("/dev/vd{letter}"),
        ..Mount::default()
    }
}

impl Service {
    /// The service of this pod. `exit` ends the program.
    pub fn new(pod: Pod, publisher: RemotePublisher, exit: Arc<ExitSignal>) -> Self {
        let shared = Arc::new(Shared { pod, publisher });
        Self { shared, exit }
    }

    fn pod(&self) -> &Pod {
        &self.shared.pod
    }
}

impl Task for Service {
    fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = answer(self.shared.create(&request))?;
        self.shared.publish(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            pid,
            ..TaskCreate::default()
        });
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = answer(self.shared.start(&request))?;
        if request.exec_id.is_empty() {
            self.shared.publish(TaskStart {
                container_id: request.id,
                pid,
                ..TaskStart::default()
            });
        } else {
            self.shared.publish(TaskExecStarted {
                container_id: request.id,
                exec_id: request.exec_id,
                pid,
                ..TaskExecStarted::default()
            });
        }
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod().container(&request.id))?;
        let guest = answer(self.pod().guest())?;
        guest.agent.exec(call(), &request)?;
        let paths = Paths {
            input: request.stdin,
            output: request.stdout,
            errors: request.stderr,
            terminal: request.terminal,
        };
        container.add(&request.exec_id, paths);
        self.shared.publish(TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        });
        Ok(Empty::new())
    }

    fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        answer(self.shared.describe(&request))
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = answer(self.pod().process(&request.id, &request.exec_id))?.wait();
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..WaitResponse::default()
        })
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let process = answer(self.pod().process(&request.id, &request.exec_id))?;
        match process.progress() {
            Progress::Running => {}
            Progress::Ended(_) => return answer(Err(Error::new("process: not found"))),
            // There is nothing in the guest to send a signal to: any ends it.
            Progress::Created => {
                let exit = Exit::now(KILLED);
                self.shared
                    .end(&process, &request.id, &request.exec_id, exit);
                return Ok(Empty::new());
            }
        }
        let guest = answer(self.pod().guest())?;
        let done = guest.agent.kill(call(), &request);
        match done {
            Ok(_) | Err(ttrpc::Error::RpcStatus(_)) => done,
            // What is to be killed ends, whatever the guest makes of it.
            Err(error) if request.signal == SIGKILL => {
                containerd_shim::warn!("kill: {error}: the machine is ended");
                guest.machine.stop();
                Ok(Empty::new())
            }
            Err(_) => done,
        }
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = answer(self.shared.delete(&request))?;
        if request.exec_id.is_empty() {
            self.shared.publish(TaskDelete {
                container_id: request.id,
                pid,
                exit_status: exit.status,
                exited_at: exit.timestamp(),
                ..TaskDelete::default()
            });
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..DeleteResponse::default()
        })
    }

    /// The guest's processes have no numbers on the host: its monitor is what an operator finds there.
    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        answer(self.pod().container(&request.id))?;
        let pid = answer(self.pod().guest())?.machine.pid;
        Ok(PidsResponse {
            processes: vec![ProcessInfo {
                pid,
                ..ProcessInfo::default()
            }],
            ..PidsResponse::default()
        })
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        answer(self.pod().guest())?
            .agent
            .resize_pty(call(), &request)
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = answer(self.pod().process(&request.id, &request.exec_id))?;
        process.streams.close_input();
        Ok(Empty::new())
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod().container(&request.id))?;
        answer(self.pod().guest())?.agent.pause(call(), &request)?;
        container.set_paused(true);
        self.shared.publish(TaskPaused {
            container_id: request.id,
            ..TaskPaused::default()
        });
        Ok(Empty::new())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod().container(&request.id))?;
        answer(self.pod().guest())?.agent.resume(call(), &request)?;
        container.set_paused(false);
        self.shared.publish(TaskResumed {
            container_id: request.id,
            ..TaskResumed::default()
        });
        Ok(Empty::new())
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        answer(self.shared.update(&request))?;
        Ok(Empty::new())
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        answer(self.pod().guest())?.agent.stats(call(), &request)
    }

    fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        answer(self.pod().container(&request.id))?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: answer(self.pod().guest())?.machine.pid,
            ..ConnectResponse::default()
        })
    }

    /// The last container's end is the program's.
    fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        if self.pod().is_empty() {
            self.exit.signal();
        }
        Ok(Empty::new())
    }
}
