//! The network of a pod: what its network namespace on the host has, and the guest gets.

use std::future::Future;

use futures_util::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::{Emitable, Parseable};
use rtnetlink::packet_route::link::LinkMessage;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

/// The interfaces of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// All of them but the loopback.
    pub interfaces: Vec<Interface>,
}

/// An interface of a pod. The guest finds its own by the address of its card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name in the namespace, and in the guest.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its addresses, each an `AddressMessage`.
    pub addresses: Vec<Message>,
    /// Its routes, each a `RouteMessage`: those without a gateway first, by which the others are reached.
    pub routes: Vec<Message>,
    /// Its permanent neighbours, each a `NeighbourMessage`.
    pub neighbours: Vec<Message>,
}

/// A message of rtnetlink(7), as the host's kernel gave it, less what means nothing in the guest. The number of the interface
/// in it is the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message(Vec<u8>);

impl Message {
    /// The bytes of a message.
    pub fn new(message: &impl Emitable) -> Self {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        Self(bytes)
    }

    /// The message.
    ///
    /// # Errors
    /// The bytes are none.
    pub fn parse<T: Parseable<[u8]>>(&self) -> Result<T> {
        T::parse(&self.0).context("a message of rtnetlink")
    }
}

/// All interfaces of the namespace.
///
/// # Errors
/// The kernel's.
pub async fn links(netlink: &Handle) -> Result<Vec<LinkMessage>> {
    let all = netlink.link().get().execute().try_collect().await;
    all.context("list the interfaces")
}

/// Does something with a connection to the kernel's network, in the namespace of the calling thread.
///
/// # Errors
/// There is no connection, or `work` fails.
pub fn with_netlink<T, F>(work: impl FnOnce(Handle) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_io().build().context("netlink")?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("netlink")?;
        tokio::spawn(connection);
        work(handle).await
    })
}
