//! What a guest's interfaces are to have: what those of the namespace have, less what the guest's kernel does by itself.

use ebb_pod::error::{Context, Result};
use ebb_pod::network::{Interface, Message, Network};
use futures_util::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};

use super::Link;

/// What the guest's interfaces are to have.
pub async fn network(netlink: &Handle, links: &[Link]) -> Result<Network> {
    let addresses: Vec<_> = netlink
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .context("list addresses")?;
    let routes = netlink.route().get(RouteMessage::default()).execute();
    let routes: Vec<_> = routes.try_collect().await.context("list routes")?;
    let neighbours: Vec<_> = netlink
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .context("list neighbours")?;
    let interfaces = links.iter().map(|link| {
        let mut own: Vec<RouteMessage> = routes.iter().filter_map(|it| route(link, it)).collect();
        own.sort_by_key(has_gateway);
        Interface {
            name: link.name.clone(),
            mac: link.mac,
            addresses: addresses
                .iter()
                .filter_map(|it| address(link, it))
                .map(|it| Message::new(&it))
                .collect(),
            routes: own.iter().map(Message::new).collect(),
            neighbours: neighbours
                .iter()
                .filter_map(|it| neighbour(link, it))
                .map(|it| Message::new(&it))
                .collect(),
        }
    });
    Ok(Network {
        interfaces: interfaces.collect(),
    })
}

/// An address of the interface that the guest's kernel does not give itself.
fn address(link: &Link, message: &AddressMessage) -> Option<AddressMessage> {
    let header = &message.header;
    let six = header.family == AddressFamily::Inet6;
    if header.index != link.number || (six && header.scope == AddressScope::Link) {
        return None;
    }
    let mut kept = message.clone();
    // The host has asked whether somebody else has it.
    kept.header.flags = if six {
        AddressHeaderFlags::Nodad
    } else {
        AddressHeaderFlags::empty()
    };
    kept.attributes.retain(|attribute| {
        matches!(
            attribute,
            AddressAttribute::Address(_)
                | AddressAttribute::Local(_)
                | AddressAttribute::Broadcast(_)
        )
    });
    Some(kept)
}

/// A route by the interface that does not follow from its addresses.
fn route(link: &Link, message: &RouteMessage) -> Option<RouteMessage> {
    let header = &message.header;
    let by_us = message
        .attributes
        .contains(&RouteAttribute::Oif(link.number));
    let ours = header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && header.protocol != RouteProtocol::Kernel;
    if !by_us || !ours {
        return None;
    }
    let mut kept = message.clone();
    // The rest is the state of this moment.
    kept.header.flags &= RouteFlags::Onlink;
    kept.attributes.retain(|attribute| {
        use RouteAttribute::{Destination, Gateway, Metrics, PrefSource, Priority, Via};
        matches!(
            attribute,
            Destination(_) | Gateway(_) | Metrics(_) | PrefSource(_) | Priority(_) | Via(_)
        )
    });
    Some(kept)
}

fn has_gateway(route: &RouteMessage) -> bool {
    let gateway =
        |it: &RouteAttribute| matches!(it, RouteAttribute::Gateway(_) | RouteAttribute::Via(_));
    route.attributes.iter().any(gateway)
}

/// A neighbour that somebody has told the interface.
fn neighbour(link: &Link, message: &NeighbourMessage) -> Option<NeighbourMessage> {
    let header = &message.header;
    if header.ifindex != link.number || header.state != NeighbourState::Permanent {
        return None;
    }
    let mut kept = message.clone();
    kept.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
        )
    });
    Some(kept)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rtnetlink::packet_route::neighbour::NeighbourAddress;
    use rtnetlink::packet_route::route::{RouteAddress, RouteScope};

    use super::*;

    const OURS: u32 = 7;

    fn link() -> Link {
        Link {
            number: OURS,
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        }
    }

    fn route_by(number: u32, protocol: RouteProtocol) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        message.header.scope = RouteScope::Universe;
        message.header.protocol = protocol;
        message.header.flags = RouteFlags::Linkdown | RouteFlags::Onlink;
        message.attributes = vec![
            RouteAttribute::Gateway(RouteAddress::Inet(Ipv4Addr::new(10, 0, 0, 1))),
            RouteAttribute::Oif(number),
            RouteAttribute::Uid(1),
        ];
        message
    }

    #[test]
    fn a_route_that_somebody_has_set_is_kept_without_the_hosts_number_and_state() {
        let kept = route(&link(), &route_by(OURS, RouteProtocol::Boot)).unwrap();
        assert_eq!(kept.header.flags, RouteFlags::Onlink);
        assert!(has_gateway(&kept));
        assert_eq!(kept.attributes.len(), 1, "{kept:?}");
        assert_eq!(route(&link(), &route_by(OURS, RouteProtocol::Kernel)), None);
        assert_eq!(route(&link(), &route_by(8, RouteProtocol::Boot)), None);
    }

    #[test]
    fn an_address_of_the_link_itself_is_left_to_the_guest() {
        let with_scope = |family, scope| {
            let mut message = AddressMessage::default();
            message.header.index = OURS;
            (message.header.family, message.header.scope) = (family, scope);
            address(&link(), &message)
        };
        assert_eq!(with_scope(AddressFamily::Inet6, AddressScope::Link), None);
        let kept = with_scope(AddressFamily::Inet6, AddressScope::Universe).unwrap();
        assert_eq!(kept.header.flags, AddressHeaderFlags::Nodad);
        assert!(with_scope(AddressFamily::Inet, AddressScope::Link).is_some());
    }

    #[test]
    fn a_neighbour_that_was_found_is_left_out() {
        let with_state = |state| {
            let mut message = NeighbourMessage::default();
            (message.header.ifindex, message.header.state) = (OURS, state);
            let address = NeighbourAddress::Inet(Ipv4Addr::new(10, 0, 0, 9));
            message.attributes = vec![
                NeighbourAttribute::Destination(address),
                NeighbourAttribute::Probes(1),
            ];
            neighbour(&link(), &message)
        };
        assert_eq!(with_state(NeighbourState::Reachable), None);
        let kept = with_state(NeighbourState::Permanent).unwrap();
        assert_eq!(kept.attributes.len(), 1, "{kept:?}");
    }
}
