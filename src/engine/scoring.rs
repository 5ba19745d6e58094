//! Log-probabilities of many token sequences: what begins alike is computed once, what is left runs in batches.
//!
//! Sequences are sorted, so that those with a common beginning stand together, and cut into rounds. In a round they form
//! a tree of segments; segments of equal depth run together, each on the KV cache of the segment before it. A token's
//! score depends on its own sequence only, bit for bit: see the determinism tests.

use std::ops::{ControlFlow, Range};

use super::page_pool::PagePool;
use crate::backend::{Backend, Batch, PAGE, Result, Span};
use crate::formats::kv::KvFormat;
use crate::logits::TokenScore;
use crate::model::Decoder;

/// Tokens that a round computes, at least; a longer sequence makes a round of its own.
const ROUND_TOKENS: usize = 2048;
/// Sequences in a round, at most: bounds the pages that are only partly filled.
const ROUND_SEQUENCES: usize = 64;
/// Tokens of one forward pass: bounds the memory of activations.
const PASS_TOKENS: usize = 512;
/// Rows of logits at a time, for the same reason.
const LOGIT_ROWS: usize = 128;
/// A common beginning shorter than this is computed anew for each sequence: a pass of its own would cost more.
const MIN_SHARED: usize = 16;
/// A beginning shared with the round before is kept if it is at least this long.
const MIN_KEPT: usize = 4 * PAGE;

/// Tokens of which those from `first` on are to be scored, each given all before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    /// At least 1: nothing stands before the first token.
    pub first: usize,
}

impl Sequence {
    /// What the model reads: the last token is only predicted.
    fn input(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }
}

/// Scores sequences with one model.
pub struct Scorer<'m, B: Backend> {
    model: &'m Decoder<B>,
    cache: B::Cache,
    pages: PagePool,
    /// The beginning kept from the round before: tokens and pages, whole ones.
    kept: Vec<u32>,
    kept_pages: Vec<u32>,
}

/// Tokens `range` of the sequences `members` (of the sorted order), which agree up to the range's end.
struct Segment {
    parent: Option<usize>,
    range: Range<usize>,
    members: Range<usize>,
    depth: usize,
    pages: Vec<u32>,
}

impl<'m, B: Backend> Scorer<'m, B> {
    /// A scorer for sequences of at most `longest` tokens.
    ///
    /// # Errors
    /// When the backend cannot make the cache.
    pub fn new(model: &'m Decoder<B>, longest: usize, kv: KvFormat) -> Result<Self> {
        // A round, its longest sequence, what is kept, and a partly filled page at both ends of every segment: a tree
        // has fewer inner segments than leaves.
        let tokens = ROUND_TOKENS + 2 * longest + 4 * ROUND_SEQUENCES * PAGE;
        let pages = tokens.div_ceil(PAGE);
        let cache = model.new_cache(pages * PAGE, kv)?;
        Ok(Self { model, cache, pages: PagePool::new(pages), kept: Vec::new(), kept_pages: Vec::new() })
    }

    /// Scores each sequence's tokens from its `first` on and hands them to `done` with the sequence's index, in no
    /// particular order; stops early when `done` breaks.
    ///
    /// # Errors
    /// A token outside the vocabulary, or the backend's own failure.
    pub fn score(
        &mut self,
        sequences: &[Sequence],
        done: &mut dyn FnMut(usize, Vec<TokenScore>) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut order: Vec<usize> = (0..sequences.len()).filter(|&i| sequences[i].tokens.len() > 1).collect();
        order.sort_by(|&a, &b| sequences[a].input().cmp(sequences[b].input()).then(a.cmp(&b)));
        let sorted: Vec<&Sequence> = order.iter().map(|&i| &sequences[i]).collect();
        let mut start = 0;
        while start < sorted.len() {
            let end = start + self.round_length(&sorted[start..]);
            for (i, scores) in self.round(&sorted[start..end])?.into_iter().enumerate() {
                if done(order[start + i], scores).is_break() {
                    return Ok(());
                }
            }
            start = end;
        }
        Ok(())
    }

    /// How many of the sorted sequences make the next round.
    fn round_length(&self, sorted: &[&Sequence]) -> usize {
        let kept = common(&self.kept, sorted[0].input());
        let kept = if kept >= MIN_KEPT { kept } else { 0 };
        let mut tokens = sorted[0].input().len() - kept;
        let mut count = 1;
        for pair in sorted.windows(2).take(ROUND_SEQUENCES - 1) {
            let shared = common(pair[0].input(), pair[1].input());
            let new = pair[1].input().len() - shared;
            if tokens + new > ROUND_TOKENS || shared < kept {
                break;
            }
            tokens += new;
            count += 1;
        }
        count
    }

    fn round(&mut self, sorted: &[&Sequence]) -> Result<Vec<Vec<TokenScore>>> {
        let mut segments = Vec::new();
        let root = self.reuse_kept(sorted);
        let start = root.as_ref().map_or(0, |r| r.range.end);
        let parent = root.is_some().then_some(0);
        segments.extend(root);
        grow(sorted, 0..sorted.len(), start, parent, &mut segments);
        let mut scores: Vec<Vec<TokenScore>> = sorted.iter().map(|s| Vec::with_capacity(s.tokens.len())).collect();
        let deepest = segments.iter().map(|s| s.depth).max().unwrap_or(0);
        for depth in 1..=deepest {
            let level: Vec<usize> = (0..segments.len()).filter(|&i| segments[i].depth == depth).collect();
            self.level(sorted, &mut segments, &level, &mut scores)?;
        }
        self.keep_last(sorted, &segments);
        segments.iter().for_each(|s| self.pages.release(&s.pages));
        Ok(scores)
    }

    /// The root segment that the cache holds already, at depth 0.
    fn reuse_kept(&mut self, sorted: &[&Sequence]) -> Option<Segment> {
        // Sorted: what the first and the last share, all share.
        let first = common(&self.kept, sorted[0].input());
        let last = common(&self.kept, sorted[sorted.len() - 1].input());
        // The row before the first scored token has to be computed.
        let earliest = sorted.iter().map(|s| s.first - 1).min().unwrap_or(0);
        let whole = first.min(last).min(earliest) / PAGE;
        if whole * PAGE < MIN_KEPT {
            return None;
        }
        let pages = self.kept_pages[..whole].to_vec();
        self.pages.retain(&pages);
        Some(Segment { parent: None, range: 0..whole * PAGE, members: 0..sorted.len(), depth: 0, pages })
    }

    /// Keeps the whole pages of the last sequence's beginning for the next round.
    fn keep_last(&mut self, sorted: &[&Sequence], segments: &[Segment]) {
        let old = std::mem::take(&mut self.kept_pages);
        // The path of the last sequence ends in its longest segment.
        let last = segments.iter().filter(|s| s.members.end == sorted.len()).max_by_key(|s| s.range.end);
        if let Some(last) = last {
            let whole = last.range.end / PAGE;
            self.kept_pages = last.pages[..whole].to_vec();
            self.kept = sorted[sorted.len() - 1].input()[..whole * PAGE].to_vec();
            self.pages.retain(&self.kept_pages);
        }
        self.pages.release(&old);
    }

    /// Runs the segments of one depth in passes and collects the scores of their tokens.
    fn level(
        &mut self,
        sorted: &[&Sequence],
        segments: &mut [Segment],
        level: &[usize],
        scores: &mut [Vec<TokenScore>],
    ) -> Result<()> {
        let mut pass: Vec<(usize, Range<usize>)> = Vec::new();
        let mut tokens = 0;
        for &index in level {
            self.open(segments, index)?;
            let range = segments[index].range.clone();
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min(at + PASS_TOKENS - tokens);
                pass.push((index, at..end));
                tokens += end - at;
                at = end;
                if tokens == PASS_TOKENS {
                    self.pass(sorted, segments, &pass, scores)?;
                    pass.clear();
                    tokens = 0;
                }
            }
        }
        if !pass.is_empty() {
            self.pass(sorted, segments, &pass, scores)?;
        }
        Ok(())
    }

    /// Gives a segment its pages, the beginning shared with its parent.
    fn open(&mut self, segments: &mut [Segment], index: usize) -> Result<()> {
        let (start, end) = (segments[index].range.start, segments[index].range.end);
        let Some(parent) = segments[index].parent.map(|p| &segments[p]) else {
            segments[index].pages = self.pages.allocate(end.div_ceil(PAGE))?;
            return Ok(());
        };
        let pages = self.pages.branch(&parent.pages, start, end)?;
        let from = Span { start: parent.range.end, len: 0, pages: parent.pages.clone() };
        let to = Span { start, len: 0, pages };
        self.model.backend().fork(&mut self.cache, &from, &to)?;
        segments[index].pages = to.pages;
        Ok(())
    }

    /// One forward pass over parts of segments.
    fn pass(
        &mut self,
        sorted: &[&Sequence],
        segments: &[Segment],
        parts: &[(usize, Range<usize>)],
        scores: &mut [Vec<TokenScore>],
    ) -> Result<()> {
        let mut batch = Batch::default();
        // Rows that predict something, and who wants which token's score there.
        let mut rows = Vec::new();
        let mut picks: Vec<(usize, u32, usize)> = Vec::new();
        for (index, range) in parts {
            let segment = &segments[*index];
            let tokens = &sorted[segment.members.start].tokens;
            for position in range.clone() {
                let wanted = segment.members.clone().filter(|&m| sorted[m].first <= position + 1);
                let before = picks.len();
                picks.extend(wanted.map(|m| (rows.len(), sorted[m].tokens[position + 1], m)));
                if picks.len() > before {
                    rows.push(batch.tokens.len() + position - range.start);
                }
            }
            batch.spans.push(Span {
                start: range.start,
                len: range.len(),
                pages: segment.pages[..range.end.div_ceil(PAGE)].to_vec(),
            });
            batch.tokens.extend_from_slice(&tokens[range.clone()]);
        }
        let backend = self.model.backend();
        let hidden = self.model.hidden(&batch, &mut self.cache)?;
        let mut picks = picks.into_iter().peekable();
        for (part, rows) in rows.chunks(LOGIT_ROWS).enumerate() {
            let base = part * LOGIT_ROWS;
            let mut here = Vec::new();
            let mut whose = Vec::new();
            while let Some((row, token, member)) = picks.next_if(|p| p.0 < base + rows.len()) {
                here.push((row - base, token));
                whose.push(member);
            }
            let logits = self.model.logits(&backend.select_rows(&hidden, rows)?)?;
            for (score, member) in backend.score(&logits, &here)?.into_iter().zip(whose) {
                scores[member].push(score);
            }
        }
        Ok(())
    }
}

/// Adds the segments of `members`, which agree on `start` tokens that segment `parent` ends with.
fn grow(sorted: &[&Sequence], members: Range<usize>, start: usize, parent: Option<usize>, out: &mut Vec<Segment>) {
    let input = |m: usize| sorted[m].input();
    let shared = common(input(members.start), input(members.end - 1));
    let (mut start, mut parent) = (start, parent);
    if shared > start && (members.len() == 1 || shared - start >= MIN_SHARED) {
        let depth = parent.map_or(0, |p| out[p].depth) + 1;
        out.push(Segment { parent, range: start..shared, members: members.clone(), depth, pages: Vec::new() });
        (start, parent) = (shared, Some(out.len() - 1));
    }
    // What ends here is done if a segment brought it here; the others part by their next token.
    let mut at = members.start;
    while at < members.end {
        let next = input(at).get(shared);
        let same = (at..members.end).take_while(|&m| input(m).get(shared) == next).count();
        if next.is_some() || (start < shared && members.len() > 1) {
            match next {
                Some(_) => grow(sorted, at..at + same, start, parent, out),
                // Equal sequences too short to share: one segment for all of them.
                None => {
                    let depth = parent.map_or(0, |p| out[p].depth) + 1;
                    let members = at..at + same;
                    out.push(Segment { parent, range: start..shared, members, depth, pages: Vec::new() });
                }
            }
        }
        at += same;
    }
}

/// Length of the common beginning.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(inputs: &[&[u32]]) -> Vec<(Range<usize>, Range<usize>, Option<usize>)> {
        let sequences: Vec<Sequence> =
            inputs.iter().map(|i| Sequence { tokens: [i, &[0][..]].concat(), first: 1 }).collect();
        let mut out = Vec::new();
        grow(&sequences.iter().collect::<Vec<_>>(), 0..inputs.len(), 0, None, &mut out);
        out.into_iter().map(|s| (s.members, s.range, s.parent)).collect()
    }

    #[test]
    fn a_long_common_beginning_is_one_segment_and_a_short_one_none() {
        let context: Vec<u32> = (0..20).collect();
        let with = |tail: &[u32]| [&context, tail].concat();
        let (a, b) = (with(&[1, 2]), with(&[3]));
        assert_eq!(
            segments(&[&context, &a, &b]),
            [(0..3, 0..20, None), (1..2, 20..22, Some(0)), (2..3, 20..21, Some(0))]
        );
        assert_eq!(segments(&[&[1, 2], &[1, 3], &[4]]), [(0..1, 0..2, None), (1..2, 0..2, None), (2..3, 0..1, None)]);
    }

    #[test]
    fn equal_and_nested_short_sequences_each_have_a_segment() {
        assert_eq!(segments(&[&[1], &[1], &[1, 2]]), [(0..2, 0..1, None), (2..3, 0..2, None)]);
        assert_eq!(segments(&[&[7], &[7]]), [(0..2, 0..1, None)]);
    }
}
