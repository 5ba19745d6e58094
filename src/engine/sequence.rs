//! One sequence on its way through the model: its tokens, how many of them are computed, and where.

use std::collections::BTreeSet;

use super::pages::Pages;
use crate::backend::PAGE;

/// Names a sequence; later ones have larger numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u64);

/// A sequence.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// Given and chosen ones.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values the cache holds.
    pub computed: usize,
    /// Position of the first token after which something is still to be known: the model has to run from there on, even
    /// where the cache holds the tokens.
    pub wanted: usize,
    /// Pages of the cache that hold the tokens, in order.
    pub pages: Vec<u32>,
    /// How many of them are in the tree of [`Pages`]: whole ones.
    kept: usize,
    /// Where recurrent layers keep its state; `None` while it waits, and where there are no such layers.
    pub slot: Option<u32>,
    /// Numbers of tokens, whole pages, after which the state is to be kept for others: a pass ends there.
    pub cuts: BTreeSet<usize>,
    /// Guesses of what follows: the cache holds their keys and values behind those of the tokens, all of which are computed
    /// then.
    ahead: Vec<u32>,
    /// Whether it ran and had to wait again.
    pub gave_way: bool,
    /// Tokens that the cache held when it first began.
    pub cached: usize,
}

impl Sequence {
    pub fn new(tokens: Vec<u32>, wanted: usize) -> Self {
        let (pages, cuts) = (Vec::new(), BTreeSet::new());
        let (slot, ahead) = (None, Vec::new());
        Self { tokens, computed: 0, wanted, pages, kept: 0, slot, cuts, ahead, gave_way: false, cached: 0 }
    }

    /// Tokens to compute.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Beginning that need not be computed where the cache holds it.
    pub fn reusable(&self) -> &[u32] {
        &self.tokens[..self.wanted.min(self.tokens.len().saturating_sub(1))]
    }

    /// Goes on after `computed` tokens that `pages` hold, the first `kept` of which are in the tree.
    pub fn begin(&mut self, pages: Vec<u32>, kept: usize, computed: usize) {
        (self.pages, self.kept, self.computed) = (pages, kept, computed);
    }

    /// How far a pass may go that is to end at `end` at the latest.
    pub fn reach(&self, end: usize) -> usize {
        self.cuts.range(self.computed + 1..).next().map_or(end, |cut| end.min(*cut))
    }

    /// Takes pages for tokens up to `end`, as far as there are any; how far they reach then, `end` at most.
    pub fn take_pages(&mut self, end: usize, pages: &mut Pages) -> usize {
        while self.pages.len() < end.div_ceil(PAGE) {
            let Some(page) = pages.take() else { break };
            self.pages.push(page);
        }
        end.min(self.pages.len() * PAGE)
    }

    /// The cache is to hold keys and values of these guesses behind the tokens, all of which are computed.
    pub fn set_ahead(&mut self, guesses: &[u32]) {
        debug_assert!(guesses.is_empty() || self.remaining() == 0);
        self.ahead.clear();
        self.ahead.extend_from_slice(guesses);
    }

    /// Appends a token, after which something is to be known; whether it was guessed, so that its keys and values are there.
    /// Otherwise what was guessed beyond it was for nothing.
    pub fn push(&mut self, token: u32, pages: &mut Pages) -> bool {
        self.wanted = self.tokens.len();
        self.tokens.push(token);
        let guessed = self.ahead.first() == Some(&token);
        if guessed {
            self.ahead.remove(0);
            self.advance(self.tokens.len(), pages);
        } else {
            self.forget_ahead(pages);
        }
        guessed
    }

    /// Forgets the guesses, and gives the pages back that hold nothing else.
    pub fn forget_ahead(&mut self, pages: &mut Pages) {
        self.ahead.clear();
        let needed = self.tokens.len().div_ceil(PAGE);
        if self.pages.len() > needed {
            pages.release(&self.pages.split_off(needed));
        }
    }

    /// Slot of its own and the slot to copy it to, where the state after what is computed is worth keeping: more of the
    /// prompt follows, and others may begin like this.
    pub fn keep_state(&self, pages: &mut Pages) -> Option<(u32, u32)> {
        let slot = self.slot.filter(|_| self.remaining() > 0 && self.computed == self.kept * PAGE)?;
        Some((slot, pages.keep_state(self.pages[self.kept.checked_sub(1)?])?))
    }

    /// Tokens up to `end` are computed; whole pages become everyone's.
    pub fn advance(&mut self, end: usize, pages: &mut Pages) {
        self.computed = end;
        self.wanted = self.wanted.max(end);
        while (self.kept + 1) * PAGE <= end {
            self.keep_page(pages, (self.kept + 1) * PAGE);
        }
    }

    /// Gives the pages back; what is computed stays in the tree while there is room.
    pub fn retire(&mut self, pages: &mut Pages) {
        self.ahead.clear();
        if self.computed > self.kept * PAGE {
            self.keep_page(pages, self.computed);
        }
        pages.release(&std::mem::take(&mut self.pages));
        if let Some(slot) = self.slot.take() {
            pages.release_slot(slot);
        }
        self.cuts.clear();
        (self.computed, self.kept) = (0, 0);
    }

    fn keep_page(&mut self, pages: &mut Pages, end: usize) {
        let at = self.kept;
        let parent = at.checked_sub(1).map(|before| self.pages[before]);
        self.pages[at] = pages.keep(parent, self.pages[at], &self.tokens[at * PAGE..end]);
        self.kept += 1;
    }
}
