//! Who of those that have connected is served next. Each process has its share of the places: however many connections one has, another
//! that holds no place gets the next one.

use std::collections::VecDeque;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Connections that are served at the same time.
pub(super) const MAX_CONNECTIONS: usize = 16;
/// Further connections that wait for a place.
pub(super) const MAX_WAITING: usize = 256;

/// The process that has connected, and its user. All those of a user count as one that are in namespaces which this process does not
/// see: they are `None`.
pub(super) type Peer = (Option<i32>, u32);

/// Connections that are served or wait for that.
pub(super) struct Admission<C> {
    waiting: VecDeque<(Peer, C)>,
    served: Vec<Peer>,
    leave: UnboundedSender<Peer>,
    left: UnboundedReceiver<Peer>,
}

/// A place of a connection. It is free once this is dropped.
pub(super) struct Place {
    peer: Peer,
    leave: UnboundedSender<Peer>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nobody waits for it once the server has ended.
        let _ = self.leave.send(self.peer);
    }
}

impl<C> Admission<C> {
    pub fn new() -> Self {
        let (leave, left) = unbounded_channel();
        Self {
            waiting: VecDeque::new(),
            served: Vec::new(),
            leave,
            left,
        }
    }

    /// `connection` of `peer` waits from now on. Returns the connection that must go if too many wait: the newest one of the process
    /// that has most of them.
    pub fn arrive(&mut self, peer: Peer, connection: C) -> Option<C> {
        self.waiting.push_back((peer, connection));
        if self.waiting.len() <= MAX_WAITING {
            return None;
        }
        let mut peers: Vec<Peer> = self.waiting.iter().map(|(peer, _)| *peer).collect();
        peers.sort_unstable();
        let most = peers
            .chunk_by(|a, b| a == b)
            .max_by_key(|of_one| of_one.len());
        let greediest = most.and_then(|of_one| of_one.first())?;
        let newest = self
            .waiting
            .iter()
            .rposition(|(peer, _)| peer == greediest)?;
        let (_, connection) = self.waiting.remove(newest)?;
        Some(connection)
    }

    /// The next connection to serve, if there is a place and somebody waits: of those whose process has fewest places, the one that
    /// has waited longest.
    pub fn admit(&mut self) -> Option<(Place, C)> {
        if self.served.len() >= MAX_CONNECTIONS {
            return None;
        }
        let places = |of: &Peer| self.served.iter().filter(|peer| *peer == of).count();
        let waiting = self.waiting.iter().enumerate();
        let (next, _) = waiting.min_by_key(|(_, (peer, _))| places(peer))?;
        let (peer, connection) = self.waiting.remove(next)?;
        self.served.push(peer);
        let leave = self.leave.clone();
        Some((Place { peer, leave }, connection))
    }

    /// Whether somebody waits for a place.
    pub fn is_crowded(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Waits until a place is free again. May be given up at any time.
    pub async fn wait_for_place(&mut self) {
        // This has a sender itself, so there is no end.
        let Some(peer) = self.left.recv().await else {
            return;
        };
        let place = self.served.iter().position(|served| *served == peer);
        place.map(|place| self.served.swap_remove(place));
    }

    /// Waits until nobody is served any more.
    pub async fn end(&mut self) {
        while !self.served.is_empty() {
            self.wait_for_place().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: Peer = (Some(1), 0);
    const OTHER: Peer = (Some(2), 0);
    const HIDDEN: Peer = (None, 7);

    /// Serves as many as there are places for; which, and their places.
    fn admitted(admission: &mut Admission<usize>) -> (Vec<usize>, Vec<Place>) {
        let all = std::iter::from_fn(|| admission.admit());
        all.map(|(place, connection)| (connection, place)).unzip()
    }

    fn wait_for<T>(event: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(event)
    }

    #[test]
    fn the_next_place_is_for_a_process_that_has_fewer() {
        let mut admission = Admission::new();
        for connection in 0..100 {
            assert_eq!(admission.arrive(GREEDY, connection), None);
        }
        let (served, mut places) = admitted(&mut admission);
        assert_eq!(served, (0..MAX_CONNECTIONS).collect::<Vec<_>>());
        for (peer, connection) in [(OTHER, 200), (OTHER, 201), (HIDDEN, 300), (HIDDEN, 301)] {
            assert_eq!(admission.arrive(peer, connection), None);
        }
        let mut next = || {
            drop(places.pop());
            wait_for(admission.wait_for_place());
            let (served, more) = admitted(&mut admission);
            places.splice(0..0, more);
            served
        };
        let expected = [200, 300, 201, 301, MAX_CONNECTIONS];
        assert_eq!(expected.map(|_| next()), expected.map(|it| vec![it]));
        assert!(admission.is_crowded());
    }

    #[test]
    fn who_has_most_that_wait_loses_the_newest() {
        let mut admission = Admission::new();
        for connection in 0..MAX_WAITING {
            assert_eq!(admission.arrive(GREEDY, connection), None);
        }
        assert_eq!(admission.arrive(GREEDY, 1000), Some(1000));
        assert_eq!(admission.arrive(OTHER, 2000), Some(MAX_WAITING - 1));
        assert_eq!(admission.arrive(HIDDEN, 3000), Some(MAX_WAITING - 2));
        let (served, places) = admitted(&mut admission);
        let first: Vec<usize> = [0, 2000, 3000].into_iter().chain(1..14).collect();
        assert_eq!(served, first);
        drop(places);
        wait_for(admission.end());
        assert_eq!(admission.served, []);
    }

    #[test]
    fn nobody_waits_in_vain() {
        let mut admission = Admission::new();
        let (mut seen, mut places) = (0, Vec::new());
        for connection in 0..3 * MAX_CONNECTIONS {
            let peer = (Some(connection as i32 % 3), 0);
            assert_eq!(admission.arrive(peer, connection), None);
        }
        while admission.is_crowded() {
            let (served, more) = admitted(&mut admission);
            seen += served.len();
            places.extend(more);
            drop(places.pop());
            wait_for(admission.wait_for_place());
        }
        assert_eq!(seen, 3 * MAX_CONNECTIONS);
    }
}
