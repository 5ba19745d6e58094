//! Which pages of the KV cache are in use, and what they hold: pages are counted, and those of earlier tokens stay in a
//! tree until their room is wanted, so that a sequence that begins alike does not compute them again.
//!
//! Nodes of the tree are pages, each below the page that holds the tokens before it. A node is full ([`PAGE`] tokens) and
//! never written again, or it is the last of a sequence that has ended. Whole pages are shared as they are; the beginning
//! of a page is shared by a copy. A user of a page uses all above it too, so what nobody uses is whole subtrees, which are
//! taken leaf by leaf, the one that was used longest ago first.
//!
//! Recurrent layers keep no tokens but a state, in slots. A running sequence has one; beside some nodes stands one with the
//! state after their tokens, without which their pages are of no use to another sequence. Those that were used longest ago
//! give way.
//!
//! Pure: numbers of pages and slots, not their contents.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::backend::PAGE;

/// Nodes below a node by their tokens.
type Children = BTreeMap<Box<[u32]>, u32>;

/// Counts pages and keeps the tree.
#[derive(Debug)]
pub struct Pages {
    limit: usize,
    kept: usize,
    /// Every page that was ever handed out.
    all: Vec<Page>,
    free: Vec<u32>,
    /// Nodes that hold the first tokens of a sequence.
    roots: Children,
    /// Leaves of the tree that nobody uses, by when they were used last.
    leaves: BTreeSet<(u64, u32)>,
    /// Nodes that nobody uses.
    idle: usize,
    clock: u64,
    /// Slots at most, those that were ever handed out, and which of these are free.
    slot_limit: usize,
    slots_made: usize,
    free_slots: Vec<u32>,
    /// Nodes with a state, by when that was used last.
    states: BTreeSet<(u64, u32)>,
}

#[derive(Debug, Default)]
struct Page {
    users: u32,
    node: Option<Node>,
}

#[derive(Debug)]
struct Node {
    parent: Option<u32>,
    tokens: Box<[u32]>,
    children: Children,
    last_use: u64,
    /// Slot with the state after its tokens, and when that was used last.
    state: Option<(u32, u64)>,
}

/// What the tree holds of a sequence's beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Whole pages, in order.
    pub pages: Vec<u32>,
    /// The page that holds most of what follows, and how many tokens of it.
    pub partial: Option<(u32, usize)>,
}

impl Held {
    /// Tokens in all.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.pages.len() * PAGE + self.partial.map_or(0, |p| p.1)
    }
}

impl Pages {
    /// At most `limit` pages. Of pages that nobody uses `kept` stay while the cache could still grow; beyond that the
    /// oldest of them is taken before a new page is.
    #[must_use]
    pub fn new(limit: usize, kept: usize) -> Self {
        Self {
            limit,
            kept,
            all: Vec::new(),
            free: Vec::new(),
            roots: Children::new(),
            leaves: BTreeSet::new(),
            idle: 0,
            clock: 0,
            slot_limit: 0,
            slots_made: 0,
            free_slots: Vec::new(),
            states: BTreeSet::new(),
        }
    }

    /// With at most `limit` slots.
    #[must_use]
    pub fn with_slots(self, limit: usize) -> Self {
        Self { slot_limit: limit, ..self }
    }

    /// Slots that no sequence has.
    #[cfg(test)]
    pub fn slots_at_rest(&self) -> Vec<u32> {
        let state = |p: &Page| p.node.as_ref()?.state.map(|s| s.0);
        self.free_slots.iter().copied().chain(self.all.iter().filter_map(state)).collect()
    }

    /// Slots that the cache must have.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots_made
    }

    /// A slot, its contents undefined: a free one, a new one, or that of the state used longest ago. `None` when all are
    /// with sequences.
    pub fn take_slot(&mut self) -> Option<u32> {
        if let Some(slot) = self.free_slots.pop() {
            return Some(slot);
        }
        if self.slots_made < self.slot_limit {
            self.slots_made += 1;
            return Some((self.slots_made - 1) as u32);
        }
        let (_, page) = self.states.pop_first()?;
        self.all[page as usize].node.as_mut()?.state.take().map(|s| s.0)
    }

    /// Gives a slot back.
    pub fn release_slot(&mut self, slot: u32) {
        self.free_slots.push(slot);
    }

    /// Slot for the state after the tokens of node `page`, which the caller fills; `None` where it has one, is no node, or
    /// all slots are with sequences.
    pub fn keep_state(&mut self, page: u32) -> Option<u32> {
        let bare = |p: &Page| p.node.as_ref().is_some_and(|n| n.state.is_none());
        if !bare(&self.all[page as usize]) {
            return None;
        }
        let slot = self.take_slot()?;
        self.clock += 1;
        self.states.insert((self.clock, page));
        self.all[page as usize].node.as_mut()?.state = Some((slot, self.clock));
        Some(slot)
    }

    /// How many of these pages, from the first on, end in a node with a state, and its slot.
    #[must_use]
    pub fn state_of(&self, pages: &[u32]) -> Option<(usize, u32)> {
        let state = |&page: &u32| self.all[page as usize].node.as_ref()?.state;
        let at = pages.iter().rposition(|p| state(p).is_some())?;
        state(&pages[at]).map(|s| (at + 1, s.0))
    }

    /// Notes that the state beside `page` is used.
    pub fn touch_state(&mut self, page: u32) {
        self.clock += 1;
        if let Some((_, used)) = self.all[page as usize].node.as_mut().and_then(|n| n.state.as_mut()) {
            self.states.remove(&(*used, page));
            *used = self.clock;
            self.states.insert((*used, page));
        }
    }

    /// Pages that may be in use at once.
    #[cfg(test)]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Pages that the cache must have: numbers handed out so far are below this.
    #[must_use]
    pub fn made(&self) -> usize {
        self.all.len()
    }

    /// Pages that can be taken now.
    #[must_use]
    pub fn available(&self) -> usize {
        self.limit - self.all.len() + self.free.len() + self.idle
    }

    /// Pages that nobody uses and that hold earlier tokens.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.idle
    }

    /// How many use a page.
    #[cfg(test)]
    pub fn users(&self, page: u32) -> u32 {
        self.all[page as usize].users
    }

    /// A page for one user, its contents undefined; `None` when all are in use.
    pub fn take(&mut self) -> Option<u32> {
        let can_grow = self.all.len() < self.limit;
        let page = match self.free.pop() {
            Some(page) => page,
            None if can_grow && self.idle <= self.kept => self.make(),
            None => match self.evict() {
                Some(page) => page,
                None if can_grow => self.make(),
                None => return None,
            },
        };
        self.all[page as usize].users = 1;
        Some(page)
    }

    fn make(&mut self) -> u32 {
        self.all.push(Page::default());
        (self.all.len() - 1) as u32
    }

    /// Takes the leaf that was used longest ago out of the tree.
    fn evict(&mut self) -> Option<u32> {
        let (_, page) = self.leaves.pop_first()?;
        let node = self.all[page as usize].node.take()?;
        self.idle -= 1;
        if let Some((slot, used)) = node.state {
            self.states.remove(&(used, page));
            self.free_slots.push(slot);
        }
        self.children_mut(node.parent).remove(&node.tokens);
        if let Some(parent) = node.parent {
            self.enter_leaf(parent);
        }
        Some(page)
    }

    /// Lists a node that nobody uses and that has nothing below it among the leaves.
    fn enter_leaf(&mut self, page: u32) {
        let p = &self.all[page as usize];
        if let Some(node) = &p.node
            && p.users == 0
            && node.children.is_empty()
        {
            self.leaves.insert((node.last_use, page));
        }
    }

    /// Adds a user to a page and, where it is a node, to none above it.
    pub fn retain(&mut self, page: u32) {
        let p = &mut self.all[page as usize];
        p.users += 1;
        if p.users == 1
            && let Some(node) = &p.node
        {
            self.idle -= 1;
            self.leaves.remove(&(node.last_use, page));
        }
    }

    /// Takes a user from each of a sequence's pages. Those without any are free, or stay in the tree.
    pub fn release(&mut self, pages: &[u32]) {
        self.clock += 1;
        for &page in pages.iter().rev() {
            let p = &mut self.all[page as usize];
            p.users -= 1;
            if p.users > 0 {
                continue;
            }
            match &mut p.node {
                None => self.free.push(page),
                Some(node) => {
                    node.last_use = self.clock;
                    self.idle += 1;
                    self.enter_leaf(page);
                }
            }
        }
    }

    /// What is held of the beginning of `tokens`.
    #[must_use]
    pub fn find(&self, tokens: &[u32]) -> Held {
        let mut held = Held::default();
        let mut children = &self.roots;
        loop {
            let rest = &tokens[held.pages.len() * PAGE..];
            let whole = rest.get(..PAGE).and_then(|t| children.get(t));
            if let Some(&page) = whole
                && let Some(node) = &self.all[page as usize].node
            {
                held.pages.push(page);
                children = &node.children;
                continue;
            }
            // In the order of tokens, what has most in common with `rest` stands next to it.
            let before = children.range::<[u32], _>((Bound::Unbounded, Bound::Excluded(rest))).next_back();
            let after = children.range::<[u32], _>((Bound::Included(rest), Bound::Unbounded)).next();
            let shared = [before, after].into_iter().flatten().map(|(key, &page)| (page, common(key, rest)));
            held.partial = shared.max_by_key(|s| s.1).filter(|s| s.1 > 0);
            return held;
        }
    }

    /// Enters `page`, which its one user has filled with `tokens` (those of one page at most), into the tree below that
    /// user's page before it. Where another page holds the same there, that page is the user's from now on and `page` is
    /// free. Returns the user's page.
    pub fn keep(&mut self, parent: Option<u32>, page: u32, tokens: &[u32]) -> u32 {
        let (own, siblings) = (page, self.children_mut(parent));
        let same = siblings.range::<[u32], _>((Bound::Included(tokens), Bound::Unbounded)).next();
        if let Some((key, &page)) = same
            && key.starts_with(tokens)
        {
            if page != own {
                self.retain(page);
                self.release(&[own]);
            }
            return page;
        }
        siblings.insert(tokens.into(), page);
        let node = Node { parent, tokens: tokens.into(), children: Children::new(), last_use: self.clock, state: None };
        self.all[page as usize].node = Some(node);
        page
    }

    fn children_mut(&mut self, parent: Option<u32>) -> &mut Children {
        match parent.and_then(|p| self.all[p as usize].node.as_mut()) {
            Some(node) => &mut node.children,
            None => &mut self.roots,
        }
    }
}

/// Length of the common beginning.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: usize) -> Vec<u32> {
        (0..n as u32).collect()
    }

    /// Pages of a sequence that computed `tokens` and has ended.
    fn computed(pages: &mut Pages, tokens: &[u32]) -> Vec<u32> {
        let mut table: Vec<u32> = Vec::new();
        for part in tokens.chunks(PAGE) {
            let page = pages.take().unwrap();
            table.push(pages.keep(table.last().copied(), page, part));
        }
        pages.release(&table);
        table
    }

    #[test]
    fn what_begins_alike_is_found_in_whole_pages_and_the_best_part_of_one() {
        let mut pages = Pages::new(16, 16);
        let first = computed(&mut pages, &tokens(40));
        let other = [&tokens(37)[..], &[99; 7]].concat();
        let second = computed(&mut pages, &other);
        assert_eq!(second[..2], first[..2]);
        assert_eq!((pages.made(), pages.available()), (4, 16));
        assert_eq!(pages.find(&tokens(32)), Held { pages: first[..2].into(), partial: None });
        assert_eq!(pages.find(&tokens(39)).partial, Some((first[2], 7)));
        assert_eq!(pages.find(&other[..41]).partial, Some((second[2], 9)));
        assert_eq!(pages.find(&tokens(10)), Held { pages: vec![], partial: Some((first[0], 10)) });
        assert_eq!(pages.find(&[5]), Held::default());
    }

    #[test]
    fn equal_contents_are_held_once() {
        let mut pages = Pages::new(8, 8);
        let first = computed(&mut pages, &tokens(20));
        assert_eq!(computed(&mut pages, &tokens(20)), first);
        assert_eq!(computed(&mut pages, &tokens(18)), first, "a shorter end of the same");
        // Two were needed beside them, and are free again.
        assert_eq!((pages.made(), pages.free.len(), pages.idle), (3, 1, 2));
    }

    #[test]
    fn the_oldest_leaf_goes_first_and_what_is_in_use_stays() {
        let mut pages = Pages::new(4, 4);
        let old = computed(&mut pages, &tokens(2 * PAGE));
        let new = computed(&mut pages, &[7; 2 * PAGE]);
        pages.retain(old[0]);
        assert_eq!(pages.available(), 3);
        let taken: Vec<u32> = std::iter::from_fn(|| pages.take()).collect();
        assert_eq!(taken, [old[1], new[1], new[0]]);
        assert_eq!(pages.find(&tokens(2 * PAGE)).pages, [old[0]]);
        assert_eq!(pages.available(), 0);
    }

    #[test]
    fn beyond_what_is_to_be_kept_old_pages_are_taken_before_the_cache_grows() {
        let mut pages = Pages::new(100, 3);
        for i in 0..20 {
            computed(&mut pages, &[i; PAGE]);
        }
        assert_eq!(pages.made(), 4);
        assert!(pages.find(&[19; PAGE]).pages.len() == 1 && pages.find(&[0; PAGE]).pages.is_empty());
        let busy: Vec<u32> = (0..100).map(|_| pages.take().unwrap()).collect();
        assert_eq!((pages.take(), pages.made()), (None, 100));
        pages.release(&busy);
        assert_eq!(pages.available(), 100);
    }
}
