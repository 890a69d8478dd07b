//! containerd's task service, as the agent offers it.

use std::sync::Arc;

use containerd_shim_protos::Task;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::ttrpc::{self, TtrpcContext};
use ebb_pod::CONTAINER_TYPE;
use ebb_pod::answers::{Exit, answer};
use ebb_pod::error::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::container::Pod;
use crate::{cgroup, stats};

/// The service.
pub struct Service {
    pod: Arc<Pod>,
}

impl Service {
    /// The service for these containers.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    fn create_container(&self, request: &CreateTaskRequest) -> ebb_pod::error::Result<()> {
        let option = request.options.as_ref();
        let option = option.filter(|option| option.type_url == CONTAINER_TYPE);
        let option = option.context("the request has no container")?;
        let container = serde_json::from_slice(&option.value).context("the container")?;
        self.pod.create(&request.id, container, &request.rootfs)
    }

    fn signal(&self, request: &KillRequest) -> ebb_pod::error::Result<()> {
        let container = self.pod.container(&request.id)?;
        let task = container.task(&request.exec_id)?;
        let signal = Signal::try_from(request.signal.cast_signed()).context("signal")?;
        if request.all && signal == Signal::SIGKILL {
            return cgroup::kill(&container.cgroup);
        }
        let first = task.pid().filter(|_| task.exit().is_none());
        let pids = if request.all {
            cgroup::processes(&container.cgroup)?
        } else {
            vec![first.context("the process: not found")?]
        };
        for pid in pids {
            match kill(Pid::from_raw(pid.cast_signed()), signal) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error).context("kill"),
            }
        }
        Ok(())
    }

    fn describe(&self, request: &StateRequest) -> ebb_pod::error::Result<StateResponse> {
        let task = self.pod.container(&request.id)?.task(&request.exec_id)?;
        let (pid, exit) = (task.pid(), task.exit());
        let status = match (pid, exit) {
            (None, _) => Status::CREATED,
            (Some(_), None) => Status::RUNNING,
            (Some(_), Some(_)) => Status::STOPPED,
        };
        Ok(StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            pid: pid.unwrap_or(0),
            status: status.into(),
            terminal: task.has_terminal(),
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(Exit::timestamp).unwrap_or_default(),
            ..StateResponse::default()
        })
    }
}

impl Task for Service {
    fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        answer(self.create_container(&request))?;
        Ok(CreateTaskResponse::default())
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = answer(self.pod.start(&request.id, &request.exec_id))?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let process = serde_json::from_slice(&request.spec.value).context("the process");
        let container = answer(self.pod.container(&request.id))?;
        answer(process.and_then(|process| container.exec(&request.exec_id, process)))?;
        Ok(Empty::new())
    }

    fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        answer(self.describe(&request))
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = answer(self.pod.container(&request.id))?;
        let exit = answer(container.task(&request.exec_id))?.wait();
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..WaitResponse::default()
        })
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        answer(self.signal(&request))?;
        Ok(Empty::new())
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = answer(self.pod.delete(&request.id, &request.exec_id))?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..DeleteResponse::default()
        })
    }

    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = answer(self.pod.container(&request.id))?;
        let pids = answer(cgroup::processes(&container.cgroup))?;
        let processes = pids.into_iter().map(|pid| ProcessInfo {
            pid,
            ..ProcessInfo::default()
        });
        Ok(PidsResponse {
            processes: processes.collect(),
            ..PidsResponse::default()
        })
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.id))?;
        let task = answer(container.task(&request.exec_id))?;
        answer(task.resize(request.width, request.height))?;
        Ok(Empty::new())
    }

    /// Input ends with its connection.
    fn close_io(&self, _: &TtrpcContext, _: CloseIORequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.id))?;
        answer(cgroup::freeze(&container.cgroup, true))?;
        Ok(Empty::new())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.id))?;
        answer(cgroup::freeze(&container.cgroup, false))?;
        Ok(Empty::new())
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.id))?;
        let resources = serde_json::from_slice(&request.resources.value).context("resources");
        answer(resources.and_then(|wanted| cgroup::limit(&container.cgroup, &wanted)))?;
        Ok(Empty::new())
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = answer(self.pod.container(&request.id))?;
        Ok(StatsResponse {
            stats: MessageField::some(answer(stats::of(&container.cgroup))?),
            ..StatsResponse::default()
        })
    }

    fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse::default())
    }
}
