//! Many prompts answered side by side: as one answer ends the next prompt takes its place, and prompts that begin alike
//! share that beginning's computation. An answer depends on its own request only.

use std::ops::ControlFlow;

use super::Scratch;
use super::generate::{Answer, GenerateError, Generated, Request};
use super::page_pool::PagePool;
use crate::backend::{Backend, Batch, PAGE, Span};
use crate::formats::kv::KvFormat;
use crate::model::{Decoder, Wanted};
use crate::text::Tokenizer;

/// Tokens of a prompt that run at once.
const PREFILL_CHUNK: usize = 512;

struct Running<'a> {
    index: usize,
    answer: Answer<'a>,
    pages: Vec<u32>,
    /// Tokens in the cache.
    length: usize,
    /// Chosen and not yet in the cache.
    next: u32,
}

struct Many<'m, B: Backend> {
    model: &'m Decoder<B>,
    cache: B::Cache,
    pool: PagePool,
    /// The prompt before, whose beginning the next one may share.
    last: Option<(Vec<u32>, Vec<u32>)>,
    scratch: Scratch,
}

/// Answers `requests`, at most `width` at a time in a context of `capacity` tokens each, and hands each answer to `done`
/// with its index as it ends; stops early when `done` breaks.
///
/// # Errors
/// As [`super::generate()`]; the error of a single request ends all, those answered before have been handed over.
#[allow(clippy::too_many_arguments)]
pub fn generate_many<B: Backend>(
    model: &Decoder<B>,
    tokenizer: &Tokenizer,
    requests: &[Request<'_>],
    width: usize,
    capacity: usize,
    kv: KvFormat,
    done: &mut dyn FnMut(usize, Generated) -> ControlFlow<()>,
) -> Result<(), GenerateError> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by(|&a, &b| requests[a].prompt.cmp(requests[b].prompt).then(a.cmp(&b)));
    let longest = requests.iter().map(|r| capacity.min(r.prompt.len() + r.max_tokens)).max().unwrap_or(0);
    // One more than run: the prompt before keeps its pages.
    let pages = (width + 1) * (longest.div_ceil(PAGE) + 1);
    let cache = model.new_cache(pages * PAGE, kv)?;
    let mut many = Many { model, cache, pool: PagePool::new(pages), last: None, scratch: Scratch::default() };
    let mut running: Vec<Running> = Vec::new();
    let mut waiting = order.into_iter();
    loop {
        while running.len() < width {
            let Some(index) = waiting.next() else { break };
            let answer = Answer::new(tokenizer, requests[index], capacity)?;
            match many.admit(index, requests[index].prompt, answer)? {
                Ok(r) => running.push(r),
                Err(answer) => {
                    if done(index, answer.finish(&mut |_| ControlFlow::Continue(()))?).is_break() {
                        return Ok(());
                    }
                }
            }
        }
        if running.is_empty() {
            return Ok(());
        }
        for r in many.step(&mut running)? {
            if done(r.index, r.answer.finish(&mut |_| ControlFlow::Continue(()))?).is_break() {
                return Ok(());
            }
        }
    }
}

impl<B: Backend> Many<'_, B> {
    /// Computes a prompt and its first token; gives the answer back if that was all of it.
    fn admit<'a>(
        &mut self,
        index: usize,
        prompt: &[u32],
        mut answer: Answer<'a>,
    ) -> Result<Result<Running<'a>, Answer<'a>>, GenerateError> {
        let Some(before_last) = prompt.len().checked_sub(1) else { return Err(GenerateError::EmptyPrompt) };
        let room = prompt.len() + answer.limit();
        let (mut start, pages) = match self.last.take() {
            None => (0, self.pool.allocate(room.div_ceil(PAGE))?),
            Some((tokens, old)) => {
                let shared = tokens.iter().zip(&prompt[..before_last]).take_while(|(a, b)| a == b).count();
                let pages = self.pool.branch(&old, shared, room)?;
                let from = Span { start: tokens.len(), len: 0, pages: old.clone() };
                let to = Span { start: shared, len: 0, pages };
                if shared > 0 {
                    self.model.backend().fork(&mut self.cache, &from, &to)?;
                }
                self.pool.release(&old);
                (shared, to.pages)
            }
        };
        let mut logits = Vec::new();
        while start < prompt.len() {
            let len = PREFILL_CHUNK.min(prompt.len() - start);
            let span = Span { start, len, pages: pages[..(start + len).div_ceil(PAGE)].to_vec() };
            let batch = Batch { tokens: prompt[start..start + len].to_vec(), spans: vec![span] };
            let out = self.model.forward(&batch, &mut self.cache, Wanted::Last)?;
            logits = self.model.backend().to_host(&out)?;
            start += len;
        }
        let kept = pages[..prompt.len().div_ceil(PAGE)].to_vec();
        self.pool.retain(&kept);
        self.last = Some((prompt.to_vec(), kept));
        match answer.advance(&logits, &mut self.scratch, &mut |_| ControlFlow::Continue(()))? {
            Some(next) => Ok(Ok(Running { index, answer, pages, length: prompt.len(), next })),
            None => {
                self.pool.release(&pages);
                Ok(Err(answer))
            }
        }
    }

    /// One token for each running answer; takes out and returns those that ended.
    fn step<'a>(&mut self, running: &mut Vec<Running<'a>>) -> Result<Vec<Running<'a>>, GenerateError> {
        let mut batch = Batch::default();
        for r in running.iter() {
            batch.tokens.push(r.next);
            let pages = r.pages[..(r.length + 1).div_ceil(PAGE)].to_vec();
            batch.spans.push(Span { start: r.length, len: 1, pages });
        }
        let out = self.model.forward(&batch, &mut self.cache, Wanted::Last)?;
        let logits = self.model.backend().to_host(&out)?;
        let vocab = self.model.config.vocab;
        let mut ended = Vec::new();
        let mut going = Vec::new();
        for (mut r, logits) in running.drain(..).zip(logits.chunks_exact(vocab)) {
            r.length += 1;
            match r.answer.advance(logits, &mut self.scratch, &mut |_| ControlFlow::Continue(()))? {
                Some(next) => going.push(Running { next, ..r }),
                None => {
                    self.pool.release(&r.pages);
                    ended.push(r);
                }
            }
        }
        *running = going;
        Ok(ended)
    }
}
