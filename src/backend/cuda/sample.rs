//! What is read off rows of logits: scores, divergence, and the choice of tokens. Kernels (kernels/sample.cu) find what
//! decides; a row goes to the host where that is not certain: its choice is the host's to the last bit, whatever the
//! order of sums. So does a row of which a grammar or a bias decides, and rows whose ranks are asked with scores.

use recoup_ground::divergence::{Pair, RowError, Totals, compare_rows};

use super::driver::{Args, Memory};
use super::{CudaBackend, CudaTensor};
use crate::backend::{BackendError, Result};
use crate::logits::{
    Draw, Question, Sampled, SamplingError, Scratch, TokenScore, generated_counts, largest_of, score_row, sure_log_prob,
};

/// As in sample.cu: logits of a warp, and of a block; candidates that are given out at most; words of a job's results.
const RUN: usize = 256;
const PIECE: usize = 2048;
const FEW: usize = 1024;
const FOUND: usize = 8;
/// Bits of what a job wants.
const SUMS: i32 = 1;
const DRAW: i32 = 2;
const TOP_P: i32 = 4;
const CANDIDATES: i32 = 8;

/// How far the order of a sum of `vocab` weights may carry it and the sums on its way, the host's and the device's, for
/// 1 of it.
fn sum_error(vocab: usize) -> f64 {
    // Each addition rounds by 2^-53 at most; four sums of that length at most stand against each other.
    1.2e-16 * (4.0 * vocab as f64 + 1000.0)
}

/// A row, or two rows side by side, as far as losses and divergence need them.
struct RowTotals {
    /// Largest logit, where it stands first, and the sum of e^(logit - largest); of the first row and the second.
    largest: [f64; 2],
    first: [f64; 2],
    sum: [f64; 2],
    /// Σ e^a · (a - b), of logits less their row's largest.
    weighted: f64,
    is_finite: bool,
}

impl RowTotals {
    /// Puts a row's pieces together, in order.
    fn of(pieces: &[f64]) -> Self {
        let pieces = || pieces.chunks_exact(8);
        let (mut largest, mut first) = ([f64::NEG_INFINITY; 2], [0.0; 2]);
        for piece in pieces() {
            for side in 0..2 {
                if piece[3 * side] > largest[side] {
                    (largest[side], first[side]) = (piece[3 * side], piece[3 * side + 1]);
                }
            }
        }
        let (mut sum, mut weighted, mut broken) = ([0.0; 2], 0.0, 0.0);
        for piece in pieces() {
            let below = [piece[0] - largest[0], piece[3] - largest[1]];
            sum[0] += piece[2] * below[0].exp();
            sum[1] += piece[5] * below[1].exp();
            weighted += (piece[6] + piece[2] * (below[0] - below[1])) * below[0].exp();
            broken += piece[7];
        }
        Self { largest, first, sum, weighted, is_finite: broken == 0.0 }
    }
}

/// What the kernels found for one job.
struct Found<'a> {
    words: &'a [u32],
    few: &'a [u32],
}

impl Found<'_> {
    fn is_well(&self) -> bool {
        self.words[0] == 0
    }

    fn largest(&self) -> f32 {
        f32::from_bits(self.words[2])
    }

    fn sure_draw(&self) -> Option<u32> {
        (self.words[4] == 1).then_some(self.words[3])
    }

    fn total(&self) -> f64 {
        f64::from_bits(u64::from(self.words[6]) | u64::from(self.words[7]) << 32)
    }

    /// The candidates, unless there are too many.
    fn few(&self) -> Option<Vec<(u32, f32)>> {
        let count = self.words[5] as usize;
        let pairs = self.few.chunks_exact(2).take(count).map(|p| (p[0], f32::from_bits(p[1])));
        (count <= FEW).then(|| pairs.collect())
    }
}

/// Questions to the kernels, one a row of each.
#[derive(Default)]
struct Jobs {
    /// Row, 1 if of the penalised ones, what is wanted, k.
    ints: Vec<i32>,
    /// Temperature, ln of min-p, top-p, the point to be drawn.
    numbers: Vec<f64>,
    wants: i32,
    count: usize,
}

impl Jobs {
    fn push(&mut self, (row, penalised): (usize, bool), wants: i32, k: usize, numbers: [f64; 4]) -> usize {
        self.ints.extend([row as i32, i32::from(penalised), wants, i32::try_from(k).unwrap_or(i32::MAX)]);
        self.numbers.extend(numbers);
        self.wants |= wants;
        self.count += 1;
        self.count - 1
    }
}

impl CudaBackend {
    /// Row `row` on the host.
    fn row(&self, x: &CudaTensor, row: usize) -> Result<Vec<f32>> {
        self.device.download_from(&x.data, row * x.columns, x.columns)
    }

    fn totals(&self, a: &CudaTensor, b: Option<&CudaTensor>, rows: usize, vocab: usize) -> Result<Vec<RowTotals>> {
        let pieces = vocab.div_ceil(PIECE);
        let out = self.device.take(64 * rows * pieces)?;
        let args = Args::new()
            .memory(&a.data)
            .optional(b.map(|b| &*b.data))
            .memory(&out)
            .int(a.columns)
            .int(b.map_or(0, |b| b.columns))
            .int(vocab);
        self.launch("totals", [pieces, rows, 1], 256, args)?;
        let host: Vec<f64> = self.device.download(&out, 8 * rows * pieces)?;
        Ok(host.chunks_exact((8 * pieces).max(1)).map(RowTotals::of).collect())
    }

    /// Logits at places (row, token).
    fn logits_at(&self, x: &CudaTensor, places: &[(usize, u32)]) -> Result<Vec<f32>> {
        let rows: Vec<i32> = places.iter().map(|p| p.0 as i32).collect();
        let tokens: Vec<i32> = places.iter().map(|p| p.1 as i32).collect();
        let (rows, tokens) = (self.device.upload(&rows)?, self.device.upload(&tokens)?);
        let out = self.device.take(4 * places.len())?;
        let args =
            Args::new().memory(&x.data).memory(&rows).memory(&tokens).memory(&out).int(places.len()).int(x.columns);
        self.launch("logits_at", [places.len().div_ceil(256), 1, 1], 256, args)?;
        self.device.download(&out, places.len())
    }

    /// How many logits of their row are at least those at places (row, token), which are `values`.
    fn ranks(&self, x: &CudaTensor, places: &[(usize, u32)], values: &[f32]) -> Result<Vec<usize>> {
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let (vocab, runs) = (x.columns, x.columns.div_ceil(RUN));
        let jobs: Vec<i32> = places.iter().flat_map(|p| [p.0 as i32, 0, CANDIDATES, 0]).collect();
        let (jobs, bounds) = (self.device.upload(&jobs)?, self.device.upload(values)?);
        let counts = self.device.take(4 * places.len() * runs)?;
        let args = Args::new().memory(&x.data).optional(None).memory(&jobs).memory(&bounds).memory(&counts);
        let blocks = [vocab.div_ceil(PIECE), places.len(), 1];
        self.launch("sample_count", blocks, 256, args.int(vocab).int(runs))?;
        let counts: Vec<i32> = self.device.download(&counts, places.len() * runs)?;
        Ok(counts.chunks_exact(runs.max(1)).map(|run| run.iter().map(|&n| n as usize).sum()).collect())
    }

    /// [`crate::backend::Backend::score`].
    pub(super) fn score_rows(&self, logits: &CudaTensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        if let Some(&(_, token)) = picks.iter().find(|p| p.1 as usize >= logits.columns) {
            return Err(BackendError::TokenOutOfRange { token, vocab: logits.columns });
        }
        if picks.is_empty() {
            return Ok(Vec::new());
        }
        let totals = self.totals(logits, None, logits.rows, logits.columns)?;
        let values = self.logits_at(logits, picks)?;
        let score = |(&(row, token), value): (&(usize, u32), f32)| {
            let t = &totals[row];
            if !t.is_finite {
                return Ok(score_row(&self.row(logits, row)?, token));
            }
            let below = f64::from(value - t.largest[0] as f32);
            Ok(TokenScore { log_prob: below - t.sum[0].ln(), is_greedy: t.first[0] == f64::from(token) })
        };
        picks.iter().zip(values).map(score).collect()
    }

    /// [`crate::backend::Backend::compare`].
    pub(super) fn compare_rows(
        &self,
        baseline: &CudaTensor,
        model: &CudaTensor,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<std::result::Result<Pair, RowError>>> {
        if let Some(&token) = targets.iter().find(|t| **t as usize >= vocab) {
            return Err(BackendError::TokenOutOfRange { token, vocab });
        }
        let rows = targets.len().min(baseline.rows).min(model.rows);
        let on_host = |row: usize| {
            let (a, b) = (
                baseline.data.device().download_from(&baseline.data, row * baseline.columns, vocab)?,
                self.row(model, row)?,
            );
            Ok(compare_rows(&a, &b[..vocab], targets[row] as usize))
        };
        let other = baseline.data.device();
        if other.ordinal != self.device.ordinal {
            return (0..rows).map(on_host).collect();
        }
        if !std::ptr::eq(&**other, &*self.device) {
            // Another stream of the same device.
            other.wait()?;
        }
        if rows == 0 {
            return Ok(Vec::new());
        }
        let places: Vec<(usize, u32)> = (0..rows).map(|row| (row, targets[row])).collect();
        let totals = self.totals(baseline, Some(model), rows, vocab)?;
        let (base, own) = (self.logits_at(baseline, &places)?, self.logits_at(model, &places)?);
        let compare = |(row, t): (usize, &RowTotals)| {
            if !t.is_finite {
                return on_host(row);
            }
            let totals = Totals {
                sums: t.sum,
                weighted: t.weighted,
                targets: [f64::from(base[row]) - t.largest[0], f64::from(own[row]) - t.largest[1]],
                same_top: t.first[0] == t.first[1],
            };
            Ok(Ok(totals.pair()))
        };
        totals.iter().enumerate().map(compare).collect()
    }

    /// Rows of `logits`, changed for what was said before: those of `draws` that change any. Which row is whose.
    fn penalised(&self, logits: &CudaTensor, draws: &[Draw<'_>]) -> Result<(Option<Memory>, Vec<Option<usize>>)> {
        let vocab = logits.columns;
        let (mut count, mut entries, mut penalties) = (0, Vec::new(), Vec::new());
        let mut whose = vec![None; draws.len()];
        for (draw, whose) in draws.iter().zip(&mut whose).filter(|(d, _)| d.sampler.has_penalties() && !d.has_bias()) {
            let row = count;
            count += 1;
            let counts = generated_counts(draw.history, vocab);
            entries.extend(counts.iter().flat_map(|&(token, times)| [row as i32, token as i32, times as i32]));
            let p = draw.sampler.params();
            penalties.extend([p.repetition_penalty, p.frequency_penalty, p.presence_penalty]);
            *whose = Some(row);
        }
        if count == 0 {
            return Ok((None, whose));
        }
        let memory = self.device.take(4 * vocab * count)?;
        for (from, to) in whose.iter().enumerate().filter_map(|(from, to)| Some((from, (*to)?))) {
            self.device.copy((&memory, 4 * vocab * to), (&logits.data, 4 * vocab * from), 4 * vocab)?;
        }
        if !entries.is_empty() {
            let (list, penalties) = (self.device.upload(&entries)?, self.device.upload(&penalties)?);
            let count = entries.len() / 3;
            let args = Args::new().memory(&memory).memory(&list).memory(&penalties).int(count).int(vocab);
            self.launch("penalise", [count.div_ceil(256), 1, 1], 256, args)?;
        }
        Ok((Some(memory), whose))
    }

    /// Runs `jobs` and gives each one's words, and then each one's candidates where any job asks for some.
    fn answer(&self, logits: &CudaTensor, penalised: Option<&Memory>, jobs: &Jobs) -> Result<Vec<u32>> {
        let (vocab, count) = (logits.columns, jobs.count);
        let (runs, pieces) = (vocab.div_ceil(RUN), vocab.div_ceil(PIECE));
        let lists = jobs.wants & CANDIDATES != 0;
        let words = count * if lists { FOUND + 2 * FEW } else { FOUND };
        let (ints, numbers) = (self.device.upload(&jobs.ints)?, self.device.upload(&jobs.numbers)?);
        let (found, maxima) = (self.device.take(4 * words)?, self.device.take(4 * count * runs)?);
        let bounds = self.device.take(4 * count)?;
        let rows = || Args::new().memory(&logits.data).optional(penalised).memory(&ints);
        let many = [pieces, count, 1];
        self.launch("sample_max", many, 256, rows().memory(&maxima).int(vocab).int(runs))?;
        let args = rows().memory(&numbers).memory(&maxima).memory(&bounds).memory(&found).int(vocab).int(runs);
        self.launch("sample_head", [1, count, 1], 256, args)?;
        let mut last_bounds = bounds;
        if jobs.wants & SUMS != 0 {
            let (sums, classes) = (self.device.take(8 * count * runs)?, self.device.take(4 * 32 * count * pieces)?);
            let args = rows().memory(&numbers).memory(&found).memory(&sums).memory(&classes).int(vocab).int(runs);
            self.launch("sample_sums", many, 256, args)?;
            let next = self.device.take(4 * count)?;
            let args = rows()
                .memory(&numbers)
                .memory(&sums)
                .memory(&classes)
                .memory(&last_bounds)
                .memory(&next)
                .memory(&found)
                .int(vocab)
                .int(runs)
                .double(sum_error(vocab));
            self.launch("sample_pick", [1, count, 1], 256, args)?;
            last_bounds = next;
        }
        if lists {
            let counts = self.device.take(4 * count * runs)?;
            let args = rows().memory(&last_bounds).memory(&counts).int(vocab).int(runs);
            self.launch("sample_count", many, 256, args)?;
            let args = rows()
                .memory(&last_bounds)
                .memory(&counts)
                .memory(&found)
                .memory_at(&found, 4 * FOUND * count)
                .int(vocab)
                .int(runs);
            self.launch("sample_gather", many, 256, args)?;
        }
        self.device.download(&found, words)
    }

    /// [`crate::backend::Backend::sample`].
    pub(super) fn choose(
        &self,
        logits: &CudaTensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        let vocab = logits.columns;
        if draws.is_empty() || vocab == 0 {
            return Ok(Vec::new());
        }
        let (penalised, whose) = self.penalised(logits, draws)?;
        let mut jobs = Jobs::default();
        let questions: Vec<Question> = draws.iter().map(|d| d.sampler.question(vocab, d.history)).collect();
        for (row, (draw, question)) in draws.iter().zip(&questions).enumerate() {
            let t = f64::from(draw.sampler.params().temperature);
            let from = (whose[row].unwrap_or(row), whose[row].is_some());
            match *question {
                // The host's; a job stands for it, so that rows and jobs agree.
                _ if draw.has_bias() => jobs.push(from, 0, 0, [1.0, 1.0, 1.0, 0.0]),
                Question::Largest => jobs.push(from, 0, 0, [1.0, 1.0, 1.0, 0.0]),
                Question::Few { top_k, min_p } => {
                    let ln = if min_p > 0.0 { f64::from(min_p).ln() } else { 1.0 };
                    jobs.push(from, CANDIDATES, top_k, [t, ln, 1.0, 0.0])
                }
                Question::TopP(p) => jobs.push(from, SUMS | TOP_P | CANDIDATES, 0, [t, 1.0, f64::from(p), 0.0]),
                Question::At(point) => jobs.push(from, SUMS | DRAW, 0, [t, 1.0, 1.0, point]),
            };
        }
        // Log-probabilities are of the logits as they came.
        let mut reports = vec![None; draws.len()];
        for (row, (draw, report)) in draws.iter().zip(&mut reports).enumerate() {
            if let Some(count) = draw.sampler.params().logprobs.filter(|_| !draw.has_bias()) {
                let wants = if count > 0 { SUMS | CANDIDATES } else { SUMS };
                *report = Some(jobs.push((row, false), wants, count, [1.0, 1.0, 1.0, 0.0]));
            }
        }
        let answers = self.answer(logits, penalised.as_ref(), &jobs)?;
        let found = |job: usize| Found {
            words: &answers[FOUND * job..][..FOUND],
            few: answers.get(FOUND * jobs.count + 2 * FEW * job..).map_or(&[], |w| &w[..w.len().min(2 * FEW)]),
        };
        let error = sum_error(vocab);
        // The token; `None`: the host must look at the whole row.
        let mut choose = |row: usize| -> Option<u32> {
            let (found, draw) = (found(row), &draws[row]);
            let mut of_few =
                |total| draw.sampler.choose_of(&found.few()?, found.largest(), total, draw.history, scratch);
            match questions[row] {
                _ if !found.is_well() || draw.has_bias() => None,
                Question::Largest => Some(found.words[1]),
                Question::Few { .. } => of_few(None),
                Question::TopP(_) => of_few(Some((found.total(), error * found.total()))),
                Question::At(_) => found.sure_draw(),
            }
        };
        let chosen: Vec<Option<u32>> = (0..draws.len()).map(&mut choose).collect();
        let asked = chosen.iter().enumerate().filter(|(row, _)| reports[*row].is_some());
        let places: Vec<(usize, u32)> = asked.filter_map(|(row, token)| Some((row, (*token)?))).collect();
        let values = self.logits_at(logits, &places)?;
        let ranks = self.ranks(logits, &places, &values)?;
        let report = |row: usize, token: u32| -> Option<Sampled> {
            let Some(job) = reports[row] else {
                return Some(Sampled { token, logprob: None, rank: None, top_logprobs: Vec::new() });
            };
            let (found, count) = (found(job), draws[row].sampler.params().logprobs?);
            let place = places.iter().position(|p| p.0 == row)?;
            let (logit, rank) = (values[place], Some(ranks[place]));
            let of = |logit| sure_log_prob(logit, found.largest(), found.total(), error);
            let largest = if count > 0 { largest_of(&found.few()?, count) } else { Vec::new() };
            let top: Option<_> = largest.iter().map(|&(token, logit)| Some((token, of(logit)?))).collect();
            Some(Sampled { token, logprob: Some(of(logit)?), rank, top_logprobs: top? })
        };
        let finish = |(row, token): (usize, &Option<u32>)| match token.and_then(|token| report(row, token)) {
            Some(sampled) => Ok(Ok(sampled)),
            None => Ok(draws[row].choose(&self.row(logits, row)?, scratch)),
        };
        chosen.iter().enumerate().map(finish).collect()
    }
}
