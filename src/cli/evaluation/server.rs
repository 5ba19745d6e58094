//! Options of `recoup eval` for a model behind a URL.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use recoup_eval::scores::ModelFacts;
use recoup_openai::{ApiKey, Fields, OpenAi, Options};
use serde_json::{Map, Value, json};

use super::super::options::at_least_one;
use crate::evaluate::evaluation::Subject;

#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Of a URL")]
pub(super) struct UrlArgs {
    /// Model name on the server [default: its only one]
    #[arg(long, value_name = "NAME")]
    served_model: Option<String>,
    /// Requests under way at once [default: 4]
    #[arg(long, value_name = "N", value_parser = at_least_one::<u64>)]
    concurrency: Option<u64>,
    /// Seconds that one request may take [default: 300]
    #[arg(long, value_name = "SECONDS", value_parser = at_least_one::<u64>)]
    timeout: Option<u64>,
    /// Further tries of a request that failed for a reason that may pass, with waits of 0.5 s, 1 s, 2 s, … 60 s or what the
    /// server asks for [default: 8]
    #[arg(long, value_name = "N")]
    retries: Option<usize>,
    /// Text before everything that is scored: the model's BOS token, for servers that do not add it
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Further fields of every request, as JSON: '{"provider": {"order": ["x"]}}'
    #[arg(long, value_name = "JSON")]
    extra_body: Option<String>,
    /// Fields to leave out of every request, such as temperature
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    omit_field: Vec<String>,
    /// Fields to send by another name, such as max_tokens=max_completion_tokens
    #[arg(long, value_delimiter = ',', value_name = "OLD=NEW")]
    rename_field: Vec<String>,
    /// Certificates (PEM) to trust instead of the public authorities', for https
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl UrlArgs {
    /// Those given, which mean nothing for a model that runs here.
    pub(super) fn given(&self) -> Vec<&'static str> {
        let all = [
            ("--served-model", self.served_model.is_some()),
            ("--concurrency", self.concurrency.is_some()),
            ("--timeout", self.timeout.is_some()),
            ("--retries", self.retries.is_some()),
            ("--prefix", self.prefix.is_some()),
            ("--extra-body", self.extra_body.is_some()),
            ("--omit-field", !self.omit_field.is_empty()),
            ("--rename-field", !self.rename_field.is_empty()),
            ("--ca-file", self.ca_file.is_some()),
        ];
        all.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect()
    }

    fn fields(&self) -> Result<Fields> {
        let extra = match &self.extra_body {
            None => serde_json::Map::new(),
            Some(text) => match serde_json::from_str(text) {
                Ok(Value::Object(fields)) => fields,
                Ok(other) => bail!("--extra-body: expected a JSON object, such as {{\"top_k\": 5}}, found {other}"),
                Err(e) => bail!("--extra-body: no JSON: {e}"),
            },
        };
        let rename = self.rename_field.iter().map(|pair| match pair.split_once('=') {
            Some((old, new)) if !old.trim().is_empty() && !new.trim().is_empty() => {
                Ok((old.trim().to_owned(), new.trim().to_owned()))
            }
            _ => bail!("--rename-field {pair}: expected OLD=NEW"),
        });
        let omit = self.omit_field.iter().map(|name| name.trim().to_owned()).collect();
        Ok(Fields { extra, rename: rename.collect::<Result<_>>()?, omit })
    }

    /// The server at `address`, which is asked as `chat` says and with these `arguments` of the chat template; with what
    /// tells it from others. `served`: its model where no option names one; else it is asked.
    pub(super) fn connect(
        &self,
        address: &str,
        served: Option<&str>,
        chat: bool,
        arguments: Map<String, Value>,
    ) -> Result<(OpenAi, Subject)> {
        let default = Options::default();
        let mut fields = self.fields()?;
        // vLLM's, SGLang's and llama.cpp's name for it.
        if !arguments.is_empty() && fields.extra.insert("chat_template_kwargs".into(), arguments.into()).is_some() {
            bail!("chat_template_kwargs: given by --extra-body and by options of their own");
        }
        let options = Options {
            model: self.served_model.clone().or(served.map(str::to_owned)),
            api_key: ApiKey::from_env(),
            concurrency: self.concurrency.map_or(default.concurrency, |n| n.try_into().unwrap_or(usize::MAX)),
            timeout: self.timeout.map_or(default.timeout, Duration::from_secs),
            retries: self.retries.unwrap_or(default.retries),
            prefix: self.prefix.clone().unwrap_or_default(),
            chat,
            fields: fields.clone(),
            ca_file: self.ca_file.clone(),
            notice: Some(|text| super::super::say!("{text}")),
        };
        let server = OpenAi::new(address, options)?;
        let address = server.address();
        let name = format!("{} at {address}", server.model());
        // Null where nothing is asked for: answers of runs before there were such options go on.
        let some = |value: Value| if value.as_object().is_some_and(|o| o.is_empty()) { Value::Null } else { value };
        let omitted: Vec<&String> = fields.omit.iter().collect();
        let identity = json!({"url": address, "served_model": server.model(),
            "prefix": self.prefix.as_deref().unwrap_or(""),
            "extra_body": some(json!(fields.extra)), "rename_field": some(json!(fields.rename)),
            "omit_field": if omitted.is_empty() { Value::Null } else { json!(omitted) }});
        let facts = ModelFacts { name, ..ModelFacts::default() };
        Ok((server, Subject { facts, identity, notes: Vec::new() }))
    }
}
