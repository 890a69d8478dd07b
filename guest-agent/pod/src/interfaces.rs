//! Gives the guest's network interfaces what those of the pod's namespace on the host have.

use std::collections::HashMap;

use ebb_pod::error::{Context, Result};
use ebb_pod::network::{Interface, Network, links, with_netlink};
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::{Handle, LinkUnspec};

/// The loopback's number in every namespace.
const LOOPBACK: u32 = 1;

/// Takes the loopback up.
pub fn loopback() -> Result<()> {
    with_netlink(async |netlink| up(&netlink, LOOPBACK).await.context("the loopback"))
}

/// Sets all interfaces up.
pub fn set_up(network: &Network) -> Result<()> {
    with_netlink(async |netlink| {
        let numbers = numbers(&netlink).await?;
        let mut found = Vec::new();
        for (at, interface) in network.interfaces.iter().enumerate() {
            let number = numbers.get(&interface.mac[..]).copied();
            let name = &interface.name;
            let number = number.context(format_args!("the guest has no interface for {name}"))?;
            // Another one may have the name that it is to have.
            rename(&netlink, number, &format!("pod{at}")).await?;
            found.push((number, interface));
        }
        for (number, interface) in found {
            rename(&netlink, number, &interface.name).await?;
            let name = &interface.name;
            fill(&netlink, number, interface).await.context(name)?;
        }
        Ok(())
    })
}

/// The numbers of the guest's interfaces, by their Ethernet addresses.
async fn numbers(netlink: &Handle) -> Result<HashMap<Vec<u8>, u32>> {
    let links = links(netlink).await?;
    let mac = |link: &LinkMessage| {
        link.attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Address(mac) => Some(mac.clone()),
                _ => None,
            })
    };
    let numbers = links
        .iter()
        .filter_map(|link| Some((mac(link)?, link.header.index)));
    Ok(numbers.collect())
}

async fn rename(netlink: &Handle, number: u32, name: &str) -> Result<()> {
    let link = LinkUnspec::new_with_index(number).name(name).build();
    let done = netlink.link().set(link).execute().await;
    done.context(format_args!("name an interface {name}"))
}

async fn up(netlink: &Handle, number: u32) -> Result<()> {
    let link = LinkUnspec::new_with_index(number).up().build();
    netlink.link().set(link).execute().await.context("up")
}

async fn fill(netlink: &Handle, number: u32, interface: &Interface) -> Result<()> {
    for message in &interface.addresses {
        let mut message: AddressMessage = message.parse()?;
        message.header.index = number;
        let mut request = netlink.address().add(number, [0; 4].into(), 0);
        *request.message_mut() = message.clone();
        let what = || format!("address {message:?}");
        request.execute().await.context(what())?;
    }
    up(netlink, number).await?;
    for message in &interface.routes {
        let mut message: RouteMessage = message.parse()?;
        message.attributes.push(RouteAttribute::Oif(number));
        let added = netlink.route().add(message.clone()).replace().execute();
        added.await.context(format_args!("route {message:?}"))?;
    }
    for message in &interface.neighbours {
        let mut message: NeighbourMessage = message.parse()?;
        message.header.ifindex = number;
        let mut request = netlink.neighbours().add(number, [0; 4].into());
        *request.message_mut() = message.clone();
        let what = || format!("neighbour {message:?}");
        request.execute().await.context(what())?;
    }
    Ok(())
}
