//! How fast a server answers: many clients at once, or requests that arrive at a rate, each of whose tokens is timed.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use recoup_openai::{Error, OpenAi, Timed};
use serde_json::{Map, Value, json};

use crate::corpus::BUILT_IN;
use crate::random::SplitMix64;

/// Prompts that tell how many characters make a token there: what a template adds counts too, and pieces of text differ.
const PROBES: usize = 4;
/// Characters of a token until the server says otherwise.
const USUAL: f64 = 4.0;
/// Different errors that are kept.
const ERRORS: usize = 5;
/// Prompts begin this many bytes from each other in the text.
const STRIDE: usize = 7919;

/// How requests arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// So many clients, each of which asks again when it has its answer.
    Clients(usize),
    /// So many requests a second, at random times, whether or not the server keeps up.
    Rate(f64),
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Tokens of a prompt, and of its answer.
    pub prompt: usize,
    pub generate: usize,
    /// Requests of a run: of each client, or in all where they arrive at a rate.
    pub requests: usize,
    /// Runs of each level.
    pub repeats: usize,
    /// What a request must keep to count as good.
    pub targets: Vec<Target>,
}

/// A latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latency {
    /// Time to the first token.
    First,
    /// Time of each token after it, on average over the answer.
    Each,
    /// Time between two pieces of an answer.
    Between,
    /// Time of the whole answer.
    Whole,
}

impl Latency {
    pub const ALL: [Self; 4] = [Self::First, Self::Each, Self::Between, Self::Whole];

    /// As vLLM's benchmark calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::First => "ttft",
            Self::Each => "tpot",
            Self::Between => "itl",
            Self::Whole => "e2el",
        }
    }
}

/// A latency and the milliseconds that it may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    pub latency: Latency,
    pub milliseconds: f64,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}`: expected ttft, tpot or e2el, a colon and milliseconds, as in ttft:500");
        let (name, value) = text.split_once(':').ok_or_else(wrong)?;
        let latency = Latency::ALL.into_iter().find(|l| l.name() == name && *l != Latency::Between);
        let milliseconds = value.parse().ok().filter(|ms: &f64| ms.is_finite() && *ms > 0.0);
        Ok(Self { latency: latency.ok_or_else(wrong)?, milliseconds: milliseconds.ok_or_else(wrong)? })
    }
}

impl Target {
    fn is_kept(&self, timed: &Timed) -> bool {
        let seconds = match self.latency {
            Latency::First => timed.first(),
            // An answer of one token has no further ones.
            Latency::Each => Some(timed.each().unwrap_or(0.0)),
            Latency::Between => None,
            Latency::Whole => Some(timed.end.as_secs_f64()),
        };
        seconds.is_some_and(|s| 1e3 * s <= self.milliseconds)
    }
}

/// What came of one level.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    pub arrivals: Arrivals,
    pub runs: Vec<Run>,
}

/// One run of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    pub seconds: f64,
    pub answers: Vec<Timed>,
    pub failed: usize,
    /// Of those that failed, the first different errors.
    pub errors: Vec<String>,
}

/// Mean, standard deviation and some quantiles of latencies, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    pub mean: f64,
    pub std: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

impl Spread {
    /// Of seconds.
    #[must_use]
    pub fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        let n = seconds.len() as f64;
        let last = seconds.len().checked_sub(1)?;
        let mean = seconds.iter().sum::<f64>() / n;
        let std = (seconds.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt();
        // Between the two nearest, as NumPy has it.
        let quantile = |share: f64| {
            let at = share * last as f64;
            let below = at as usize;
            let (a, b) = (seconds[below], seconds[(below + 1).min(last)]);
            1e3 * (a + (b - a) * at.fract())
        };
        Some(Self { mean: 1e3 * mean, std: 1e3 * std, p50: quantile(0.5), p90: quantile(0.9), p99: quantile(0.99) })
    }
}

impl Level {
    fn answers(&self) -> impl Iterator<Item = &Timed> {
        self.runs.iter().flat_map(|r| &r.answers)
    }

    /// Of all answers; `None` where none has it.
    #[must_use]
    pub fn latency(&self, latency: Latency) -> Option<Spread> {
        let answers = self.answers();
        Spread::of(match latency {
            Latency::First => answers.filter_map(Timed::first).collect(),
            Latency::Each => answers.filter_map(Timed::each).collect(),
            Latency::Between => {
                answers.flat_map(|t| t.pieces.windows(2).map(|p| (p[1] - p[0]).as_secs_f64())).collect()
            }
            Latency::Whole => answers.map(|t| t.end.as_secs_f64()).collect(),
        })
    }

    /// The median over runs of `of` a run, per second.
    fn rate(&self, of: impl Fn(&Run) -> f64) -> f64 {
        let mut rates: Vec<f64> = self.runs.iter().map(|r| of(r) / r.seconds).collect();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(0.0)
    }

    /// Answered requests a second.
    #[must_use]
    pub fn requests_per_second(&self) -> f64 {
        self.rate(|r| r.answers.len() as f64)
    }

    /// Generated tokens a second of all clients together.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        self.rate(Run::generated)
    }

    /// Requests a second that keep all targets; `None` without any.
    #[must_use]
    pub fn goodput(&self, targets: &[Target]) -> Option<f64> {
        let good = |r: &Run| r.answers.iter().filter(|t| targets.iter().all(|target| target.is_kept(t))).count() as f64;
        (!targets.is_empty()).then(|| self.rate(good))
    }

    #[must_use]
    pub fn completed(&self) -> usize {
        self.answers().count()
    }

    #[must_use]
    pub fn failed(&self) -> usize {
        self.runs.iter().map(|r| r.failed).sum()
    }

    /// The first different errors of all runs.
    #[must_use]
    pub fn errors(&self) -> Vec<&str> {
        let mut errors: Vec<&str> = self.runs.iter().flat_map(|r| &r.errors).map(String::as_str).collect();
        errors.dedup();
        errors.truncate(ERRORS);
        errors
    }

    /// Tokens of prompts by the server's account; `None` where it gives none.
    #[must_use]
    pub fn prompt_tokens(&self) -> Option<u64> {
        self.answers().map(|t| t.prompt_tokens).sum()
    }

    /// Answers that are shorter than `generate` tokens.
    #[must_use]
    pub fn short(&self, generate: usize) -> usize {
        self.answers().filter(|t| t.tokens() < generate as u64).count()
    }

    /// With the names of vLLM's benchmark.
    #[must_use]
    pub fn json(&self, workload: &Workload) -> Value {
        let (clients, rate) = match self.arrivals {
            Arrivals::Clients(n) => (json!(n), json!("inf")),
            Arrivals::Rate(rate) => (Value::Null, json!(rate)),
        };
        let generated: f64 = self.runs.iter().map(Run::generated).sum();
        let seconds: f64 = self.runs.iter().map(|r| r.seconds).sum();
        let all = self.rate(|r| r.generated() + r.prompts());
        let runs: Vec<f64> = self.runs.iter().map(|r| r.generated() / r.seconds).collect();
        let mut out = json!({"max_concurrency": clients, "request_rate": rate,
            "num_prompts": self.completed() + self.failed(), "completed": self.completed(), "failed": self.failed(),
            "duration": seconds, "total_input_tokens": self.prompt_tokens(), "total_output_tokens": generated as u64,
            "request_throughput": self.requests_per_second(), "output_throughput": self.tokens_per_second(),
            "total_token_throughput": all, "output_throughput_runs": runs, "errors": self.errors()});
        let mut more = Map::new();
        if let Some(goodput) = self.goodput(&workload.targets) {
            more.insert("request_goodput".to_owned(), json!(goodput));
        }
        for latency in Latency::ALL {
            let Some(Spread { mean, std, p50, p90, p99 }) = self.latency(latency) else { continue };
            let name = latency.name();
            for (what, value) in [("mean", mean), ("std", std), ("median", p50), ("p90", p90), ("p99", p99)] {
                more.insert(format!("{what}_{name}_ms"), json!(value));
            }
        }
        if let Some(out) = out.as_object_mut() {
            out.extend(more);
        }
        out
    }
}

impl Run {
    fn take(&mut self, answer: Result<Timed, Error>, last: &mut Option<Error>) {
        match answer {
            Ok(timed) => self.answers.push(timed),
            Err(error) => {
                self.failed += 1;
                let text = error.to_string();
                if self.errors.len() < ERRORS && !self.errors.contains(&text) {
                    self.errors.push(text);
                }
                *last = Some(error);
            }
        }
    }

    fn generated(&self) -> f64 {
        self.answers.iter().map(|t| t.tokens() as f64).sum()
    }

    fn prompts(&self) -> f64 {
        self.answers.iter().map(|t| t.prompt_tokens.unwrap_or(0) as f64).sum()
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clients(n) => write!(f, "{n}"),
            Self::Rate(rate) => write!(f, "{rate}/s"),
        }
    }
}

/// A server and the prompts that it is given.
pub struct Served<'s> {
    server: &'s OpenAi,
    workload: Workload,
    /// Characters of a prompt.
    characters: usize,
    /// Prompts that were made: no two are the same.
    made: AtomicUsize,
}

impl<'s> Served<'s> {
    /// Asks a few times, to learn how many characters make a token there.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn new(server: &'s OpenAi, workload: Workload) -> Result<Self, Error> {
        let characters = (USUAL * workload.prompt as f64) as usize;
        let mut served = Self { server, workload, characters, made: AtomicUsize::new(0) };
        for _ in 0..PROBES {
            let Some(tokens) = server.timed(&served.prompt(), 1)?.prompt_tokens.filter(|t| *t > 0) else { break };
            let factor = served.workload.prompt as f64 / tokens as f64;
            served.characters = ((served.characters as f64 * factor.clamp(0.2, 5.0)).round() as usize).max(1);
        }
        Ok(served)
    }

    /// A prompt that was never sent: a number, and a piece of a text.
    fn prompt(&self) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let begin = (number * STRIDE) % BUILT_IN.len();
        let text = BUILT_IN.char_indices().skip_while(|(at, _)| *at < begin).map(|(_, c)| c);
        // Random digits, because the numbers of two runs of this program would be the same.
        let mark = format!("{:08x} ", SplitMix64(number as u64 ^ entropy()).draw() >> 32);
        mark.chars().chain(text).chain(BUILT_IN.chars().cycle()).take(self.characters.max(1)).collect()
    }

    fn ask(&self) -> Result<Timed, Error> {
        self.server.timed(&self.prompt(), self.workload.generate)
    }

    /// One level: a run that does not count, then as many as are wanted. `done` is told of each request.
    ///
    /// # Errors
    /// When the server answers none of a run's requests.
    pub fn measure(&self, arrivals: Arrivals, done: &mut dyn FnMut()) -> Result<Level, Error> {
        let warm = match arrivals {
            Arrivals::Clients(n) => n,
            Arrivals::Rate(_) => 1,
        };
        self.run(&Arrivals::Clients(warm), warm, &mut || {})?;
        let requests = self.requests(arrivals);
        let runs = (0..self.workload.repeats).map(|_| self.run(&arrivals, requests, done)).collect::<Result<_, _>>()?;
        Ok(Level { arrivals, runs })
    }

    /// Requests of one run.
    #[must_use]
    pub fn requests(&self, arrivals: Arrivals) -> usize {
        match arrivals {
            Arrivals::Clients(n) => n * self.workload.requests,
            Arrivals::Rate(_) => self.workload.requests,
        }
    }

    fn run(&self, arrivals: &Arrivals, requests: usize, done: &mut dyn FnMut()) -> Result<Run, Error> {
        let (sender, answers) = mpsc::channel();
        let next = AtomicUsize::new(0);
        let (threads, times) = match *arrivals {
            Arrivals::Clients(n) => (n, None),
            Arrivals::Rate(rate) => (requests, Some(times(rate, requests))),
        };
        let (mut run, mut last) = (Run::default(), None);
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (sender, next, times) = (sender.clone(), &next, &times);
                scope.spawn(move || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= requests {
                            break;
                        }
                        let at = times.as_ref().map_or(Duration::ZERO, |times| times[number]);
                        std::thread::sleep(at.saturating_sub(begin.elapsed()));
                        if sender.send(self.ask()).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for answer in answers {
                run.take(answer, &mut last);
                done();
            }
        });
        run.seconds = begin.elapsed().as_secs_f64();
        match last {
            Some(error) if run.answers.is_empty() => Err(error),
            _ => Ok(run),
        }
    }
}

/// When requests arrive: at a rate, each independently of the others (a Poisson process), always the same.
fn times(rate: f64, requests: usize) -> Vec<Duration> {
    let mut random = SplitMix64(1);
    let mut at = 0.0;
    (0..requests)
        .map(|_| {
            let begin = at;
            let uniform = (random.draw() >> 11) as f64 / (1u64 << 53) as f64;
            at += -(1.0 - uniform).ln() / rate;
            Duration::from_secs_f64(begin)
        })
        .collect()
}

/// Bits that differ from one run of the program to the next.
fn entropy() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::OnceLock;
    static ENTROPY: OnceLock<u64> = OnceLock::new();
    *ENTROPY.get_or_init(|| RandomState::new().hash_one(0u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(pieces: &[u64], tokens: u64) -> Timed {
        Timed {
            pieces: pieces.iter().map(|ms| Duration::from_millis(*ms)).collect(),
            end: Duration::from_millis(pieces.last().copied().unwrap_or(0) + 1),
            prompt_tokens: Some(10),
            completion_tokens: Some(tokens),
        }
    }

    #[test]
    fn quantiles_lie_between_the_nearest() {
        let spread = Spread::of((0..=10).rev().map(f64::from).collect()).unwrap();
        assert_eq!((spread.mean, spread.p50, spread.p90), (5000.0, 5000.0, 9000.0));
        assert!((spread.p99 - 9900.0).abs() < 1e-6 && (spread.std - 3_162.277_660).abs() < 1e-3);
        assert_eq!(Spread::of(vec![2.0]).unwrap().p99, 2000.0);
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn a_level_counts_tokens_not_pieces_and_what_keeps_the_targets() {
        // Two tokens came in one piece.
        let fast = timed(&[100, 110, 130], 4);
        let slow = timed(&[900, 910], 2);
        let run = |seconds| Run { seconds, answers: vec![fast.clone(), slow.clone()], ..Run::default() };
        let level = Level { arrivals: Arrivals::Clients(2), runs: vec![run(1.0), run(2.0), run(4.0)] };
        assert_eq!(level.tokens_per_second(), 3.0);
        assert_eq!(level.requests_per_second(), 1.0);
        assert_eq!(level.latency(Latency::Each).unwrap().mean, 10.0);
        assert_eq!(level.latency(Latency::First).unwrap().p50, 500.0);
        let targets = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<Target>>();
        assert_eq!(level.goodput(&targets(&["ttft:500", "tpot:10"])), Some(0.5));
        assert_eq!(level.goodput(&targets(&["e2el:2000"])), Some(1.0));
        assert_eq!(level.goodput(&[]), None);
        let workload = Workload { prompt: 10, generate: 4, requests: 1, repeats: 3, targets: targets(&["ttft:500"]) };
        let json = level.json(&workload);
        assert_eq!((&json["total_input_tokens"], &json["total_output_tokens"]), (&json!(60), &json!(18)));
        assert_eq!((&json["request_goodput"], &json["max_concurrency"]), (&json!(0.5), &json!(2)));
        assert!(json["p99_itl_ms"].as_f64().unwrap() > 10.0 && level.short(4) == 3);
    }

    #[test]
    fn targets_are_read_or_refused_with_what_was_expected() {
        for text in ["ttft", "itl:5", "ttft:-1", "ttft:nan", "tpot:", "what:1"] {
            assert!(text.parse::<Target>().unwrap_err().contains("ttft:500"), "{text}");
        }
    }

    #[test]
    fn arrivals_have_their_rate() {
        let times = times(50.0, 5000);
        assert!((times[4999].as_secs_f64() - 100.0).abs() < 5.0 && times[0].is_zero());
        assert!(times.is_sorted());
    }
}
