//! Scores multiple-choice documents on an OpenAI-compatible server and prints every log-likelihood:
//! `grade_url URL DOCUMENTS.jsonl COUNT [PREFIX]`, documents in HellaSwag's form (`activity_label`, `ctx_a`, `ctx_b`, `endings`,
//! `label`).

use std::error::Error;
use std::ops::ControlFlow;

use recoup_eval::openai::{ApiKey, OpenAi, Options};
use recoup_eval::{LanguageModel, Request, Response};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().ok_or_else(|| format!("{what} is missing"));
    let (url, path, count) = (next("URL")?, next("DOCUMENTS.jsonl")?, next("COUNT")?.parse()?);
    let prefix = next("PREFIX").unwrap_or_default();

    let mut requests = Vec::new();
    for line in std::fs::read_to_string(path)?.lines().take(count) {
        let document: Value = serde_json::from_str(line)?;
        let field = |name: &str| document[name].as_str().unwrap_or_default();
        let context = format!("{}: {} {}", field("activity_label"), field("ctx_a"), field("ctx_b"));
        for ending in document["endings"].as_array().into_iter().flatten() {
            let continuation = format!(" {}", ending.as_str().unwrap_or_default());
            requests.push(Request::LogLikelihood { context: context.clone(), continuation });
        }
    }
    let mut model = OpenAi::new(&url, Options { api_key: ApiKey::from_env(), prefix, ..Options::default() })?;
    let mut responses = vec![None; requests.len()];
    model.answer(&requests, &mut |index, response| {
        responses[index] = Some(response);
        ControlFlow::Continue(())
    })?;
    for (request, response) in requests.iter().zip(responses) {
        if let (
            Request::LogLikelihood { context, continuation },
            Some(Response::LogLikelihood { log_likelihood, is_greedy }),
        ) = (request, response)
        {
            println!(
                "{}",
                json!({"context": context, "continuation": continuation, "log_likelihood": log_likelihood,
                "is_greedy": is_greedy})
            );
        }
    }
    Ok(())
}
