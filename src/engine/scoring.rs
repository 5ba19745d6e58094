//! Log-probabilities of many token sequences: those that begin alike stand together, so that the cache has their
//! beginning, and what is to be known within it is asked of one of them only.

use std::collections::HashMap;
use std::ops::ControlFlow;

use super::pages::common;
use super::{Engine, EngineError, Event, Id};
use crate::backend::Backend;
use crate::logits::TokenScore;

/// Sequences that are given to the engine ahead of their turn, at most.
const AHEAD: usize = 256;

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

/// Position, token, and the sequence that it is a token of.
type Pick = (usize, u32, usize);

/// What is asked of the model in one sequence.
#[derive(Debug, Default, PartialEq, Eq)]
struct Question {
    /// The sequence whose input is read.
    sequence: usize,
    /// By position.
    picks: Vec<Pick>,
}

/// Scores each sequence's tokens from its `first` on and hands them to `done` with the sequence's index, in no particular
/// order; stops early when `done` breaks.
///
/// # Errors
/// As [`Engine::score`] and [`Engine::step`].
pub fn score_all<B: Backend>(
    engine: &mut Engine<'_, B>,
    sequences: &[Sequence],
    done: &mut dyn FnMut(usize, Vec<TokenScore>) -> ControlFlow<()>,
) -> Result<(), EngineError> {
    let mut scores: Vec<Vec<Option<TokenScore>>> =
        sequences.iter().map(|s| vec![None; s.tokens.len().saturating_sub(s.first)]).collect();
    let mut open: Vec<usize> = scores.iter().map(Vec::len).collect();
    let mut waiting = questions(sequences).into_iter();
    let mut asked: HashMap<Id, Question> = HashMap::new();
    loop {
        while asked.len() < AHEAD
            && let Some(question) = waiting.next()
        {
            let picks = question.picks.iter().map(|p| (p.0, p.1)).collect();
            let id = engine.score(sequences[question.sequence].input().to_vec(), picks)?;
            asked.insert(id, question);
        }
        if asked.is_empty() {
            return Ok(());
        }
        for event in engine.step()? {
            let Event::Scored { id, scores: found } = event else { continue };
            let Some(question) = asked.remove(&id) else { continue };
            for ((position, _, whose), score) in question.picks.into_iter().zip(found) {
                scores[whose][position + 1 - sequences[whose].first] = Some(score);
                open[whose] -= 1;
                if open[whose] == 0 && done(whose, scores[whose].drain(..).flatten().collect()).is_break() {
                    asked.into_keys().for_each(|id| drop(engine.cancel(id)));
                    return Ok(());
                }
            }
        }
    }
}

/// Questions in the order of inputs. What is to be known at a place that several sequences share is asked of the first of
/// them; who has nothing else to ask needs no question.
fn questions(sequences: &[Sequence]) -> Vec<Question> {
    let mut order: Vec<usize> = (0..sequences.len()).filter(|&i| sequences[i].tokens.len() > 1).collect();
    order.sort_by(|&a, &b| sequences[a].input().cmp(sequences[b].input()).then(a.cmp(&b)));
    let mut questions: Vec<Question> = Vec::with_capacity(order.len());
    // Who reads the places of the current sequence: from which position on, and which question.
    let mut readers: Vec<(usize, usize)> = Vec::new();
    let mut before: &[u32] = &[];
    for sequence in order {
        let input = sequences[sequence].input();
        let shared = common(before, input);
        while readers.pop_if(|r| r.0 >= shared).is_some() {}
        readers.push((shared, questions.len()));
        questions.push(Question { sequence, picks: Vec::new() });
        before = input;
        let first = sequences[sequence].first;
        for (position, &token) in (first - 1..).zip(&sequences[sequence].tokens[first..]) {
            let reader = readers.partition_point(|r| r.0 <= position) - 1;
            questions[readers[reader].1].picks.push((position, token, sequence));
        }
    }
    questions.retain(|q| !q.picks.is_empty());
    questions.iter_mut().for_each(|q| q.picks.sort_by_key(|p| p.0));
    questions
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(sequences: &[(&[u32], usize)]) -> Vec<(usize, Vec<Pick>)> {
        let sequences: Vec<Sequence> =
            sequences.iter().map(|&(t, first)| Sequence { tokens: t.into(), first }).collect();
        questions(&sequences).into_iter().map(|q| (q.sequence, q.picks)).collect()
    }

    #[test]
    fn choices_of_one_token_are_asked_in_one_sequence() {
        assert_eq!(
            asked(&[(&[1, 2, 3, 7], 3), (&[1, 2, 3, 5], 3), (&[1, 2, 3, 6], 3)]),
            [(0, vec![(2, 7, 0), (2, 5, 1), (2, 6, 2)])]
        );
    }

    #[test]
    fn the_first_token_of_each_ending_is_asked_after_the_context_once() {
        assert_eq!(
            asked(&[(&[1, 2, 8, 9], 2), (&[1, 2, 5], 2), (&[1, 2, 6, 6, 4], 2)]),
            // Inputs in order: 1 2, 1 2 6 6, 1 2 8.
            [(1, vec![(1, 5, 1), (1, 6, 2), (1, 8, 0)]), (2, vec![(2, 6, 2), (3, 4, 2)]), (0, vec![(2, 9, 0)])]
        );
    }

    #[test]
    fn nothing_is_asked_of_a_reader_that_has_parted() {
        // 1 2 3 | 1 2 4 5 | 1 6: the third shares only the first place, which the first reads.
        assert_eq!(
            asked(&[(&[1, 2, 3, 9], 1), (&[1, 2, 4, 5, 9], 1), (&[1, 6, 9], 1), (&[1, 6, 9], 1)]),
            [
                (0, vec![(0, 2, 0), (0, 2, 1), (0, 6, 2), (0, 6, 3), (1, 3, 0), (1, 4, 1), (2, 9, 0)]),
                (1, vec![(2, 5, 1), (3, 9, 1)]),
                (2, vec![(1, 9, 2), (1, 9, 3)])
            ]
        );
        assert_eq!(asked(&[(&[1], 1), (&[], 1)]), []);
    }
}
