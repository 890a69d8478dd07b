//! containerd's task service (version 2): what concerns the machine happens here, the rest in the guest.

use std::path::Path;
use std::sync::Arc;

use containerd_shim::event::Event;
use containerd_shim::protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim::protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::ttrpc;
use containerd_shim::protos::ttrpc::context::Context as Call;
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::{ExitSignal, Task, TtrpcContext};
use ebb_pod::answers::{Exit, answer};
use ebb_pod::error::{Context, Error, Result};
use ebb_pod::{CONTAINER_TYPE, Connection};

use crate::copies::Copies;
use crate::guest::{KILLED, SIGKILL, call, told};
use crate::machine::Wanted;
use crate::pod::{Container, Guest, Pod, Process, Progress, memory_limit, sandbox_limit};
use crate::rootfs::Root;
use crate::settings::Settings;
use crate::streams::Paths;
use crate::{agent, cgroup, copies, network, refused};

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
        let most = settings.volume_mib << 20;
        let (mut container, copies) = copies::container(bundle, most)?;
        refused::check(&container.spec)?;
        let linux = container.spec.linux().as_ref();
        let limit = memory_limit(linux.and_then(|linux| linux.resources().as_ref()));
        let of_pod = limit.or_else(|| sandbox_limit(&container.spec));
        container.sandbox = self.pod.sandbox_of(&request.id);
        let root = Root::find(&settings.images, &request.rootfs)?;
        let paths = Paths {
            input: request.stdin.clone(),
            output: request.stdout.clone(),
            errors: request.stderr.clone(),
            terminal: request.terminal,
        };
        let kept = self.pod.add(&request.id, bundle, &root, limit, paths)?;
        let mut start = || -> Result<u32> {
            let wanted = Wanted {
                limit: of_pod,
                network: network::namespace(&container.spec)?,
                cgroup: cgroup::named(&container.spec)?,
                disks: self.pod.disks_for(&root),
            };
            let guest = self.pod.guest_for(&settings, &wanted)?;
            guest.machine.set_disk(kept.disk, Some(&root.path))?;
            container.network = guest.take_network();
            let value = serde_json::to_vec(&container).context("the container")?;
            let wanted = CreateTaskRequest {
                rootfs: vec![root.on_disk(kept.disk)],
                options: MessageField::some(Any {
                    type_url: CONTAINER_TYPE.to_owned(),
                    value,
                    ..Any::default()
                }),
                ..request.clone()
            };
            guest.agent.create(call(), &wanted).map_err(told)?;
            self.copy(&guest, &request.id, &copies)?;
            if let Some(message) = &copies.message {
                kept.message.get_or_init(|| message.clone());
            }
            Ok(guest.machine.pid)
        };
        start().inspect_err(|_| self.pod.remove(&request.id))
    }

    /// Sends a container's copies; without them it is not to be.
    fn copy(&self, guest: &Guest, id: &str, copies: &Copies) -> Result<()> {
        if copies.is_empty() {
            return Ok(());
        }
        let connection = Connection::Copies {
            container: id.to_owned(),
        };
        let sent = agent::stream(&guest.machine, &connection)
            .and_then(|connection| copies.send(&connection));
        sent.inspect_err(|_| {
            let unwanted = DeleteRequest {
                id: id.to_owned(),
                ..DeleteRequest::default()
            };
            guest.delete(&unwanted);
        })
    }

    /// Starts a process; a thread waits for its end.
    fn start(self: &Arc<Self>, request: &StartRequest) -> Result<u32> {
        let guest = self.pod.guest()?;
        let process = self.pod.process(&request.id, &request.exec_id)?;
        guest.agent.start(call(), request).map_err(told)?;
        process.started();
        let streams = &process.streams;
        let carried = streams.start(
            &guest.machine,
            &request.id,
            &request.exec_id,
            &process.paths,
        );
        let (own, awaited) = (Arc::clone(self), request.clone());
        let (its_guest, its_process) = (Arc::clone(&guest), Arc::clone(&process));
        std::thread::spawn(move || own.await_end(&its_guest, &its_process, &awaited));
        if let Err(error) = carried {
            // It runs all the same.
            let unwanted = KillRequest {
                id: request.id.clone(),
                exec_id: request.exec_id.clone(),
                signal: SIGKILL,
                ..KillRequest::default()
            };
            if let Err(error) = guest.kill(&process, &unwanted) {
                containerd_shim::warn!("kill: {error}");
            }
            return Err(error);
        }
        Ok(guest.machine.pid)
    }

    fn await_end(&self, guest: &Guest, process: &Process, request: &StartRequest) {
        let wanted = WaitRequest {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            ..WaitRequest::default()
        };
        let exit = guest.wait(&wanted);
        process.streams.finish();
        if let Ok(container) = self.pod.container(&request.id) {
            self.tell_oom(guest, &request.id, &container);
            let message = container.message.get();
            if let Some(message) = message.filter(|_| request.exec_id.is_empty())
                && let Err(error) = message.fetch(&guest.machine, &request.id)
            {
                containerd_shim::warn!("the message of {}: {error}", request.id);
            }
        }
        self.end(process, &request.id, &request.exec_id, exit);
    }

    /// Tells containerd if the guest's kernel has killed processes of a container for want of memory: before it hears of their end,
    /// whose reason this is.
    fn tell_oom(&self, guest: &Guest, id: &str, container: &Container) {
        let kills = guest.oom_kills(id);
        if kills.is_some_and(|kills| container.note_oom_kills(kills)) {
            self.publish(TaskOOM {
                container_id: id.to_owned(),
                ..TaskOOM::default()
            });
        }
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
        guest.delete(request);
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
        answer(guest.agent.exec(call(), &request).map_err(told))?;
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
        answer(guest.kill(&process, &request))?;
        Ok(Empty::new())
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
        let guest = answer(self.pod().guest())?;
        answer(guest.agent.resize_pty(call(), &request).map_err(told))
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = answer(self.pod().process(&request.id, &request.exec_id))?;
        process.streams.close_input();
        Ok(Empty::new())
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod().container(&request.id))?;
        let guest = answer(self.pod().guest())?;
        answer(guest.agent.pause(call(), &request).map_err(told))?;
        container.set_paused(true);
        self.shared.publish(TaskPaused {
            container_id: request.id,
            ..TaskPaused::default()
        });
        Ok(Empty::new())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod().container(&request.id))?;
        let guest = answer(self.pod().guest())?;
        answer(guest.agent.resume(call(), &request).map_err(told))?;
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
        let guest = answer(self.pod().guest())?;
        answer(guest.stats(&request))
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
