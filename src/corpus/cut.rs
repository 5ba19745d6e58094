//! Documents of tokens, and how they are cut: into rows to train on, into windows to calibrate on.

use serde::{Deserialize, Serialize};

/// One text, conversation or piece of one: it begins at position 0 and sees nothing but itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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

/// `count` windows of `length` tokens, evenly spaced over a text; fewer or shorter where it is short.
#[must_use]
pub fn windows(tokens: &[u32], count: usize, length: usize) -> Vec<Vec<u32>> {
    let length = length.min(tokens.len());
    if length == 0 {
        return Vec::new();
    }
    let count = count.min(tokens.len() / length);
    (0..count).map(|i| tokens[i * (tokens.len() / count)..][..length].to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn windows_spread_over_the_text_and_shrink_with_it() {
        let tokens: Vec<u32> = (0..100).collect();
        assert_eq!(windows(&tokens, 4, 10).iter().map(|w| w[0]).collect::<Vec<_>>(), [0, 25, 50, 75]);
        assert_eq!(windows(&tokens, 4, 40).len(), 2);
        assert_eq!(windows(&tokens[..1], 4, 40), [[0]]);
        assert!(windows(&[], 4, 40).is_empty());
    }
}
