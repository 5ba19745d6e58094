//! What is measured while serving, under vLLM's names, so that its dashboards, autoscalers and routers work here.
//!
//! Source: vLLM, v1/metrics/loggers.py, as documented for 0.11 and later.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};

use crate::engine::Stats;

/// Boundaries of times, in seconds, from milliseconds to minutes.
const TIMES: [f64; 16] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0];

/// Boundaries of numbers of tokens.
const TOKENS: [f64; 15] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 50_000.0, 100_000.0];

/// A measure, and what of an engine it tells.
type Told<M, V> = (M, fn(&Stats) -> V);

/// The measures of all models.
pub struct Metrics {
    registry: Registry,
    /// One at a time takes over what the engines count.
    taking: Mutex<()>,
    gauges: Vec<Told<GaugeVec, f64>>,
    counters: Vec<Told<IntCounterVec, u64>>,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    success: IntCounterVec,
    refused: IntCounterVec,
    first_token: HistogramVec,
    next_token: HistogramVec,
    whole: HistogramVec,
    prefill: HistogramVec,
    decode: HistogramVec,
    prompt_length: HistogramVec,
    answer_length: HistogramVec,
}

/// Those of one model.
#[derive(Clone)]
pub struct ModelMetrics {
    name: String,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    refused: IntCounter,
    first_token: Histogram,
    next_token: Histogram,
    whole: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_length: Histogram,
    answer_length: Histogram,
}

impl Metrics {
    /// Nothing measured yet.
    ///
    /// # Errors
    /// Never, as the names are different and well formed.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntCounterVec> {
            let made = IntCounterVec::new(Opts::new(format!("vllm:{name}"), help), labels)?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let gauge = |name: &str, help: &str| -> prometheus::Result<GaugeVec> {
            let made = GaugeVec::new(Opts::new(format!("vllm:{name}"), help), &["model_name"])?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> prometheus::Result<HistogramVec> {
            let options = HistogramOpts::new(format!("vllm:{name}"), help).buckets(buckets.to_vec());
            let made = HistogramVec::new(options, &["model_name"])?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let share = |s: &Stats| if s.pages == 0 { 0.0 } else { s.pages_used as f64 / s.pages as f64 };
        let gauges: Vec<Told<GaugeVec, f64>> = vec![
            (gauge("num_requests_running", "Sequences that run.")?, |s| s.running as f64),
            (gauge("num_requests_waiting", "Sequences that wait for their turn.")?, |s| s.waiting as f64),
            (gauge("kv_cache_usage_perc", "Share of the KV cache that sequences hold; 1 is all.")?, share),
            (gauge("kv_cache_pages_kept", "Pages kept for sequences to come (not of vLLM).")?, |s| s.pages_kept as f64),
        ];
        let model = &["model_name"][..];
        let counters: Vec<Told<IntCounterVec, u64>> = vec![
            (counter("prefix_cache_queries_total", "Tokens looked for in the prefix cache.", model)?, |s| {
                s.prefix_asked
            }),
            (counter("prefix_cache_hits_total", "Tokens found in the prefix cache.", model)?, |s| s.prefix_found),
            (counter("num_preemptions_total", "Sequences that had to give way.", model)?, |s| s.preemptions),
            (counter("spec_decode_num_draft_tokens_total", "Tokens that were guessed.", model)?, |s| s.drafted),
            (counter("spec_decode_num_accepted_tokens_total", "Guessed tokens that were right.", model)?, |s| {
                s.accepted
            }),
        ];
        Ok(Self {
            gauges,
            counters,
            prompt_tokens: counter("prompt_tokens_total", "Tokens of prompts.", model)?,
            generation_tokens: counter("generation_tokens_total", "Tokens generated.", model)?,
            success: counter("request_success_total", "Answers that ended.", &["model_name", "finished_reason"])?,
            refused: counter("requests_refused_total", "Requests refused, the queue being full (not of vLLM).", model)?,
            first_token: histogram("time_to_first_token_seconds", "From the request to its first token.", &TIMES)?,
            next_token: histogram("inter_token_latency_seconds", "From one token to the next.", &TIMES)?,
            whole: histogram("e2e_request_latency_seconds", "From the request to the end of its answer.", &TIMES)?,
            prefill: histogram(
                "request_prefill_time_seconds",
                "From the engine's first sight to the first token.",
                &TIMES,
            )?,
            decode: histogram("request_decode_time_seconds", "From the first token to the last.", &TIMES)?,
            prompt_length: histogram("request_prompt_tokens", "Tokens of a prompt.", &TOKENS)?,
            answer_length: histogram("request_generation_tokens", "Tokens of an answer.", &TOKENS)?,
            registry: registry.clone(),
            taking: Mutex::default(),
        })
    }

    /// Those of the model of this name.
    #[must_use]
    pub fn of(&self, name: &str) -> ModelMetrics {
        let of = |all: &HistogramVec| all.with_label_values(&[name]);
        for reason in ["stop", "length", "abort", "error"] {
            self.success.with_label_values(&[name, reason]);
        }
        ModelMetrics {
            name: name.to_owned(),
            prompt_tokens: self.prompt_tokens.with_label_values(&[name]),
            generation_tokens: self.generation_tokens.with_label_values(&[name]),
            success: self.success.clone(),
            refused: self.refused.with_label_values(&[name]),
            first_token: of(&self.first_token),
            next_token: of(&self.next_token),
            whole: of(&self.whole),
            prefill: of(&self.prefill),
            decode: of(&self.decode),
            prompt_length: of(&self.prompt_length),
            answer_length: of(&self.answer_length),
        }
    }

    /// All of it as text; `engines`: what the engine of each model is at.
    #[must_use]
    pub fn text(&self, engines: &[(&str, Stats)]) -> String {
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, stats) in engines {
            for (gauge, value) in &self.gauges {
                let gauge: Gauge = gauge.with_label_values(&[name]);
                gauge.set(value(stats));
            }
            for (counter, value) in &self.counters {
                let counter: IntCounter = counter.with_label_values(&[name]);
                counter.inc_by(value(stats).saturating_sub(counter.get()));
            }
        }
        let mut text = Vec::new();
        // Writing into memory does not fail.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl ModelMetrics {
    /// A request was refused because too many wait.
    pub fn refused(&self) {
        self.refused.inc();
    }

    /// A sequence ended: stop, length, abort or error.
    pub fn ended(&self, reason: &str) {
        self.success.with_label_values(&[&self.name, reason]).inc();
    }

    /// The first token of an answer came, so long after the request of `prompt` tokens.
    pub fn first_token(&self, after: Duration, prompt: usize) {
        self.first_token.observe(after.as_secs_f64());
        self.prompt_tokens.inc_by(prompt as u64);
        self.generation_tokens.inc();
    }

    /// Another token came.
    pub fn next_token(&self, after: Duration) {
        self.next_token.observe(after.as_secs_f64());
        self.generation_tokens.inc();
    }

    /// An answer of `tokens` tokens is complete.
    pub fn answered(&self, whole: Duration, prefill: Duration, decode: Duration, prompt: usize, tokens: usize) {
        self.whole.observe(whole.as_secs_f64());
        self.prefill.observe(prefill.as_secs_f64());
        self.decode.observe(decode.as_secs_f64());
        self.prompt_length.observe(prompt as f64);
        self.answer_length.observe(tokens as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_counts_is_told_once_however_often_it_is_asked() {
        let metrics = Metrics::new().unwrap();
        let model = metrics.of("m");
        model.first_token(Duration::from_millis(20), 7);
        model.next_token(Duration::from_millis(2));
        model.ended("stop");
        let stats = Stats { running: 2, pages_used: 5, pages: 10, prefix_asked: 9, ..Stats::default() };
        let _ = metrics.text(&[("m", stats)]);
        let text = metrics.text(&[("m", stats)]);
        for line in [
            "vllm:num_requests_running{model_name=\"m\"} 2",
            "vllm:kv_cache_usage_perc{model_name=\"m\"} 0.5",
            "vllm:prefix_cache_queries_total{model_name=\"m\"} 9",
            "vllm:prompt_tokens_total{model_name=\"m\"} 7",
            "vllm:generation_tokens_total{model_name=\"m\"} 2",
            "vllm:request_success_total{finished_reason=\"stop\",model_name=\"m\"} 1",
            "vllm:request_success_total{finished_reason=\"abort\",model_name=\"m\"} 0",
            "vllm:time_to_first_token_seconds_count{model_name=\"m\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
    }
}
