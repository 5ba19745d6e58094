//! Token sequences to train on, and the order in which they are seen.

use sha2::{Digest as _, Sha256};

use super::{RecoverError, Result};
use crate::backend::{Batch, Span};
use crate::random::SplitMix64;

/// One text, conversation or piece of one: it begins at position 0 and sees nothing but itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Document {
    pub tokens: Vec<u32>,
    /// Whether each token is to be predicted: all of a text; of a conversation perhaps what the assistant says.
    pub learned: Vec<bool>,
}

impl Document {
    /// A text of which every token is learned.
    #[must_use]
    pub fn text(tokens: Vec<u32>) -> Self {
        Self { learned: vec![true; tokens.len()], tokens }
    }

    /// Whether a token of it is to be predicted from another.
    #[must_use]
    pub fn teaches(&self) -> bool {
        self.learned.iter().skip(1).any(|l| *l)
    }

    /// Leaves its first `length` tokens, and says how many it loses.
    pub fn cut(&mut self, length: usize) -> usize {
        let lost = self.tokens.len().saturating_sub(length);
        self.tokens.truncate(length);
        self.learned.truncate(length);
        lost
    }

    fn part(&self, from: usize, to: usize) -> Self {
        Self { tokens: self.tokens[from..to].to_vec(), learned: self.learned[from..to].to_vec() }
    }
}

/// Documents side by side that together are at most one sequence long.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row(pub Vec<Document>);

impl Row {
    /// A row of one text.
    #[must_use]
    pub fn text(tokens: Vec<u32>) -> Self {
        Self(vec![Document::text(tokens)])
    }

    /// Tokens in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|d| d.tokens.len()).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Data {
    pub rows: Vec<Row>,
    /// Where they came from.
    pub description: String,
}

/// Shortest piece of a text that is worth a place in a row.
const SHORTEST: usize = 16;

/// Rows of at most `length` tokens. Texts go on in the next row where one is full; conversations (`whole`) do not, they
/// lose what is longer than a row.
#[must_use]
pub fn pack(documents: &[Document], length: usize, whole: bool) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut room = 0;
    for document in documents {
        let all = if whole { document.tokens.len().min(length) } else { document.tokens.len() };
        let mut done = 0;
        while all - done >= 2 {
            let rest = all - done;
            if (whole && rest > room) || room < SHORTEST.min(rest) {
                rows.push(Row::default());
                room = length;
            }
            let take = rest.min(room);
            if let Some(row) = rows.last_mut() {
                row.0.push(document.part(done, done + take));
            }
            (done, room) = (done + take, room - take);
        }
    }
    rows.retain(|r| !r.is_empty());
    rows
}

/// `count` of `rows`, evenly spaced.
#[must_use]
pub fn spread(rows: &[Row], count: usize) -> Vec<Row> {
    let count = count.min(rows.len());
    (0..count).map(|i| rows[i * rows.len() / count].clone()).collect()
}

/// A kind of data and its share of the whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub name: String,
    pub rows: Vec<Row>,
    pub share: f64,
}

impl Data {
    /// `samples` rows in all, of each part as many as its share, evenly spaced; at most what it has.
    ///
    /// # Errors
    /// When a part is empty or its share no positive number.
    pub fn mix(parts: &[Part], samples: usize) -> Result<Self> {
        let total: f64 = parts.iter().map(|p| p.share).sum();
        let mut data = Self::default();
        let mut names = Vec::new();
        for p in parts {
            if p.share <= 0.0 || !p.share.is_finite() {
                return Err(RecoverError::Data(format!("{}: a share of {} is none", p.name, p.share)));
            }
            if p.rows.is_empty() {
                return Err(RecoverError::Data(format!("{}: there is no text in it", p.name)));
            }
            let rows = spread(&p.rows, ((p.share / total * samples as f64).round() as usize).max(1));
            let tokens: usize = rows.iter().map(Row::len).sum();
            names.push(format!("{}: {} sequences, {tokens} tokens", p.name, rows.len()));
            data.rows.extend(rows);
        }
        data.description = names.join("; ");
        Ok(data)
    }

    /// Tokens in all.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Row::len).sum()
    }

    /// SHA-256 of tokens, boundaries and what is learned.
    #[must_use]
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for row in &self.rows {
            hash.update((row.0.len() as u64).to_le_bytes());
            for d in &row.0 {
                hash.update((d.tokens.len() as u64).to_le_bytes());
                d.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
                d.learned.iter().for_each(|l| hash.update([u8::from(*l)]));
            }
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// One batch of rows; each of their documents is a sequence of its own, and nothing of it is kept in a cache.
#[must_use]
pub fn batch(rows: &[&Row]) -> Batch {
    let mut out = Batch::default();
    for d in rows.iter().flat_map(|r| &r.0) {
        out.tokens.extend_from_slice(&d.tokens);
        out.spans.push(Span { start: 0, len: d.tokens.len(), pages: Vec::new() });
    }
    out
}

/// For every token of [`batch`] the one that follows in its document and 1 if that is learned, else 0; the last of a
/// document has none, and 0.
#[must_use]
pub fn next_tokens(rows: &[&Row]) -> (Vec<u32>, Vec<f32>) {
    let (mut targets, mut weights) = (Vec::new(), Vec::new());
    for d in rows.iter().flat_map(|r| &r.0) {
        targets.extend(d.tokens.iter().skip(1).chain(d.tokens.first()));
        weights.extend(d.learned.iter().skip(1).map(|l| if *l { 1.0 } else { 0.0 }));
        weights.extend(d.tokens.first().map(|_| 0.0));
    }
    (targets, weights)
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
            let mut state = SplitMix64(self.seed ^ self.pass.wrapping_mul(0xd1b5_4a32_d192_ed03));
            self.pass += 1;
            self.queue = (0..self.count).collect();
            for i in (1..self.count).rev() {
                self.queue.swap(i, (state.draw() % (i as u64 + 1)) as usize);
            }
        }
        self.queue.pop().unwrap_or(0)
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

    fn texts(lengths: &[usize]) -> Vec<Document> {
        let mut next = 0;
        let mut one = |length: usize| {
            next += length as u32;
            Document::text((next - length as u32..next).collect())
        };
        lengths.iter().map(|l| one(*l)).collect()
    }

    fn shape(rows: &[Row]) -> Vec<Vec<usize>> {
        rows.iter().map(|r| r.0.iter().map(|d| d.tokens.len()).collect()).collect()
    }

    #[test]
    fn texts_are_packed_without_loss_and_conversations_whole() {
        let documents = texts(&[70, 20, 5, 200, 1, 60]);
        let rows = pack(&documents, 64, false);
        assert_eq!(shape(&rows), [vec![64], vec![6, 20, 5, 33], vec![64], vec![64], vec![39, 25], vec![35]]);
        let tokens =
            |d: &[Document]| d.iter().filter(|d| d.tokens.len() > 1).flat_map(|d| d.tokens.clone()).collect::<Vec<_>>();
        assert_eq!(tokens(&rows.iter().flat_map(|r| r.0.clone()).collect::<Vec<_>>()), tokens(&documents));
        let rows = pack(&documents, 64, true);
        assert_eq!(shape(&rows), [vec![64], vec![20, 5], vec![64], vec![60]]);
    }

    /// A token is predicted from the one before it in its own document, where it is learned.
    #[test]
    fn targets_stay_within_documents() {
        let chat = Document { tokens: vec![5, 6, 7, 8], learned: vec![false, false, true, false] };
        let row = Row(vec![Document::text(vec![1, 2, 3]), chat]);
        let (targets, weights) = next_tokens(&[&row]);
        assert_eq!(targets, [2, 3, 1, 6, 7, 8, 5]);
        assert_eq!(weights, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
        let batch = batch(&[&row, &row]);
        assert_eq!(batch.spans.iter().map(|s| s.len).collect::<Vec<_>>(), [3, 4, 3, 4]);
        assert!(batch.spans.iter().all(|s| s.start == 0));
    }

    #[test]
    fn parts_are_mixed_by_their_shares() {
        let rows = |n: usize| (0..n).map(|i| Row::text(vec![i as u32; 8])).collect::<Vec<_>>();
        let part = |name: &str, n, share| Part { name: name.into(), rows: rows(n), share };
        let data = Data::mix(&[part("a", 100, 3.0), part("b", 100, 1.0), part("c", 2, 4.0)], 40).unwrap();
        assert_eq!(data.rows.len(), 15 + 5 + 2);
        assert_eq!(data.tokens(), 22 * 8);
        let less = Data { rows: data.rows[..3].to_vec(), ..data.clone() };
        assert_ne!(data.hash(), less.hash());
        for bad in [part("a", 0, 1.0), part("a", 1, 0.0), part("a", 1, f64::NAN)] {
            assert!(Data::mix(&[bad], 4).unwrap_err().to_string().contains('a'));
        }
    }
}
