//! A replica's name: `ip:port:index`, packed into the u64 that raft uses as node id.
//!
//! Format owned: `ipv4 << 32 | port << 16 | index`, as stored in configurations on disk. 0 (`0.0.0.0:0:0`) = nobody.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A replica; see the module's comment for the packing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u64);

/// Why a text is no peer id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdError {
    /// Not two or three parts.
    #[error("a peer id has two or three parts, ip:port[:index]; this one has {0}")]
    Parts(usize),
    /// First part.
    #[error("{0:?} is not an IPv4 address")]
    Address(String),
    /// Second part.
    #[error("{0:?} is not a port")]
    Port(String),
    /// Third part.
    #[error("{0:?} is not a replica index (0-65535)")]
    Index(String),
}

impl PeerId {
    /// Nobody; what Curve prints as `0.0.0.0:0:0`.
    pub const NONE: Self = Self(0);

    /// From its parts.
    #[must_use]
    pub const fn new(ip: Ipv4Addr, port: u16, index: u16) -> Self {
        Self(((ip.to_bits() as u64) << 32) | ((port as u64) << 16) | index as u64)
    }
    /// Address.
    #[must_use]
    pub const fn ip(self) -> Ipv4Addr {
        Ipv4Addr::from_bits((self.0 >> 32) as u32)
    }
    /// Port.
    #[must_use]
    pub const fn port(self) -> u16 {
        (self.0 >> 16) as u16
    }
    /// Replica index; always 0 in Curve's deployments.
    #[must_use]
    pub const fn index(self) -> u16 {
        self.0 as u16
    }
    /// True for [`PeerId::NONE`].
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.ip(), self.port(), self.index())
    }
}

impl FromStr for PeerId {
    type Err = PeerIdError;

    fn from_str(text: &str) -> Result<Self, PeerIdError> {
        let parts = text.split(':').count();
        let mut split = text.split(':');
        let (Some(ip), Some(port), 2 | 3) = (split.next(), split.next(), parts) else {
            return Err(PeerIdError::Parts(parts));
        };
        let index = split.next().unwrap_or("0");
        Ok(Self::new(
            ip.parse().map_err(|_| PeerIdError::Address(ip.to_owned()))?,
            number(port).ok_or_else(|| PeerIdError::Port(port.to_owned()))?,
            number(index).ok_or_else(|| PeerIdError::Index(index.to_owned()))?,
        ))
    }
}

/// Digits only: `u16::from_str` would also take a leading `+`.
fn number(text: &str) -> Option<u16> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_or_three_parts() {
        let peer: PeerId = "10.0.0.1:8200:0".parse().unwrap();
        assert_eq!(peer.0, (0x0a00_0001 << 32) | (8200 << 16));
        assert_eq!("10.0.0.1:8200".parse::<PeerId>().unwrap(), peer);
        assert_eq!(peer.to_string(), "10.0.0.1:8200:0");
        assert_eq!(PeerId::NONE.to_string(), "0.0.0.0:0:0");
        assert!("0.0.0.0:0:0".parse::<PeerId>().unwrap().is_none());
    }

    #[test]
    fn refuses_other_shapes() {
        for (text, error) in [
            ("", PeerIdError::Parts(1)),
            ("10.0.0.1", PeerIdError::Parts(1)),
            ("10.0.0.1:1:0:0", PeerIdError::Parts(4)),
            ("host:1:0", PeerIdError::Address("host".into())),
            ("10.0.0.1:+1:0", PeerIdError::Port("+1".into())),
            ("10.0.0.1:65536:0", PeerIdError::Port("65536".into())),
            ("10.0.0.1:1:", PeerIdError::Index(String::new())),
            ("10.0.0.1:1:-1", PeerIdError::Index("-1".into())),
        ] {
            assert_eq!(text.parse::<PeerId>(), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trip(raw: u64) {
            prop_assert_eq!(PeerId(raw).to_string().parse::<PeerId>().unwrap(), PeerId(raw));
        }
        #[test]
        fn any_text_is_safe(text in ".{0,40}") {
            let _ = text.parse::<PeerId>();
        }
    }
}
