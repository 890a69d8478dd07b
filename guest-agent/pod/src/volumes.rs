//! Volumes of containers: mounts of these types in a specification that the agent gets. Their options are those of a bind.

/// The type of a copy of something that the host has. The source is its name in the archive that comes over
/// [`STREAM_PORT`](crate::STREAM_PORT) before the container is started.
pub const COPY: &str = "ebb-copy";

/// The type of a folder that starts empty and is the same for all containers of the pod whose mounts have this source.
pub const SHARED: &str = "ebb-shared";
