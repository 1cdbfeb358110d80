//! Network cards that get addresses of the guest's own.
//!
//! A card's address lies in the guest's drivers as well as in the card, and QEMU's cards take in only
//! what is sent to theirs: changed from outside, it would cut the guest off. So the guest changes it
//! itself, by its agent. Until then its cards are unplugged, as far as it can see: nobody hears of
//! an address that another guest has.

use uuid::Uuid;

use super::error::RevertError;
use crate::agent::{Agent, AgentError};
use crate::qmp::Qmp;

/// The cards of a guest, all of which have been unplugged.
pub(crate) struct Unplugged {
    pub(super) cards: Vec<Card>,
    pub(super) qmp: Qmp,
}

impl Unplugged {
    /// Unplugs the cables of all cards of a guest that stands still with its device state in, which
    /// says whether they are plugged in.
    ///
    /// # Errors
    /// [`AgentError::NoCard`] where there is none.
    pub(super) async fn all(qmp: &Qmp) -> Result<Unplugged, RevertError> {
        let cards = qmp.cards().await?;
        if cards.is_empty() {
            return Err(AgentError::NoCard.into());
        }
        for (name, _) in &cards {
            qmp.set_link(name, false).await?;
        }
        let card = |(name, old)| Card { name, old, new: new_address() };
        Ok(Unplugged { cards: cards.into_iter().map(card).collect(), qmp: qmp.clone() })
    }
}

/// A card that has been unplugged.
pub(super) struct Card {
    /// QEMU's name of it.
    pub name: String,
    /// Its address as the guest has it.
    old: String,
    /// The one that it is to have.
    pub new: String,
}

impl Card {
    /// Has the guest change the address, and plugs the cable in again.
    pub async fn renew(&self, agent: &mut Agent, qmp: &Qmp) -> Result<(), String> {
        let failed = |error: AgentError| format!("{error}; the card stays unplugged (set_link)");
        agent.change_address(&self.old, &self.new).await.map_err(failed)?;
        qmp.set_link(&self.name, true).await.map_err(|error| error.to_string())
    }
}

/// A random address that is administered locally and belongs to one card (IEEE 802).
fn new_address() -> String {
    let [first, rest @ ..] = Uuid::new_v4().into_bytes();
    let bytes = [first & 0xfc | 0x02, rest[0], rest[1], rest[2], rest[3], rest[4]];
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_local_and_differ() {
        let (one, other) = (new_address(), new_address());
        assert_ne!(one, other);
        assert_eq!(one.len(), 17);
        let first = u8::from_str_radix(&one[..2], 16).unwrap();
        assert_eq!(first & 0x03, 0x02, "{one}");
    }
}
