//! Flow control (virtio 1.3, 5.10.6.3): neither side sends what the other has no room for. Counts are modulo 2^32.

/// What may be sent to the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outgoing {
    room: u32,
    taken: u32,
    sent: u32,
}

impl Outgoing {
    /// The guest says how much room it has, and how much it has taken out of it.
    pub const fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        (self.room, self.taken) = (buf_alloc, fwd_cnt);
    }

    /// Bytes that may be sent now. A guest that claims to have taken more than it got, gets nothing.
    #[must_use]
    pub const fn credit(&self) -> u32 {
        self.room.saturating_sub(self.sent.wrapping_sub(self.taken))
    }

    /// So many bytes were sent.
    pub const fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }
}

/// What the guest may send.
#[derive(Clone, Copy, Debug)]
pub struct Incoming {
    room: u32,
    received: u32,
    forwarded: u32,
    /// What of `forwarded` the guest knows.
    told: u32,
}

impl Incoming {
    /// There is room for so many bytes.
    #[must_use]
    pub const fn new(room: u32) -> Self {
        Self {
            room,
            received: 0,
            forwarded: 0,
            told: 0,
        }
    }

    /// The guest has sent so many bytes. Returns false if it had no room for them.
    #[must_use]
    pub const fn receive(&mut self, bytes: u32) -> bool {
        // Never more than the room.
        let waiting = self.received.wrapping_sub(self.forwarded);
        if bytes > self.room.saturating_sub(waiting) {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// So many bytes of it need no room any more.
    pub const fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// The guest should hear of its room: a quarter of it is free again. It always knows of the other three.
    #[must_use]
    pub const fn is_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.room / 4
    }

    /// The fields `buf_alloc` and `fwd_cnt` of a header that the guest is about to get.
    pub const fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.room, self.forwarded)
    }

    /// Bytes of room.
    #[must_use]
    pub const fn room(&self) -> u32 {
        self.room
    }
}

/// Room that connections have at most, and those that are opened when there are very many.
const ROOM: u32 = 256 << 10;
const LEAST_ROOM: u32 = 16 << 10;

/// What is shared out, beside the least room of each connection.
const SHARED: u64 = 32 << 20;

/// Room for a further connection, when the others have been promised so many bytes.
#[must_use]
pub fn room(promised: u64) -> u32 {
    let share = SHARED.saturating_sub(promised) / 8;
    u32::try_from(share).map_or(ROOM, |share| share.clamp(LEAST_ROOM, ROOM))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_guest_gets_more_than_it_has_room_for() {
        let mut outgoing = Outgoing::default();
        assert_eq!(outgoing.credit(), 0);
        outgoing.learn(100, 0);
        outgoing.sent(60);
        assert_eq!(outgoing.credit(), 40);
        outgoing.sent(40);
        assert_eq!(outgoing.credit(), 0);
        outgoing.learn(100, 30);
        assert_eq!(outgoing.credit(), 30);
        // A smaller room than what is under way, and a count that is a lie.
        outgoing.learn(10, 30);
        assert_eq!(outgoing.credit(), 0);
        outgoing.learn(u32::MAX, 101);
        assert_eq!(outgoing.credit(), 0);
    }

    #[test]
    fn counts_go_on_beyond_32_bits() {
        let mut outgoing = Outgoing::default();
        let mut incoming = Incoming::new(1 << 16);
        let steps = (1_u64 << 33 >> 16) as u32;
        for step in 1..=steps {
            outgoing.learn(1 << 16, (step - 1) << 16);
            assert_eq!(outgoing.credit(), 1 << 16);
            outgoing.sent(1 << 16);
            assert!(incoming.receive(1 << 16) && !incoming.receive(1));
            incoming.forward(1 << 16);
            assert!(incoming.is_due());
            assert_eq!(incoming.tell(), (1 << 16, step << 16));
        }
    }

    #[test]
    fn rooms_are_bounded_together() {
        let (mut promised, mut rooms) = (0, Vec::new());
        for _ in 0..1024 {
            let room = room(promised);
            promised += u64::from(room);
            rooms.push(room);
        }
        assert_eq!(
            (rooms[0], rooms[100], rooms[1023]),
            (ROOM, ROOM, LEAST_ROOM)
        );
        assert!(promised <= SHARED + 1024 * u64::from(LEAST_ROOM));
    }

    proptest! {
        /// Whatever is sent and forwarded: no more waits than there is room for, and who is told nothing new has most of it.
        #[test]
        fn the_room_is_never_exceeded(steps in prop::collection::vec((0..300_u32, 0..300_u32), 1..100)) {
            let mut incoming = Incoming::new(256);
            let mut waiting = 0;
            for (sent, forwarded) in steps {
                if incoming.receive(sent) {
                    waiting += sent;
                }
                prop_assert!(waiting <= 256);
                let forwarded = forwarded.min(waiting);
                incoming.forward(forwarded);
                waiting -= forwarded;
                if incoming.is_due() {
                    let _ = incoming.tell();
                }
                let unknown = incoming.forwarded.wrapping_sub(incoming.told);
                prop_assert!(unknown < 64);
            }
        }
    }
}
