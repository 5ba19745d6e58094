//! Token sequences to train on, and the order in which they are seen.

use crate::backend::{Batch, PAGE, Span};

/// Training text in sequences of at most `length` tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Data {
    pub sequences: Vec<Vec<u32>>,
    /// Where they came from.
    pub description: String,
}

/// One batch of sequences that all begin at position 0.
#[must_use]
pub fn batch(sequences: &[&[u32]]) -> Batch {
    let mut out = Batch::default();
    let mut page = 0u32;
    for (slot, tokens) in sequences.iter().enumerate() {
        let pages = tokens.len().div_ceil(PAGE) as u32;
        out.tokens.extend_from_slice(tokens);
        out.spans.push(Span { slot, start: 0, len: tokens.len(), pages: (page..page + pages).collect() });
        page += pages;
    }
    out
}

/// An endless order of `count` items: each pass over them is a permutation of its own, the same for the same seed.
#[derive(Clone, Debug)]
pub struct Order {
    count: usize,
    seed: u64,
    pass: u64,
    queue: Vec<usize>,
}

impl Order {
    /// An order that begins with the first pass.
    #[must_use]
    pub fn new(count: usize, seed: u64) -> Self {
        Self { count, seed, pass: 0, queue: Vec::new() }
    }

    /// The next `count` items.
    pub fn take(&mut self, count: usize) -> Vec<usize> {
        if self.count == 0 {
            return Vec::new();
        }
        (0..count).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> usize {
        if self.queue.is_empty() {
            let mut state = SplitMix(self.seed ^ self.pass.wrapping_mul(0xd1b5_4a32_d192_ed03));
            self.pass += 1;
            self.queue = (0..self.count).collect();
            for i in (1..self.count).rev() {
                self.queue.swap(i, (state.next() % (i as u64 + 1)) as usize);
            }
        }
        self.queue.pop().unwrap_or(0)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_sees_everything_once_in_an_order_of_its_own() {
        let mut order = Order::new(50, 7);
        let passes: Vec<Vec<usize>> = (0..3).map(|_| order.take(50)).collect();
        for pass in &passes {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert_ne!(passes[0], passes[1]);
        assert_eq!(Order::new(50, 7).take(150), passes.concat());
        assert_ne!(Order::new(50, 8).take(50), passes[0]);
    }
}
