//! What a sequence gets from the engine is what it gets alone, bit for bit: whatever arrives, ends or gives way beside it.

use std::collections::BTreeMap;

use crate::support::fixtures::{Session, bits, cpu};
use crate::support::project;
use crate::support::random::Random;
use recoup::backend::cpu::CpuBackend;
use recoup::backend::{Backend as _, PAGE};
use recoup::checkpoint::Checkpoint;
use recoup::engine::{Engine, EngineError, Event, Finish, Generated, Id, Limits, Request, Sequence, score_all};
use recoup::formats::kv::KvFormat;
use recoup::logits::{History, Sampler, SamplingParams, Scratch, TokenScore};
use recoup::model::Decoder;
use recoup::text::Tokenizer;

const CONTEXT: usize = 6 * PAGE;

struct Model {
    decoder: Decoder<CpuBackend>,
    tokenizer: Tokenizer,
}

fn model() -> Model {
    let folder = project().join("models/books-nvfp4");
    let decoder = Decoder::load(cpu(2), &Checkpoint::open(&folder).unwrap()).unwrap();
    Model { decoder, tokenizer: Tokenizer::from_folder(&folder).unwrap() }
}

/// A hybrid of random weights: Mamba-2 and mixtures, or delta nets, beside attention. Its tokens are the first of the
/// tokenizer's.
fn hybrid(name: &str) -> Model {
    let folder = project().join("tests/fixtures-models/modelopt").join(name);
    let decoder = Decoder::load(cpu(2), &Checkpoint::open(&folder).unwrap()).unwrap();
    assert!(decoder.state_bytes() > 0);
    Model { decoder, tokenizer: model().tokenizer }
}

/// What is asked of a sequence.
#[derive(Clone, Debug)]
enum Job {
    Answer { prompt: Vec<u32>, max_tokens: usize, sampling: SamplingParams },
    Scores { tokens: Vec<u32>, picks: Vec<(usize, u32)> },
    Logits { tokens: Vec<u32>, from: usize },
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Found {
    tokens: Vec<u32>,
    log_probs: Vec<u32>,
    text: String,
    scores: Vec<(u64, bool)>,
    logits: Vec<u32>,
}

fn exact(scores: &[TokenScore]) -> Vec<(u64, bool)> {
    scores.iter().map(|s| (s.log_prob.to_bits(), s.is_greedy)).collect()
}

impl Model {
    fn request(prompt: &[u32], max_tokens: usize, sampling: &SamplingParams) -> Request {
        Request { prompt: prompt.into(), max_tokens, sampling: sampling.clone(), ..Request::default() }
    }

    /// A job by itself, computed without the engine.
    fn alone(&self, job: &Job) -> Found {
        let mut found = Found::default();
        let whole = |tokens: &[u32]| Session::new(&self.decoder, 1, tokens.len()).forward(&[(0, 0, tokens)]).remove(0);
        let vocab = self.decoder.config.vocab;
        match job {
            Job::Answer { prompt, max_tokens, sampling } => {
                let sampler = Sampler::new(sampling.clone()).unwrap();
                let mut session = Session::new(&self.decoder, 1, CONTEXT);
                let (mut done, mut tokens) = (0, prompt.clone());
                while tokens.len() < prompt.len() + max_tokens && tokens.len() <= CONTEXT {
                    let logits = session.forward(&[(0, done, &tokens[done..])]).remove(0);
                    done = tokens.len();
                    let history = History { prompt, generated: &tokens[prompt.len()..] };
                    let logits = &logits[logits.len() - vocab..];
                    let sampled = sampler.sample(logits, history, &mut Scratch::default()).unwrap();
                    tokens.push(sampled.token);
                    found.log_probs.push(sampled.logprob.unwrap().to_bits());
                }
                found.tokens = tokens[prompt.len()..].to_vec();
                found.text = self.tokenizer.decode(&found.tokens, true).unwrap();
            }
            Job::Scores { tokens, picks } => {
                let logits = self.decoder.backend().tensor(whole(tokens), vocab).unwrap();
                found.scores = exact(&self.decoder.backend().score(&logits, picks).unwrap());
            }
            Job::Logits { tokens, from } => found.logits = bits(&whole(tokens)[from * vocab..]),
        }
        found
    }

    fn add(&self, engine: &mut Engine<'_, CpuBackend>, job: &Job) -> Id {
        match job {
            Job::Answer { prompt, max_tokens, sampling } => {
                engine.generate(&self.tokenizer, Self::request(prompt, *max_tokens, sampling)).unwrap()
            }
            Job::Scores { tokens, picks } => engine.score(tokens.clone(), picks.clone()).unwrap(),
            // Either way the head makes the same of it.
            Job::Logits { tokens, from } if tokens.len() % 2 == 0 => engine.states(tokens.clone(), *from).unwrap(),
            Job::Logits { tokens, from } => engine.logits(tokens.clone(), *from).unwrap(),
        }
    }
}

/// Tokens that begin like others'.
fn some_tokens(random: &mut Random, longest: usize, vocab: usize) -> Vec<u32> {
    let shared = [0, 3, 16, 29, 40][random.below(5)].min(longest - 1);
    let own = 1 + random.below((longest - shared).min(30));
    let mut tokens: Vec<u32> = (0..shared).map(|i| ((i * 7919 + 300) % vocab) as u32).collect();
    tokens.extend((0..own).map(|_| random.below(vocab) as u32));
    tokens
}

fn some_job(random: &mut Random, vocab: usize) -> Job {
    match random.below(4) {
        0 | 1 => {
            let prompt = some_tokens(random, CONTEXT - 4, vocab);
            let sampling = SamplingParams {
                temperature: [0.0, 1.0][random.below(2)],
                repetition_penalty: [1.0, 1.2][random.below(2)],
                seed: Some(random.below(1000) as u64),
                logprobs: Some(0),
                ..SamplingParams::default()
            };
            Job::Answer { prompt, max_tokens: 1 + random.below(25), sampling }
        }
        2 => {
            let tokens = some_tokens(random, CONTEXT, vocab);
            let mut picks: Vec<(usize, u32)> =
                (0..1 + random.below(6)).map(|_| (random.below(tokens.len()), random.below(vocab) as u32)).collect();
            picks.sort_unstable();
            Job::Scores { tokens, picks }
        }
        _ => {
            let tokens = some_tokens(random, CONTEXT, vocab);
            let from = random.below(tokens.len());
            Job::Logits { tokens, from }
        }
    }
}

#[test]
fn what_a_sequence_gets_is_what_it_gets_alone_whatever_runs_beside_it() {
    // Plenty of room; pages for one sequence and a half; one sequence at a time; passes of a few tokens.
    let cases = [(1, 200, 8, 512), (2, 9, 6, 64), (3, 6, 1, 5), (4, 12, 5, 23)];
    let models = [model(), hybrid("nemotron_h/bf16"), hybrid("qwen3_5/bf16")];
    for (model, (seed, pages, sequences, pass)) in models.iter().flat_map(|m| cases.map(|case| (m, case))) {
        let vocab = model.decoder.config.vocab;
        let states = Some([9, 1, 0, 4][seed as usize - 1]);
        let limits = Limits { context: CONTEXT, pages, kept: seed as usize * 3, sequences, pass, states };
        let mut engine = Engine::new(&model.decoder, limits, KvFormat::F32).unwrap();
        let mut random = Random(seed);
        let mut jobs: BTreeMap<Id, (Job, Found)> = BTreeMap::new();
        let (mut added, mut ended, mut cancelled) = (0, 0, 0);
        while added < 40 || !engine.is_empty() {
            for _ in 0..if added < 40 { random.below(3) } else { 0 } {
                let job = some_job(&mut random, vocab);
                jobs.insert(model.add(&mut engine, &job), (job, Found::default()));
                added += 1;
            }
            if random.below(25) == 0
                && let Some(&id) = jobs.keys().nth(random.below(jobs.len().max(1)))
            {
                engine.cancel(id);
                jobs.remove(&id);
                cancelled += 1;
            }
            for event in engine.step().unwrap() {
                let event = match event {
                    Event::States { id, from, rows, states } => {
                        Event::Logits { id, from, rows, logits: model.decoder.head_logits(&states).unwrap() }
                    }
                    other => other,
                };
                let id = match event {
                    Event::States { .. } => unreachable!(),
                    Event::Token { id, token, text } => {
                        let found = &mut jobs.get_mut(&id).unwrap().1;
                        found.tokens.push(token.token);
                        found.log_probs.push(token.logprob.unwrap().to_bits());
                        found.text += &text;
                        continue;
                    }
                    Event::Answered { id, answer, rest } => {
                        let found = &mut jobs.get_mut(&id).unwrap().1;
                        found.text += &rest;
                        assert_eq!(found.text, answer.text);
                        assert_eq!(found.tokens, answer.tokens.iter().map(|t| t.token).collect::<Vec<_>>());
                        id
                    }
                    Event::Scored { id, scores } => {
                        jobs.get_mut(&id).unwrap().1.scores = exact(&scores);
                        id
                    }
                    Event::Logits { id, from, rows, logits } => {
                        let (job, found) = jobs.get_mut(&id).unwrap();
                        let Job::Logits { tokens, from: first } = job else { panic!("{job:?}") };
                        assert_eq!(found.logits.len(), (from - *first) * vocab, "no row twice, none left out");
                        found.logits.extend(bits(&model.decoder.backend().to_host(&logits).unwrap()));
                        if from + rows < tokens.len() {
                            continue;
                        }
                        id
                    }
                };
                let (job, found) = jobs.remove(&id).unwrap();
                assert!(found == model.alone(&job), "{limits:?}: {job:?}");
                ended += 1;
            }
        }
        assert!(jobs.is_empty() && engine.room() <= pages * PAGE);
        assert!(ended > 20 && ended + cancelled == added, "{ended} {cancelled} {added}");
    }
}

fn answer(engine: &mut Engine<'_, CpuBackend>, model: &Model, request: Request) -> Generated {
    engine.generate(&model.tokenizer, request).unwrap();
    loop {
        for event in engine.step().unwrap() {
            if let Event::Answered { answer, .. } = event {
                return answer;
            }
        }
    }
}

#[test]
fn the_cache_grows_with_what_is_in_it() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(8192, 1), KvFormat::F32).unwrap();
    assert_eq!(engine.room(), 0);
    let prompt = model.tokenizer.encode("It was a dark and stormy night", true).unwrap();
    let first = answer(&mut engine, &model, Model::request(&prompt, 8, &SamplingParams::greedy()));
    assert_eq!(engine.room(), 16 * PAGE);
    let long: Vec<u32> = prompt.iter().copied().cycle().take(600).collect();
    answer(&mut engine, &model, Model::request(&long, 8, &SamplingParams::greedy()));
    assert!((600..900).contains(&engine.room()), "{}", engine.room());
    // What was there before it grew still is, and is right.
    let again = answer(&mut engine, &model, Model::request(&prompt, 8, &SamplingParams::greedy()));
    assert_eq!(first.tokens, again.tokens);
}

#[test]
fn a_request_that_cannot_be_is_refused_and_harms_nobody() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(20, 4), KvFormat::F32).unwrap();
    let greedy = SamplingParams::greedy();
    let kept = engine.generate(&model.tokenizer, Model::request(&[5, 6], 40, &greedy)).unwrap();
    let mut refused = |request| engine.generate(&model.tokenizer, request).unwrap_err();
    assert!(matches!(refused(Model::request(&[], 3, &greedy)), EngineError::EmptyPrompt));
    assert!(matches!(
        refused(Model::request(&[7; 21], 3, &greedy)),
        EngineError::PromptTooLong { prompt: 21, capacity: 20 }
    ));
    let error = refused(Model::request(&[1, 1_000_000], 3, &greedy)).to_string();
    assert!(error.contains("1000000"), "{error}");
    assert!(engine.score(vec![1, 2], vec![]).is_err());
    assert!(engine.score(vec![1, 2], vec![(1, 3), (0, 3)]).is_err());
    assert!(engine.score(vec![1, 2], vec![(2, 3)]).is_err());
    assert!(engine.logits(vec![1, 2], 2).is_err());
    assert!(engine.logits(vec![1; 21], 0).is_err());
    let nothing = engine.generate(&model.tokenizer, Model::request(&[5, 6], 0, &greedy)).unwrap();
    assert_eq!(engine.len(), 2);
    let mut answers = BTreeMap::new();
    while !engine.is_empty() {
        for event in engine.step().unwrap() {
            if let Event::Answered { id, answer, .. } = event {
                answers.insert(id, (answer.tokens.len(), answer.finish));
            }
        }
    }
    // Nothing is computed after the last token, so it needs no room.
    assert_eq!(answers[&kept], (19, Finish::Length));
    assert_eq!(answers[&nothing], (0, Finish::Length));
}

#[test]
fn an_answer_can_be_cancelled_and_what_there_is_of_it_is_given_back() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 4), KvFormat::F32).unwrap();
    let request = Model::request(&[300, 301, 302], 40, &SamplingParams::greedy());
    let whole = answer(&mut engine, &model, request.clone());
    let id = engine.generate(&model.tokenizer, request).unwrap();
    for _ in 0..5 {
        engine.step().unwrap();
    }
    let part = engine.cancel(id).unwrap();
    assert_eq!((part.finish, &part.tokens[..]), (Finish::Cancelled, &whole.tokens[..5]));
    assert!(whole.text.starts_with(&part.text));
    assert!(engine.is_empty() && engine.step().unwrap().is_empty() && engine.cancel(id).is_none());
}

#[test]
fn scores_that_share_beginnings_are_those_of_each_sequence_alone() {
    let model = model();
    let vocab = model.decoder.config.vocab;
    let mut random = Random(11);
    let mut sequences: Vec<Sequence> = (0..60)
        .map(|_| {
            let tokens = some_tokens(&mut random, CONTEXT, vocab);
            let first = 1 + random.below(tokens.len());
            Sequence { tokens, first }
        })
        .collect();
    // The same again, the same up to the last token, and a part of it.
    for i in 0..10 {
        let mut same = sequences[i].clone();
        sequences.push(same.clone());
        *same.tokens.last_mut().unwrap() = 17;
        sequences.push(same.clone());
        same.tokens.truncate(same.tokens.len() / 2 + 1);
        same.first = same.first.min(same.tokens.len());
        sequences.push(same);
    }
    let mut engine =
        Engine::new(&model.decoder, Limits { pass: 50, ..Limits::new(CONTEXT, 5) }, KvFormat::F32).unwrap();
    let mut found: Vec<Option<Vec<TokenScore>>> = vec![None; sequences.len()];
    score_all(&mut engine, &sequences, &mut |i, scores| {
        assert!(found[i].replace(scores).is_none());
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    for (s, found) in sequences.iter().zip(found) {
        let picks: Vec<(usize, u32)> = (s.first..s.tokens.len()).map(|i| (i - 1, s.tokens[i])).collect();
        if picks.is_empty() {
            assert_eq!(found, None);
            continue;
        }
        let alone = model.alone(&Job::Scores { tokens: s.tokens[..s.tokens.len() - 1].to_vec(), picks });
        assert_eq!(exact(&found.unwrap()), alone.scores);
    }
}

#[test]
fn an_engine_can_be_handed_to_another_thread() {
    fn is_send<T: Send>(_: &T) {}
    let model = model();
    is_send(&Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap());
}
