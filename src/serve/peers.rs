//! How many connections each client has: one of them cannot take all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Clients and their connections.
pub struct Peers {
    /// Of each at most.
    most: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// The place of a connection; given back when dropped.
pub struct Seat {
    peers: Arc<Peers>,
    client: IpAddr,
}

impl Peers {
    /// Nobody is there yet.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { most, open: Mutex::default() }
    }

    /// A place for a connection from `address`, unless its client has as many as one may have.
    #[must_use]
    pub fn seat(self: &Arc<Self>, address: IpAddr) -> Option<Seat> {
        let client = client(address);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(client).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Seat { peers: self.clone(), client })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.peers.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

/// Whom an address belongs to: of IPv6, who has one has all that share its first 64 bits.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_bound_and_gets_places_back() {
        let peers = Arc::new(Peers::new(2));
        let seat = |address: &str| peers.seat(address.parse().unwrap());
        let first = [seat("10.0.0.1"), seat("::ffff:10.0.0.1")];
        assert!(first.iter().all(Option::is_some) && seat("10.0.0.1").is_none());
        let others = [seat("10.0.0.2"), seat("2001:db8::1"), seat("2001:db8::ffff:2")];
        assert!(others.iter().all(Option::is_some));
        assert!(seat("2001:db8::3").is_none(), "of one network");
        assert!(seat("2001:db8:0:1::3").is_some());
        drop(first);
        assert!(seat("10.0.0.1").is_some());
        drop(others);
        assert!(peers.open.lock().unwrap().is_empty(), "who has gone is forgotten");
    }
}
