//! Layouts of virtio 1.3, 5.1: configuration, the header of a frame, and which offloads stand behind which feature.

use virtio_bindings::virtio_net as net;

use crate::sys::tap::offload;

/// Device type (virtio 1.3, 5.1.1).
pub const DEVICE_TYPE: u32 = 1;

/// Size in bytes of the header in front of each frame (virtio 1.3, 5.1.6). The tap reads and writes it, but for its last field.
pub const HEADER_BYTES: usize = 12;

/// Where in the header the number of buffers is, which a frame for the guest takes.
pub const NUM_BUFFERS: usize = 10;

/// The largest frame: a packet of 65535 bytes, addresses, type, and a VLAN's tag.
pub const FRAME_BYTES: usize = 65535 + 18;

/// The smallest: addresses and type (IEEE 802.3).
pub const ETHERNET_BYTES: usize = 14;

/// Which features need which offload of the tap: for frames to the guest, and for those from it.
const OFFLOADS: [(u32, u32, u32); 7] = [
    (
        offload::CSUM,
        net::VIRTIO_NET_F_GUEST_CSUM,
        net::VIRTIO_NET_F_CSUM,
    ),
    (
        offload::TSO4,
        net::VIRTIO_NET_F_GUEST_TSO4,
        net::VIRTIO_NET_F_HOST_TSO4,
    ),
    (
        offload::TSO6,
        net::VIRTIO_NET_F_GUEST_TSO6,
        net::VIRTIO_NET_F_HOST_TSO6,
    ),
    (
        offload::ECN,
        net::VIRTIO_NET_F_GUEST_ECN,
        net::VIRTIO_NET_F_HOST_ECN,
    ),
    (
        offload::UFO,
        net::VIRTIO_NET_F_GUEST_UFO,
        net::VIRTIO_NET_F_HOST_UFO,
    ),
    (
        offload::USO4,
        net::VIRTIO_NET_F_GUEST_USO4,
        net::VIRTIO_NET_F_HOST_USO,
    ),
    (
        offload::USO6,
        net::VIRTIO_NET_F_GUEST_USO6,
        net::VIRTIO_NET_F_HOST_USO,
    ),
];

/// The features that a tap makes possible which supports `offloads`.
#[must_use]
pub fn features_of(offloads: u32) -> u64 {
    let possible = OFFLOADS.iter().filter(|(flag, ..)| offloads & flag != 0);
    possible.fold(0, |all, (_, guest, host)| all | 1 << guest | 1 << host)
}

/// What frames for the guest may leave to it, by the features that both sides agreed on. The kernel refuses everything without
/// the checksum, and USO for one version of IP alone.
#[must_use]
pub fn offloads_of(features: u64) -> u32 {
    let agreed = OFFLOADS
        .iter()
        .filter(|(_, guest, _)| features & 1 << guest != 0);
    let mut flags = agreed.fold(0, |all, (flag, ..)| all | flag);
    if flags & offload::CSUM == 0 {
        return 0;
    }
    let uso = offload::USO4 | offload::USO6;
    if flags & uso != uso {
        flags &= !uso;
    }
    if flags & (offload::TSO4 | offload::TSO6) == 0 {
        flags &= !offload::ECN;
    }
    flags
}

/// Returns true if frames for the guest may be larger than its interface's packets.
#[must_use]
pub const fn is_large(offloads: u32) -> bool {
    offloads & !(offload::CSUM | offload::ECN) != 0
}

/// The device's configuration up to `mtu` (virtio 1.3, 5.1.4). Fields of features that are not offered are zero.
#[must_use]
pub fn config(mac: [u8; 6], mtu: u16) -> [u8; 12] {
    let mut raw = [0; 12];
    raw[..6].copy_from_slice(&mac);
    raw[6..8].copy_from_slice(&(net::VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    raw[10..].copy_from_slice(&mtu.to_le_bytes());
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of virtio 1.3, 5.1.3.
    #[test]
    fn each_feature_has_its_offload() {
        let all = offload::CSUM | offload::TSO4 | offload::TSO6 | offload::ECN | offload::UFO;
        let bits = |bits: &[u32]| bits.iter().fold(0_u64, |all, bit| all | 1 << bit);
        let tcp = bits(&[0, 1, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(features_of(all), tcp);
        let uso = offload::USO4 | offload::USO6;
        assert_eq!(features_of(uso), bits(&[54, 55, 56]));
        assert_eq!(features_of(0), 0);
        assert_eq!(offloads_of(features_of(all | uso)), all | uso);
        // Features for frames from the guest are the kernel's matter.
        assert_eq!(offloads_of(bits(&[0, 11, 12, 13, 14, 56])), 0);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_left_out() {
        for (features, expected) in [
            (1 << 7 | 1 << 8, 0),
            (1 << 1, offload::CSUM),
            (1 << 1 | 1 << 9, offload::CSUM),
            (1 << 1 | 1 << 54, offload::CSUM),
            (
                1 << 1 | 1 << 7 | 1 << 9,
                offload::CSUM | offload::TSO4 | offload::ECN,
            ),
        ] {
            assert_eq!(offloads_of(features), expected, "{features:#x}");
        }
        assert!(!is_large(offload::CSUM | offload::ECN) && is_large(offload::UFO));
    }

    #[test]
    fn the_configuration_has_its_fields_where_they_belong() {
        let raw = config([2, 3, 4, 5, 6, 7], 0x0102);
        assert_eq!(raw, [2, 3, 4, 5, 6, 7, 1, 0, 0, 0, 2, 1]);
    }
}
