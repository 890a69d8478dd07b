//! A pod's network, as its namespace on the host has it: a tap beside each interface, and everything that arrives at one of the
//! two goes on to the other (tc, "mirred egress redirect"). The guest has the interfaces' addresses, and answers for them.

mod describe;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ebb_pod::error::{Context, Error, Result};
use ebb_pod::network::{self, Network, with_netlink};
use ebb_vmm::sys::tap::Tap;
use futures_util::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};
use rtnetlink::{Handle, LinkUnspec};
use serde::{Deserialize, Serialize};

/// The most interfaces of a pod.
const MOST: usize = 4;

/// Frames of all protocols, in the order of bytes that tc wants (`ETH_P_ALL`, include/uapi/linux/if_ether.h).
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();

/// What the monitor needs for an interface of the guest.
pub struct Card {
    /// The open tap.
    pub tap: OwnedFd,
    /// The Ethernet address, in the usual form.
    pub mac: String,
    /// The longest packet in bytes.
    pub mtu: u16,
}

/// What has to be undone: a file that outlives this program.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    namespace: PathBuf,
    interfaces: Vec<u32>,
}

/// An interface of the namespace.
#[derive(Debug)]
struct Link {
    number: u32,
    name: String,
    mac: [u8; 6],
    mtu: u16,
}

/// The pod's network namespace, if it has one that something else has made.
pub fn namespace(spec: &Spec) -> Result<Option<PathBuf>> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_ref());
    let mut all = all.into_iter().flatten();
    let network = all.find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    let network =
        network.context("the host's network: a guest cannot have it; give the pod its own")?;
    Ok(network.path().clone())
}

/// Joins the namespace's interfaces to taps, and notes in the file `record` what [`leave`] has to undo.
pub fn join(namespace: &Path, record: &Path) -> Result<(Vec<Card>, Network)> {
    let done = within(namespace, || {
        with_netlink(async |netlink| {
            let links = links(&netlink).await?;
            refuse_taken(&netlink, &links).await?;
            note(namespace, record, &links)?;
            let mut cards = Vec::new();
            for (at, link) in links.iter().enumerate() {
                let card = bridge(&netlink, at, link).await;
                cards.push(card.context(&link.name)?);
            }
            Ok((cards, describe::network(&netlink, &links).await?))
        })
    });
    done.context(format_args!("the network {}", namespace.display()))
        .inspect_err(|_| leave(record))
}

/// Undoes what was done to the namespace's interfaces. The taps go with the machine.
pub fn leave(record: &Path) {
    let Ok(bytes) = fs::read(record) else {
        return; // The pod has no network.
    };
    let undone = serde_json::from_slice(&bytes)
        .context(record.display())
        .and_then(|kept: Record| {
            within(&kept.namespace, || {
                with_netlink(async |netlink| {
                    for number in kept.interfaces {
                        separate(&netlink, number).await;
                    }
                    Ok(())
                })
            })
        });
    // The namespace may be gone, and all its interfaces with it.
    if let Err(error) = undone {
        eprintln!("leave the network: {error}");
    }
}

/// Does something in a network namespace: in a thread of its own, as a thread is in one namespace.
fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(namespace).context(namespace.display())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).context("setns")?;
            work()
        });
        thread.join().map_err(|_| Error::new("a thread panicked"))?
    })
}

/// The namespace's interfaces that carry Ethernet frames.
async fn links(netlink: &Handle) -> Result<Vec<Link>> {
    let all = network::links(netlink).await?;
    let links: Vec<Link> = all.iter().filter_map(link).collect();
    if links.len() > MOST {
        let names: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
        return Err(Error::new(format!(
            "{} interfaces: {}; a pod has {MOST} at most",
            links.len(),
            names.join(", ")
        )));
    }
    Ok(links)
}

fn link(message: &LinkMessage) -> Option<Link> {
    let header = &message.header;
    if header.link_layer_type != LinkLayerType::Ether || !header.flags.contains(LinkFlags::Up) {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(it) => name = Some(it.clone()),
            LinkAttribute::Address(it) => mac = it[..].try_into().ok(),
            // What virtio-net can say.
            LinkAttribute::Mtu(it) => mtu = u16::try_from(*it).ok().map(|it| it.min(65521)),
            _ => {}
        }
    }
    Some(Link {
        number: header.index,
        name: name?,
        mac: mac?,
        mtu: mtu?,
    })
}

/// An interface whose frames something else redirects is not ours to change.
async fn refuse_taken(netlink: &Handle, links: &[Link]) -> Result<()> {
    let all = netlink.qdisc().get().ingress().execute();
    let all: Vec<_> = all.try_collect().await.context("list the queues")?;
    let kinds = ["ingress", "clsact"];
    let taken = all.iter().filter(|queue| {
        let ours = |attribute: &TcAttribute| {
            matches!(attribute, TcAttribute::Kind(kind) if kinds.contains(&kind.as_str()))
        };
        queue.attributes.iter().any(ours)
    });
    let taken: Vec<u32> = taken
        .map(|queue| queue.header.index.cast_unsigned())
        .collect();
    match links.iter().find(|link| taken.contains(&link.number)) {
        None => Ok(()),
        Some(link) => Err(Error::new(format!(
            "{} has an ingress queue already; remove it: tc qdisc del dev {} ingress",
            link.name, link.name
        ))),
    }
}

fn note(namespace: &Path, record: &Path, links: &[Link]) -> Result<()> {
    let kept = Record {
        namespace: namespace.to_owned(),
        interfaces: links.iter().map(|link| link.number).collect(),
    };
    let bytes = serde_json::to_vec(&kept).context("the record")?;
    fs::write(record, bytes).context(record.display())
}

/// Makes a tap beside an interface, and lets each have what arrives at the other.
async fn bridge(netlink: &Handle, at: usize, link: &Link) -> Result<Card> {
    let name = format!("ebb{at}");
    let tap = Tap::create(&name).context("make a tap")?;
    let number = number_of(netlink, &name).await?;
    let up = LinkUnspec::new_with_index(number)
        .mtu(u32::from(link.mtu))
        .up();
    let set = netlink.link().set(up.build()).execute().await;
    set.context(&name)?;
    redirect(netlink, link.number, number).await?;
    redirect(netlink, number, link.number).await?;
    let bytes: Vec<String> = link.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Card {
        tap,
        mac: bytes.join(":"),
        mtu: link.mtu,
    })
}

async fn number_of(netlink: &Handle, name: &str) -> Result<u32> {
    let request = netlink.link().get().match_name(name.to_owned());
    let found = request.execute().try_next().await.context(name)?;
    found.map(|link| link.header.index).context(name)
}

async fn redirect(netlink: &Handle, from: u32, to: u32) -> Result<()> {
    let from = from.cast_signed();
    let queue = netlink.qdisc().add(from).ingress().execute().await;
    queue.context("add an ingress queue (the kernel's module sch_ingress)")?;
    let filter = netlink.traffic_filter(from).add();
    let filter = filter.parent(INGRESS.into()).protocol(ALL_PROTOCOLS);
    let filter = filter.redirect(to).context("redirect")?.execute().await;
    filter.context("redirect frames (the kernel's modules cls_u32 and act_mirred)")
}

/// The handle of an ingress queue.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

async fn separate(netlink: &Handle, number: u32) {
    let mut request = netlink.qdisc().del(number.cast_signed());
    let header = &mut request.message_mut().header;
    (header.parent, header.handle) = (TcHandle::INGRESS, INGRESS);
    // It may be gone, or the queue never made.
    if let Err(error) = request.execute().await {
        eprintln!("remove an ingress queue: {error}");
    }
}
