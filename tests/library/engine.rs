//! What a sequence gets from the engine is what it gets alone, bit for bit: whatever arrives, ends or gives way beside it.

use std::collections::BTreeMap;

use crate::support::fixtures::{Session, bits, cpu};
use crate::support::project;
use crate::support::random::Random;
use recoup::backend::cpu::CpuBackend;
use recoup::backend::{Backend as _, PAGE};
use recoup::checkpoint::Checkpoint;
use recoup::engine::{
    Engine, EngineError, Event, Finish, Generated, Id, Limits, PromptScore, Request, Sequence, Speculation, Stats,
    StopReason, answer_all, score_all,
};
use recoup::formats::kv::KvFormat;
use recoup::logits::{
    Constraint, ConstraintError, Draw, History, Sampled, Sampler, SamplingParams, Scratch, TokenScore, TokenSet,
};
use recoup::model::Decoder;
use recoup::text::{Thinking, Tokenizer};

const CONTEXT: usize = 6 * PAGE;

struct Model {
    decoder: Decoder<CpuBackend>,
    tokenizer: Tokenizer,
}

fn model() -> Model {
    shipped("models/books-nvfp4")
}

fn shipped(name: &str) -> Model {
    let folder = project().join(name);
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

/// A grammar that lets a quarter of the tokens follow, others after others; it gives up, or ends, after some.
#[derive(Clone, Debug)]
struct Rule {
    state: u64,
    taken: usize,
    gives_up: Option<usize>,
    ends: Option<usize>,
    set: TokenSet,
}

impl Rule {
    fn new(state: u64, gives_up: Option<usize>, ends: Option<usize>) -> Self {
        Self { state, taken: 0, gives_up, ends, set: TokenSet::default() }
    }
}

impl Constraint for Rule {
    fn allowed(&mut self) -> Result<&TokenSet, ConstraintError> {
        if self.gives_up == Some(self.taken) {
            return Err(ConstraintError("too large".into()));
        }
        let mut random = Random(self.state);
        self.set = TokenSet::from_words((0..4096 / 32).map(|_| (random.next() & random.next()) as u32).collect());
        Ok(&self.set)
    }

    fn take(&mut self, token: u32) -> Result<(), ConstraintError> {
        if !self.set.contains(token) {
            return Err(ConstraintError(format!("{token} is not allowed")));
        }
        self.taken += 1;
        self.state = Random(self.state ^ u64::from(token)).next();
        Ok(())
    }

    fn is_done(&mut self) -> bool {
        self.ends == Some(self.taken)
    }

    fn restart(&mut self) {}
}

/// An answer that is asked for.
#[derive(Clone, Debug, Default)]
struct Ask {
    prompt: Vec<u32>,
    max_tokens: usize,
    sampling: SamplingParams,
    rule: Option<Rule>,
    prompt_logprobs: Option<usize>,
    stop_tokens: Vec<u32>,
    min_tokens: usize,
}

/// What is asked of a sequence.
#[derive(Clone, Debug)]
enum Job {
    Answer(Box<Ask>),
    Scores { tokens: Vec<u32>, picks: Vec<(usize, u32)> },
    Logits { tokens: Vec<u32>, from: usize },
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Found {
    tokens: Vec<Chosen>,
    text: String,
    failed: bool,
    prompt: Vec<Chosen>,
    scores: Vec<(u64, bool)>,
    logits: Vec<u32>,
}

/// A token, the bits of its log-probability, its rank, the most probable ones likewise.
type Chosen = (u32, u32, usize, Vec<(u32, u32)>);

fn chosen(token: u32, logprob: f32, rank: usize, top: &[(u32, f32)]) -> Chosen {
    (token, logprob.to_bits(), rank, top.iter().map(|t| (t.0, t.1.to_bits())).collect())
}

fn sampled(s: &Sampled) -> Chosen {
    chosen(s.token, s.logprob.unwrap(), s.rank.unwrap(), &s.top_logprobs)
}

fn scored(s: &PromptScore) -> Chosen {
    chosen(s.token, s.logprob, s.rank, &s.top_logprobs)
}

fn exact(scores: &[TokenScore]) -> Vec<(u64, bool)> {
    scores.iter().map(|s| (s.log_prob.to_bits(), s.is_greedy)).collect()
}

impl Model {
    fn request(prompt: &[u32], max_tokens: usize, sampling: &SamplingParams) -> Request {
        Request { prompt: prompt.into(), max_tokens, sampling: sampling.clone(), ..Request::default() }
    }

    /// An answer without the engine.
    fn answer_alone(&self, ask: &Ask) -> Found {
        let (backend, vocab) = (self.decoder.backend(), self.decoder.config.vocab);
        let mut found = Found::default();
        let prompt = &ask.prompt;
        if let Some(top) = ask.prompt_logprobs.filter(|_| prompt.len() > 1) {
            let logits = Session::new(&self.decoder, 1, CONTEXT).forward(&[(0, 0, prompt)]).remove(0);
            let rows = (prompt.len() - 1) * vocab;
            let logits = backend.tensor(logits[..rows].to_vec(), vocab).unwrap();
            for (token, s) in prompt[1..].iter().zip(backend.score_ranked(&logits, &prompt[1..], top).unwrap()) {
                let top: Vec<(u32, f32)> = s.top.iter().map(|t| (t.0, t.1 as f32)).collect();
                found.prompt.push(chosen(*token, s.log_prob as f32, s.rank, &top));
            }
        }
        let (sampler, mut rule) = (Sampler::new(ask.sampling.clone()).unwrap(), ask.rule.clone());
        let mut session = Session::new(&self.decoder, 1, CONTEXT);
        let (mut done, mut tokens) = (0, prompt.clone());
        while tokens.len() < prompt.len() + ask.max_tokens && tokens.len() < CONTEXT {
            let logits = session.forward(&[(0, done, &tokens[done..])]).remove(0);
            done = tokens.len();
            let mut allowed = match rule.as_mut().map(|rule| rule.allowed().cloned()) {
                Some(Err(_)) => return Found { failed: true, ..found },
                Some(Ok(set)) => Some(set),
                None => None,
            };
            if done < prompt.len() + ask.min_tokens && !ask.stop_tokens.is_empty() {
                let set = allowed.get_or_insert_with(|| TokenSet::all(vocab));
                ask.stop_tokens.iter().for_each(|&t| set.remove(t));
            }
            let history = History { prompt, generated: &tokens[prompt.len()..] };
            let draw = Draw { sampler: &sampler, history, allowed: allowed.as_ref() };
            let row = backend.tensor(logits[logits.len() - vocab..].to_vec(), vocab).unwrap();
            let Ok(next) = backend.sample_scored(&row, &[draw], &mut Scratch::default()).unwrap().remove(0) else {
                return Found { failed: true, ..found };
            };
            found.tokens.push(sampled(&next));
            if ask.stop_tokens.contains(&next.token) {
                break;
            }
            tokens.push(next.token);
            if let Some(rule) = &mut rule {
                rule.take(next.token).unwrap();
                if rule.is_done() {
                    break;
                }
            }
        }
        found.text = self.tokenizer.decode(&tokens[prompt.len()..], true).unwrap();
        found
    }

    /// A job by itself, computed without the engine.
    fn alone(&self, job: &Job) -> Found {
        let mut found = Found::default();
        let whole = |tokens: &[u32]| Session::new(&self.decoder, 1, tokens.len()).forward(&[(0, 0, tokens)]).remove(0);
        let vocab = self.decoder.config.vocab;
        match job {
            Job::Answer(ask) => found = self.answer_alone(ask),
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
            Job::Answer(ask) => {
                let ask = ask.as_ref().clone();
                let request = Request {
                    prompt: ask.prompt,
                    max_tokens: ask.max_tokens,
                    sampling: ask.sampling,
                    stop_tokens: ask.stop_tokens,
                    min_tokens: ask.min_tokens,
                    prompt_logprobs: ask.prompt_logprobs,
                    constraint: ask.rule.map(|rule| Box::new(rule) as Box<dyn Constraint>),
                    ..Request::default()
                };
                engine.generate(&self.tokenizer, request).unwrap()
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
            let mut prompt = some_tokens(random, CONTEXT - 4, vocab);
            if random.below(3) > 0 {
                // A text that repeats itself.
                let (of, length) = (prompt.len().min(2 + random.below(5)), prompt.len());
                prompt = prompt[..of].iter().copied().cycle().take(length).collect();
            }
            let bias = vec![(5, 4.0), (random.below(100) as u32 + 6, -100.0)];
            let sampling = SamplingParams {
                temperature: [0.0, 0.0, 1.0][random.below(3)],
                repetition_penalty: [1.0, 1.2][random.below(2)],
                frequency_penalty: [0.0, 0.0, 0.5][random.below(3)],
                logit_bias: if random.below(4) == 0 { bias } else { Vec::new() },
                seed: Some(random.below(1000) as u64),
                logprobs: Some(random.below(3)),
                ..SamplingParams::default()
            };
            let some = |random: &mut Random| (random.below(3) == 0).then(|| random.below(9));
            let rule = Rule::new(random.next(), some(random), some(random).map(|n| n + 1));
            let stop_tokens = (0..vocab as u32).filter(|t| t % 19 == 3);
            Job::Answer(Box::new(Ask {
                prompt,
                max_tokens: random.below(26),
                sampling,
                rule: (random.below(4) == 0).then_some(rule),
                prompt_logprobs: [None, None, Some(0), Some(2)][random.below(4)],
                stop_tokens: if random.below(3) == 0 { stop_tokens.collect() } else { Vec::new() },
                min_tokens: [0, 0, 7][random.below(3)],
            }))
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

/// Plenty of room; pages for one sequence and a half; one sequence at a time; passes of a few tokens.
const CASES: [(u64, usize, usize, usize); 4] = [(1, 200, 8, 512), (2, 9, 6, 64), (3, 6, 1, 5), (4, 12, 5, 23)];

/// Sequences that come, go and get in each other's way, each held to what it gets alone.
fn all_get_what_they_get_alone(
    model: &Model,
    (seed, pages, sequences, pass): (u64, usize, usize, usize),
    speculation: Option<Speculation<'_, CpuBackend>>,
) -> Stats {
    // Guesses stand in passes that have no prompts to read, so fewer arrive at once.
    let (count, calm) = if speculation.is_some() { (40, 4) } else { (40, 1) };
    let vocab = model.decoder.config.vocab;
    let states = Some([9, 1, 0, 4][seed as usize - 1]);
    let limits = Limits { context: CONTEXT, pages, kept: seed as usize * 3, sequences, pass, states };
    let mut engine = Engine::new(&model.decoder, limits, KvFormat::F32).unwrap();
    if let Some(speculation) = speculation {
        engine = engine.with_speculation(speculation).unwrap();
    }
    let mut random = Random(seed);
    let mut jobs: BTreeMap<Id, (Job, Found)> = BTreeMap::new();
    let (mut added, mut ended, mut cancelled) = (0, 0, 0);
    while added < count || !engine.is_empty() {
        for _ in 0..if added < count && random.below(calm) == 0 { random.below(3) } else { 0 } {
            let job = some_job(&mut random, vocab);
            jobs.insert(model.add(&mut engine, &job), (job, Found::default()));
            added += 1;
        }
        if random.below(25 * calm) == 0
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
                    found.tokens.push(sampled(&token));
                    found.text += &text;
                    continue;
                }
                Event::Prompt { id, scores } => {
                    let found = &mut jobs.get_mut(&id).unwrap().1;
                    assert!(found.tokens.is_empty() && found.prompt.is_empty(), "once, before the first token");
                    found.prompt = scores.iter().map(scored).collect();
                    continue;
                }
                Event::Answered { id, answer, rest } => {
                    let found = &mut jobs.get_mut(&id).unwrap().1;
                    found.text += &rest;
                    assert_eq!(found.text, answer.text);
                    assert_eq!(found.tokens, answer.tokens.iter().map(sampled).collect::<Vec<_>>());
                    id
                }
                Event::Failed { id, error } => {
                    let found = &mut jobs.get_mut(&id).unwrap().1;
                    assert!(matches!(error, EngineError::Constraint(_) | EngineError::Sampling(_)), "{error}");
                    // Of which some may be held back.
                    (found.failed, found.text) = (true, String::new());
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
            let alone = model.alone(&job);
            assert!(found == alone, "{limits:?}: {job:?}\n{:?}\n{:?}", found.tokens, alone.tokens);
            ended += 1;
        }
    }
    assert!(jobs.is_empty() && engine.room() <= pages * PAGE);
    assert!(ended > 20 && ended + cancelled == added, "{ended} {cancelled} {added}");
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.pages_used, stats.pages), (0, 0, 0, pages));
    assert!(stats.prefix_found <= stats.prefix_asked && stats.pages_kept > 0);
    stats
}

#[test]
fn what_a_sequence_gets_is_what_it_gets_alone_whatever_runs_beside_it() {
    let models = [model(), hybrid("nemotron_h/bf16"), hybrid("qwen3_5/bf16")];
    let run = |case: (u64, usize, usize, usize)| models.iter().map(move |m| all_get_what_they_get_alone(m, case, None));
    let stats: Vec<Stats> = CASES.into_iter().flat_map(run).collect();
    assert!(stats.iter().any(|s| s.preemptions > 0) && stats.iter().all(|s| s.drafted == 0));
    assert!(stats.iter().filter(|s| s.prefix_found > 100).count() > 3, "{stats:?}");
}

#[test]
fn guesses_change_nothing_of_what_a_sequence_gets() {
    let (model, other) = (model(), shipped("models/books-bf16"));
    for speculation in 0..3 {
        let mut all = Stats::default();
        for case in CASES {
            let speculation = match speculation {
                0 => Speculation::PromptLookup { tokens: 1 + case.0 as usize * 2, min: 1, max: 3 },
                1 => Speculation::Draft { model: &other.decoder, tokens: case.0 as usize },
                _ => Speculation::Draft { model: &model.decoder, tokens: 5 },
            };
            let stats = all_get_what_they_get_alone(&model, case, Some(speculation));
            all.drafted += stats.drafted;
            all.accepted += stats.accepted;
        }
        assert!(all.accepted > 10 && all.accepted < all.drafted, "{speculation}: {all:?}");
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
fn guesses_change_nothing_where_pages_are_short() {
    let model = model();
    let prompts: Vec<Vec<u32>> =
        (0..8).map(|i| (0..4).map(|j| 300 + i * 11 + j).cycle().take(10 + 5 * i as usize).collect()).collect();
    let sampling = |i: usize| SamplingParams {
        temperature: [0.0, 0.6][i % 2],
        seed: Some(i as u64),
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    let run = |pages: usize, speculation: Option<Speculation<'_, CpuBackend>>| {
        let limits = Limits { pages, ..Limits::new(CONTEXT, 8) };
        let mut engine = Engine::new(&model.decoder, limits, KvFormat::F32).unwrap();
        if let Some(speculation) = speculation {
            engine = engine.with_speculation(speculation).unwrap();
        }
        let requests = prompts.iter().enumerate().map(|(i, p)| Model::request(p, 48, &sampling(i))).collect();
        let mut found = vec![None; prompts.len()];
        answer_all(&mut engine, &model.tokenizer, requests, 8, &mut |i, answer| {
            found[i] = Some(whole(&answer));
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        (found, engine.stats())
    };
    let (expected, roomy) = run(200, None);
    assert_eq!(roomy.preemptions, 0);
    for speculation in [
        Speculation::PromptLookup { tokens: 4, min: 1, max: 3 },
        Speculation::Draft { model: &model.decoder, tokens: 3 },
    ] {
        let (found, stats) = run(13, Some(speculation));
        assert!(found == expected && stats.preemptions > 3 && stats.accepted > 20, "{stats:?}");
    }
}

/// Everything of an answer but how long it took.
fn whole(g: &Generated) -> (Vec<Sampled>, String, Finish, Option<StopReason>, u64) {
    (g.tokens.clone(), g.text.clone(), g.finish, g.stop.clone(), g.seed)
}

#[test]
fn stop_strings_within_what_was_guessed_end_the_answer_at_once() {
    let model = model();
    let prompt = model.tokenizer.encode("the sea and the sky and the sea and the sky and the", true).unwrap();
    let limits = || Limits::new(CONTEXT, 1);
    let greedy = SamplingParams { seed: Some(1), ..SamplingParams::greedy() };
    let plain = || Engine::new(&model.decoder, limits(), KvFormat::F32).unwrap();
    let all = answer(&mut plain(), &model, Model::request(&prompt, 40, &SamplingParams::greedy()));
    let text: Vec<char> = all.text.chars().collect();
    let mut accepted = 0;
    for from in (1..text.len() - 4).step_by(7) {
        let stop: String = text[from..from + 4].iter().collect();
        let request = || Request {
            stop: vec![stop.clone()],
            keep_stop: from % 2 == 0,
            min_tokens: from % 3 * 4,
            ..Model::request(&prompt, 40, &greedy)
        };
        let expected = answer(&mut plain(), &model, request());
        assert!(expected.stop.is_none() || expected.stop == Some(StopReason::Text(stop.clone())));
        for speculation in [
            Speculation::Draft { model: &model.decoder, tokens: 6 },
            Speculation::PromptLookup { tokens: 6, min: 1, max: 3 },
        ] {
            let mut engine = plain().with_speculation(speculation).unwrap();
            assert_eq!(whole(&answer(&mut engine, &model, request())), whole(&expected));
            accepted += engine.stats().accepted;
        }
    }
    assert!(accepted > 50, "{accepted}");
}

#[test]
fn a_draft_model_guesses_what_it_would_choose_after_whatever_was_chosen() {
    let model = model();
    let prompt = some_tokens(&mut Random(5), 40, 4096).into_iter().cycle().take(40).collect::<Vec<_>>();
    for (temperature, tokens) in [(0.0, 4), (0.7, 1), (0.7, 4), (1.0, 7)] {
        let sampling = SamplingParams { temperature, seed: Some(3), logprobs: Some(1), ..SamplingParams::default() };
        let engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
        let mut engine = engine.with_speculation(Speculation::Draft { model: &model.decoder, tokens }).unwrap();
        let answer = answer(&mut engine, &model, Model::request(&prompt, 50, &sampling));
        assert_eq!(answer.tokens.len(), 50);
        // The model is its own draft: a guess is right where the most probable token was chosen. The prompt's pass is too long
        // for guesses.
        let is_top: Vec<bool> = answer.tokens.iter().map(|t| t.top_logprobs[0].0 == t.token).collect();
        let (mut at, mut drafted, mut accepted, mut trust) = (1, 0, 0, usize::MAX);
        while at < 50 {
            let guesses = tokens.min(50 - at - 1).min(trust);
            let right = is_top[at..at + guesses].iter().take_while(|top| **top).count();
            (drafted, accepted, at) = (drafted + guesses as u64, accepted + right as u64, at + right + 1);
            trust = 2 * right + 1;
        }
        let stats = engine.stats();
        assert_eq!((stats.drafted, stats.accepted), (drafted, accepted), "{temperature} {tokens}");
        assert!(temperature > 0.0 || accepted == drafted);
    }
}

#[test]
fn guesses_that_cannot_be_are_refused() {
    let (model, hybrid) = (model(), hybrid("qwen3_5/bf16"));
    let refused = |of: &Model, speculation| {
        let engine = Engine::new(&of.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
        engine.with_speculation(speculation).map(drop).unwrap_err().to_string()
    };
    let lookup = |tokens, min, max| Speculation::PromptLookup { tokens, min, max };
    let error = refused(&hybrid, lookup(3, 1, 2));
    assert!(error.contains("this model has recurrent layers"), "{error}");
    let error = refused(&model, Speculation::Draft { model: &hybrid.decoder, tokens: 2 });
    assert!(error.contains("the draft model has recurrent layers"), "{error}");
    for (tokens, min, max) in [(0, 1, 2), (1, 0, 2), (1, 3, 2)] {
        let error = refused(&model, lookup(tokens, min, max));
        assert!(error.contains("found"), "{error}");
    }
}

#[test]
fn scores_of_a_prompt_are_those_that_are_asked_for_alone() {
    let model = model();
    let prompt = model.tokenizer.encode("It was a dark and stormy night, and nobody was about.", true).unwrap();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
    // The cache holds the prompt then.
    answer(&mut engine, &model, Model::request(&prompt, 3, &SamplingParams::greedy()));
    let request = Request { prompt_logprobs: Some(3), ..Model::request(&prompt, 0, &SamplingParams::greedy()) };
    let id = engine.generate(&model.tokenizer, request).unwrap();
    let mut found = Vec::new();
    while !engine.is_empty() {
        for event in engine.step().unwrap() {
            match event {
                Event::Prompt { id: of, scores } => {
                    assert!(of == id && found.is_empty());
                    found = scores;
                }
                Event::Answered { id: of, answer, .. } => {
                    assert!(of == id && !found.is_empty() && answer.tokens.is_empty());
                    assert_eq!((answer.finish, answer.text.as_str()), (Finish::Length, ""));
                }
                other => panic!("{other:?}"),
            }
        }
    }
    let picks = prompt.iter().enumerate().skip(1).map(|(i, &t)| (i - 1, t)).collect();
    engine.score(prompt[..prompt.len() - 1].to_vec(), picks).unwrap();
    let mut scores = Vec::new();
    while !engine.is_empty() {
        for event in engine.step().unwrap() {
            let Event::Scored { scores: all, .. } = event else { panic!("{event:?}") };
            scores = all;
        }
    }
    assert_eq!(found.len(), prompt.len() - 1);
    for ((found, score), &token) in found.iter().zip(&scores).zip(&prompt[1..]) {
        assert_eq!((found.token, found.logprob.to_bits()), (token, (score.log_prob as f32).to_bits()));
        assert_eq!((found.rank == 1, found.top_logprobs[0].0 == token), (score.is_greedy, score.is_greedy));
        assert_eq!(found.top_logprobs.len(), 3);
        assert!(found.top_logprobs.is_sorted_by(|a, b| a.1 >= b.1));
        let place = found.top_logprobs.iter().position(|t| t.0 == token);
        assert!(place.is_none_or(|place| found.top_logprobs[place].1 == found.logprob && place < found.rank));
        assert!(found.rank > 3 || place.is_some());
    }
}

#[test]
fn an_answer_says_what_ended_it() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
    let prompt = model.tokenizer.encode("It was a dark and stormy", true).unwrap();
    let request = || Model::request(&prompt, 12, &SamplingParams::greedy());
    let plain = answer(&mut engine, &model, request());
    assert_eq!((plain.finish, plain.stop), (Finish::Length, None));
    let fourth = plain.tokens[3].token;
    let first = plain.tokens.iter().position(|t| t.token == fourth).unwrap();
    let stopped = answer(&mut engine, &model, Request { stop_tokens: vec![fourth], ..request() });
    assert_eq!((stopped.finish, stopped.stop), (Finish::Stop, Some(StopReason::Token(fourth))));
    assert_eq!(stopped.tokens, plain.tokens[..=first]);
    // Its text is the answer's where it is asked for.
    let text =
        |tokens: &[Sampled]| model.tokenizer.decode(&tokens.iter().map(|t| t.token).collect::<Vec<_>>(), true).unwrap();
    assert_eq!(stopped.text, text(&plain.tokens[..first]));
    let kept = answer(&mut engine, &model, Request { stop_tokens: vec![fourth], keep_stop: true, ..request() });
    assert_eq!((kept.text, kept.stop), (text(&plain.tokens[..=first]), Some(StopReason::Token(fourth))));
    // Not chosen before its time, after which another text stands.
    let later = answer(&mut engine, &model, Request { stop_tokens: vec![fourth], min_tokens: 9, ..request() });
    assert!(later.tokens[..9].iter().all(|t| t.token != fourth) && later.tokens.len() >= 9);
    let rule = Rule::new(1, None, Some(5));
    let ruled = answer(&mut engine, &model, Request { constraint: Some(Box::new(rule)), ..request() });
    assert_eq!((ruled.tokens.len(), ruled.finish, ruled.stop), (5, Finish::Stop, Some(StopReason::Grammar)));
    // A grammar has the last word: it lets nothing but the stop token follow.
    let (constraint, stop_tokens) = (Some(Box::new(Only::default()) as Box<dyn Constraint>), vec![7]);
    let forced = answer(&mut engine, &model, Request { constraint, stop_tokens, min_tokens: 3, ..request() });
    assert_eq!((forced.tokens.len(), forced.stop), (1, Some(StopReason::Token(7))));
}

/// A grammar of token 7, three times.
#[derive(Default)]
struct Only(TokenSet, usize);

impl Constraint for Only {
    fn allowed(&mut self) -> Result<&TokenSet, ConstraintError> {
        let mut words = vec![0; 64];
        words[0] = 1 << 7;
        self.0 = TokenSet::from_words(words);
        Ok(&self.0)
    }

    fn take(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.1 += 1;
        if token == 7 { Ok(()) } else { Err(ConstraintError(format!("{token} is not 7"))) }
    }

    fn is_done(&mut self) -> bool {
        self.1 == 3
    }

    fn restart(&mut self) {
        self.1 = 0;
    }
}

#[test]
fn a_grammar_begins_where_the_thinking_ends() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
    let prompt = model.tokenizer.encode("It was a dark and stormy", true).unwrap();
    let request = || Model::request(&prompt, 12, &SamplingParams::greedy());
    let plain = answer(&mut engine, &model, request());
    let thought = model.tokenizer.decode(&plain.tokens[..4].iter().map(|t| t.token).collect::<Vec<_>>(), true).unwrap();
    let constraint = Some(Box::new(Only::default()) as Box<dyn Constraint>);
    let thinking = Some(Thinking::until(thought));
    let got = answer(&mut engine, &model, Request { thinking, constraint, ..request() });
    let tokens: Vec<u32> = got.tokens.iter().map(|t| t.token).collect();
    let expected: Vec<u32> = plain.tokens[..4].iter().map(|t| t.token).chain([7; 3]).collect();
    assert_eq!(tokens, expected);
}

#[test]
fn a_model_may_open_its_thinking_beside_a_grammar() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
    let prompt = model.tokenizer.encode("It was a dark and stormy", true).unwrap();
    let id = |text: &str| {
        let tokens = model.tokenizer.encode(text, false).unwrap();
        assert_eq!(tokens.len(), 1, "{text}");
        tokens[0]
    };
    let m = id("m");
    // A model that is fond of `m`, or of anything else.
    let mut ask = |open: &str, bias: f32| {
        let sampling = SamplingParams { logit_bias: vec![(m, bias)], ..SamplingParams::greedy() };
        let request = Request {
            thinking: Some(Thinking { open: Some(open.into()), close: "mm".into() }),
            constraint: Some(Box::new(Only::default())),
            stop: vec!["m".into()],
            ..Model::request(&prompt, 12, &sampling)
        };
        let got = answer(&mut engine, &model, request);
        (got.tokens.iter().map(|t| t.token).collect::<Vec<_>>(), got.stop)
    };
    let done = Some(StopReason::Grammar);
    assert_eq!(ask("m", 100.0), (vec![m, m, m, 7, 7, 7], done.clone()));
    assert_eq!(
        ask("m>", 100.0),
        (vec![7, 7, 7], done.clone()),
        "what is no token cannot be told from what begins like it"
    );
    assert_eq!(ask("m", -100.0), (vec![7, 7, 7], done.clone()));
    // A grammar that writes the mark itself says what the thinking is, too.
    let seven = model.tokenizer.decode(&[7], true).unwrap();
    assert_eq!(ask(&seven, -100.0), (vec![7, 7, 7], done));
}

#[test]
fn the_context_holds_prompt_and_answer() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
    let prompt: Vec<u32> = (0..CONTEXT as u32).map(|i| 300 + i % 50).collect();
    for room in [0, 1, 3] {
        let request = Model::request(&prompt[..CONTEXT - room], 10, &SamplingParams::greedy());
        let got = answer(&mut engine, &model, request);
        assert_eq!((got.tokens.len(), got.finish), (room, Finish::Length));
    }
}

#[test]
fn an_answer_tells_what_of_its_prompt_was_kept() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
    let prompt: Vec<u32> = (0..40).map(|i| 300 + i).collect();
    let mut cached = |prompt: &[u32], scores| {
        let request = Request { prompt_logprobs: scores, ..Model::request(prompt, 2, &SamplingParams::greedy()) };
        answer(&mut engine, &model, request).cached
    };
    assert_eq!(cached(&prompt, None), 0);
    assert_eq!(cached(&prompt, None), 39, "the last is computed to know what follows");
    assert_eq!(cached(&[&prompt[..20], &[7, 8]].concat(), None), 20);
    assert_eq!(cached(&prompt, Some(0)), 0, "scores are computed");
}

#[test]
fn a_token_is_as_probable_where_it_is_drawn_as_where_it_is_given() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 1), KvFormat::F32).unwrap();
    let prompt = model.tokenizer.encode("It was a dark and stormy", true).unwrap();
    let sampling = SamplingParams { temperature: 0.9, seed: Some(3), logprobs: Some(4), ..SamplingParams::default() };
    let drawn = answer(&mut engine, &model, Model::request(&prompt, 24, &sampling));
    let all: Vec<u32> = prompt.iter().copied().chain(drawn.tokens.iter().map(|t| t.token)).collect();
    let id = engine
        .generate(&model.tokenizer, Request { prompt_logprobs: Some(4), ..Model::request(&all, 0, &sampling) })
        .unwrap();
    let mut given = Vec::new();
    while !engine.is_empty() {
        for event in engine.step().unwrap() {
            if let Event::Prompt { id: of, scores } = event {
                assert_eq!(of, id);
                given = scores;
            }
        }
    }
    let drawn: Vec<Chosen> = drawn.tokens.iter().map(sampled).collect();
    let given: Vec<Chosen> = given[prompt.len() - 1..].iter().map(scored).collect();
    assert_eq!(drawn, given);
}

#[test]
fn an_answer_that_fails_fails_whoever_wants_only_answers() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 4), KvFormat::F32).unwrap();
    let request = |gives_up| Request {
        constraint: Some(Box::new(Rule::new(1, gives_up, None))),
        ..Model::request(&[300, 301, 302], 6, &SamplingParams::greedy())
    };
    let error = recoup::engine::answer(&mut engine, &model.tokenizer, request(Some(2)), &mut |_| {
        std::ops::ControlFlow::Continue(())
    });
    assert_eq!(error.unwrap_err().to_string(), "the grammar of the answer: too large");
    let mut answered = 0;
    let all = answer_all(&mut engine, &model.tokenizer, vec![request(None), request(Some(3))], 2, &mut |_, _| {
        answered += 1;
        std::ops::ControlFlow::Continue(())
    });
    assert!(matches!(all, Err(EngineError::Constraint(_))) && answered == 0);
    assert!(engine.is_empty(), "nothing is left behind");
}

#[test]
#[ignore = "measures: cargo test --test library engine::what_guesses -- --ignored --nocapture"]
fn what_guesses_are_worth() {
    let model = shipped("models/books-bf16");
    let sentence = "The captain counted the barrels twice, and wrote the number into the book. ";
    let text = format!("{}The captain counted", sentence.repeat(6));
    let plain = "It was late when the two of them came home, and neither had said a word about";
    for (what, text) in [("a text that repeats itself", text.as_str()), ("a text that does not", plain)] {
        let prompt = model.tokenizer.encode(text, true).unwrap();
        for temperature in [0.0, 0.8] {
            let sampling = SamplingParams { temperature, seed: Some(1), ..SamplingParams::default() };
            let ways = [(0, true), (2, true), (5, true), (8, true), (4, false)];
            let mut best = [(f64::INFINITY, Stats::default()); 5];
            // Side by side, so that what else the machine does slows all of them.
            for _ in 0..7 {
                for (&(tokens, lookup), best) in ways.iter().zip(&mut best) {
                    let mut engine = Engine::new(&model.decoder, Limits::new(1024, 1), KvFormat::F32).unwrap();
                    if tokens > 0 {
                        let guess = match lookup {
                            true => Speculation::PromptLookup { tokens, min: 2, max: 4 },
                            false => Speculation::Draft { model: &model.decoder, tokens },
                        };
                        engine = engine.with_speculation(guess).unwrap();
                    }
                    let generated = answer(&mut engine, &model, Model::request(&prompt, 200, &sampling));
                    let each = generated.decode.as_secs_f64() / (generated.tokens.len() - 1) as f64;
                    *best = (best.0.min(each), engine.stats());
                }
            }
            for ((tokens, lookup), (each, stats)) in ways.into_iter().zip(best) {
                println!(
                    "{what}, temperature {temperature}, {} {tokens}: {:.1} tokens/s, {:.2} times; {} of {} guesses right",
                    if lookup { "lookup" } else { "itself as draft" },
                    1.0 / each,
                    best[0].0 / each,
                    stats.accepted,
                    stats.drafted
                );
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
    let bias = SamplingParams { logit_bias: vec![(1_000_000, 1.0)], ..greedy.clone() };
    assert!(refused(Model::request(&[5], 3, &bias)).to_string().contains("1000000"));
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
    // Prompt and answer together are the context.
    assert_eq!(answers[&kept], (18, Finish::Length));
    assert_eq!(answers[&nothing], (0, Finish::Length));
}

#[test]
fn an_answer_can_be_cancelled_and_what_there_is_of_it_is_given_back() {
    let model = model();
    let mut engine = Engine::new(&model.decoder, Limits::new(CONTEXT, 4), KvFormat::F32).unwrap();
    let request = || Model::request(&[300, 301, 302], 40, &SamplingParams::greedy());
    let whole = answer(&mut engine, &model, request());
    let id = engine.generate(&model.tokenizer, request()).unwrap();
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

#[test]
fn what_a_cancelled_prompt_had_computed_is_found_again() {
    let model = model();
    let limits = Limits { pass: 20, ..Limits::new(CONTEXT, 2) };
    let mut engine = Engine::new(&model.decoder, limits, KvFormat::F32).unwrap();
    let prompt: Vec<u32> = (300..360).collect();
    let request = || Model::request(&prompt, 3, &SamplingParams::greedy());
    let id = engine.generate(&model.tokenizer, request()).unwrap();
    assert_eq!((engine.stats().waiting, engine.stats().running), (1, 0));
    for _ in 0..2 {
        assert!(engine.step().unwrap().is_empty());
    }
    let stats = engine.stats();
    assert_eq!((stats.waiting, stats.running, stats.pages_used, stats.pages_kept), (0, 1, 3, 0));
    engine.cancel(id);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.pages_used, stats.pages_kept), (0, 0, 3));
    assert_eq!((stats.prefix_asked, stats.prefix_found), (59, 0));
    answer(&mut engine, &model, request());
    let stats = engine.stats();
    assert_eq!((stats.prefix_asked, stats.prefix_found, stats.preemptions), (2 * 59, 40, 0));
}
