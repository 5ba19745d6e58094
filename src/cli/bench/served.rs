//! `recoup bench URL`: how fast a server answers, at each number of clients or rate of requests.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use recoup_openai::{ApiKey, OpenAi, Options};
use serde_json::{Value, json};

use super::super::options::{at_least_one, server_address};
use crate::evaluate::bench::served::{Arrivals, Latency, Level, Served, Target, Workload};
use crate::output;

/// Requests of a run that arrive at a rate, unless said.
const REQUESTS_AT_A_RATE: usize = 64;

#[derive(clap::Args)]
#[command(next_help_heading = "Of a URL")]
pub(super) struct UrlArgs {
    /// Clients at once, each of which asks again when it has its answer [default: 1,4,16]
    #[arg(long, alias = "max-concurrency", value_delimiter = ',', value_name = "N", value_parser = at_least_one::<usize>)]
    concurrency: Vec<usize>,
    /// Instead: requests a second, at random times, whether or not the server keeps up
    #[arg(long, value_delimiter = ',', value_name = "R", conflicts_with = "concurrency")]
    request_rate: Vec<f64>,
    /// Requests of a run: of each client [default: 4], or in all at a rate [default: 64]
    #[arg(long, alias = "num-prompts", value_name = "N", value_parser = at_least_one::<usize>)]
    requests: Option<usize>,
    /// Latencies in ms that a request must keep to count as good: ttft, tpot, e2el, as in ttft:500 tpot:50
    #[arg(long, value_delimiter = ',', num_args = 1.., value_name = "LATENCY:MS")]
    goodput: Vec<Target>,
    /// Ask by /v1/chat/completions instead of /v1/completions
    #[arg(long)]
    chat: bool,
    /// Model name on the server [default: its only one]
    #[arg(long, value_name = "NAME")]
    served_model: Option<String>,
    /// Seconds that one request may take [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = at_least_one::<u64>)]
    timeout: Option<u64>,
    /// Certificates (PEM) to trust instead of the public authorities', for https
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl UrlArgs {
    /// Those given, which mean nothing for a model that runs here.
    pub(super) fn given(&self) -> Option<&'static str> {
        let all = [
            ("--concurrency", !self.concurrency.is_empty()),
            ("--request-rate", !self.request_rate.is_empty()),
            ("--requests", self.requests.is_some()),
            ("--goodput", !self.goodput.is_empty()),
            ("--chat", self.chat),
            ("--served-model", self.served_model.is_some()),
            ("--timeout", self.timeout.is_some()),
            ("--ca-file", self.ca_file.is_some()),
        ];
        all.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }

    fn arrivals(&self) -> Result<Vec<Arrivals>> {
        if let Some(rate) = self.request_rate.iter().find(|r| !(r.is_finite() && **r > 0.0)) {
            bail!("--request-rate {rate}: expected requests a second, more than 0");
        }
        let clients = if self.concurrency.is_empty() { &[1, 4, 16] } else { &self.concurrency[..] };
        Ok(match self.request_rate.is_empty() {
            true => clients.iter().map(|n| Arrivals::Clients(*n)).collect(),
            false => self.request_rate.iter().map(|r| Arrivals::Rate(*r)).collect(),
        })
    }
}

/// Measures the server at `url` with prompts of each of `prompts` tokens.
pub(super) fn run(url: &str, args: &UrlArgs, common: &super::Args) -> Result<ExitCode> {
    let arrivals = args.arrivals()?;
    let options = Options {
        model: args.served_model.clone(),
        api_key: ApiKey::from_env(),
        timeout: Duration::from_secs(args.timeout.unwrap_or(600)),
        chat: args.chat,
        ca_file: args.ca_file.clone(),
        ..Options::default()
    };
    let server = OpenAi::new(&server_address(url)?, options)?;
    let claim = common.output.as_deref().map(output::file).transpose()?;
    let mut cases: Vec<(Workload, Vec<Level>)> = Vec::new();
    for prompt in &common.prompt {
        let at_a_rate = !args.request_rate.is_empty();
        let workload = Workload {
            prompt: *prompt,
            generate: common.generate,
            requests: args.requests.unwrap_or(if at_a_rate { REQUESTS_AT_A_RATE } else { 4 }),
            repeats: common.repeats,
            targets: args.goodput.clone(),
        };
        let served = Served::new(&server, workload.clone())?;
        let all: usize = arrivals.iter().map(|a| served.requests(*a) * workload.repeats).sum();
        let bar = super::super::progress(all as u64, format!("prompts of {prompt} tokens"));
        let levels = arrivals.iter().map(|a| served.measure(*a, &mut || bar.inc(1))).collect::<Result<_, _>>();
        bar.finish();
        cases.push((workload, levels?));
    }
    let report = json(&server, &cases);
    if let Some(claim) = &claim {
        claim.write(&format!("{report:#}\n"))?;
        super::super::say!("wrote {}", claim.target().display());
    }
    if common.json {
        super::super::outln!("{report:#}");
    } else {
        super::super::outln!("{} at {}", server.model(), server.address());
        for (workload, levels) in &cases {
            super::super::outln!("{}", text(workload, levels));
        }
    }
    super::super::done()
}

fn json(server: &OpenAi, cases: &[(Workload, Vec<Level>)]) -> Value {
    let cases: Vec<Value> = cases
        .iter()
        .map(|(workload, levels)| {
            let targets: Vec<Value> = workload
                .targets
                .iter()
                .map(|t| json!({"latency": t.latency.name(), "milliseconds": t.milliseconds}))
                .collect();
            json!({"prompt_tokens": workload.prompt, "generated_tokens": workload.generate,
                "repeats": workload.repeats, "goodput": targets,
                "levels": levels.iter().map(|l| l.json(workload)).collect::<Vec<Value>>()})
        })
        .collect();
    json!({"model_id": server.model(), "url": server.address(), "recoup_version": env!("CARGO_PKG_VERSION"), "cases": cases})
}

fn text(workload: &Workload, levels: &[Level]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    let by = if matches!(levels.first().map(|l| l.arrivals), Some(Arrivals::Rate(_))) { "rate" } else { "clients" };
    let mut header = vec![by, "tokens/s", "requests/s"];
    if !workload.targets.is_empty() {
        header.push("good/s");
    }
    header.extend(["first token p50", "p90", "p99", "each token p50", "p90", "p99", "gap p99", "whole p50", "p99"]);
    table.set_header(header);
    let mut notes = Vec::new();
    for level in levels {
        let mut row = vec![
            level.arrivals.to_string(),
            format!("{:.1}", level.tokens_per_second()),
            format!("{:.2}", level.requests_per_second()),
        ];
        row.extend(level.goodput(&workload.targets).map(|g| format!("{g:.2}")));
        let mut add = |latency: Latency, shown: &[usize]| {
            let spread = level.latency(latency).map(|s| [s.p50, s.p90, s.p99]);
            row.extend(shown.iter().map(|i| spread.map_or_else(|| "-".into(), |s| milliseconds(s[*i]))));
        };
        add(Latency::First, &[0, 1, 2]);
        add(Latency::Each, &[0, 1, 2]);
        add(Latency::Between, &[2]);
        add(Latency::Whole, &[0, 2]);
        table.add_row(row);
        let at = format!("at {} {}", level.arrivals, if by == "rate" { "requests" } else { "clients" });
        if level.failed() > 0 {
            let asked = level.failed() + level.completed();
            notes.push(format!("{at}, {} of {asked} requests failed: {}", level.failed(), level.errors().join("; ")));
        }
        if level.short(workload.generate) > 0 {
            let (short, all) = (level.short(workload.generate), level.completed());
            notes.push(format!("{at}, {short} of {all} answers ended before their {} tokens", workload.generate));
        }
    }
    let prompts: Option<Vec<f64>> =
        levels.iter().map(|l| l.prompt_tokens().map(|tokens| tokens as f64 / l.completed() as f64)).collect();
    let prompts = match prompts.filter(|p| !p.is_empty()) {
        Some(p) => format!("prompts of {:.0} tokens", p.iter().sum::<f64>() / p.len() as f64),
        None => format!("prompts of about {} tokens (the server does not count them)", workload.prompt),
    };
    let notes: String = notes.iter().map(|note| format!("\nnote: {note}")).collect();
    format!(
        "\n{prompts}, answers of {}; medians of {} runs, latencies of all requests\n{table}{notes}",
        workload.generate, workload.repeats
    )
}

fn milliseconds(ms: f64) -> String {
    if ms < 100.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}
