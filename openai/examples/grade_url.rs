//! Scores multiple-choice documents on an OpenAI-compatible server and prints every log-likelihood:
//! `grade_url URL DOCUMENTS.jsonl COUNT [PREFIX]`, each document with `query` and
//! `choices`, joined by a space.

use std::error::Error;
use std::ops::ControlFlow;

use recoup_ground::model::{LanguageModel, Request, Response};
use recoup_openai::{ApiKey, OpenAi, Options};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().ok_or_else(|| format!("{what} is missing"));
    let (url, path, count) = (next("URL")?, next("DOCUMENTS.jsonl")?, next("COUNT")?.parse()?);
    let prefix = next("PREFIX").unwrap_or_default();

    let mut requests = Vec::new();
    for line in std::fs::read_to_string(path)?.lines().take(count) {
        let document: Value = serde_json::from_str(line)?;
        let context = document["query"].as_str().ok_or("a document has no `query`")?.to_owned();
        for choice in document["choices"].as_array().ok_or("a document has no `choices`")? {
            let continuation = format!(" {}", choice.as_str().ok_or("a choice is no text")?);
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
