//! The client of OpenAI-compatible servers against a server that computes exactly and misbehaves as told.

use std::ops::ControlFlow;
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Echo, Quirks, Reply, Server, bigram, expected, greedy, tokenize};
use recoup_ground::http::Broken;
use recoup_ground::model::{GenerationOptions, LanguageModel, Message, Prompts as _, Request, Response};
use recoup_openai::{ApiKey, Asked, Error, Fault, Fields, OpenAi, Options, Tally};
use serde_json::json;

/// Longer than the slowest machine takes for an answer: only a test that waits for it ever sees a time-out.
const NEVER: Duration = Duration::from_secs(3600);

fn options() -> Options {
    Options { model: Some("bigram".into()), retries: 0, timeout: NEVER, ..Options::default() }
}

fn model(server: &Server, options: Options) -> OpenAi {
    OpenAi::new(&server.url, options).unwrap()
}

fn log_likelihood(context: &str, continuation: &str) -> Request {
    Request::LogLikelihood { context: context.into(), continuation: continuation.into() }
}

fn rolling(text: &str) -> Request {
    Request::Rolling { text: text.into() }
}

fn generate(context: &str, options: GenerationOptions) -> Request {
    Request::Generate { context: context.into(), options }
}

/// All answers in the order of the requests, those that came before an error too.
fn ask(model: &mut OpenAi, requests: &[Request]) -> (Vec<Option<Response>>, Result<(), Error>) {
    let mut responses = vec![None; requests.len()];
    let result = model.answer(requests, &mut |index, response| {
        assert!(responses[index].replace(response).is_none(), "answered twice");
        ControlFlow::Continue(())
    });
    (responses, result)
}

fn ask_all(model: &mut OpenAi, requests: &[Request]) -> Vec<Response> {
    let (responses, result) = ask(model, requests);
    result.unwrap();
    responses.into_iter().map(Option::unwrap).collect()
}

fn one(server: &Server, options: Options, request: Request) -> Result<Response, Error> {
    let (mut responses, result) = ask(&mut model(server, options), &[request]);
    result.map(|()| responses.pop().flatten().unwrap())
}

/// The fault of one request.
fn fault(server: &Server, request: Request) -> Fault {
    one(server, options(), request).unwrap_err().fault
}

fn close(response: &Response, (sum, greedy): (f64, bool)) {
    match response {
        Response::LogLikelihood { log_likelihood, is_greedy } => {
            assert!((log_likelihood - sum).abs() < 1e-9, "{log_likelihood} instead of {sum}");
            assert_eq!(*is_greedy, greedy);
        }
        other => panic!("{other:?}"),
    }
}

/// Contexts and continuations whose boundary falls on a token, once white space at a context's end has moved over.
const PAIRS: [(&str, &str); 6] = [
    ("The cat", " sat on the mat"),
    ("The cat ", "sat"),
    ("Thé cat", " sät on"),
    ("The café", "é"),
    ("a", "\n"),
    ("The fox", ""),
];

#[test]
fn log_likelihoods_are_the_models_own_whatever_the_servers_dialect() {
    for quirks in [
        Quirks::default(),
        Quirks { echo: Echo::Objects, ..Quirks::default() },
        Quirks { bos: true, ..Quirks::default() },
        Quirks { hidden_bos: true, broken: "\u{fffd}", ..Quirks::default() },
        Quirks { broken: "bytes:\\xc3", ..Quirks::default() },
    ] {
        let server = Server::bigram(quirks);
        let requests: Vec<_> = PAIRS.iter().map(|(a, b)| log_likelihood(a, b)).collect();
        let (responses, result) = ask(&mut model(&server, options()), &requests);
        result.unwrap();
        for ((context, continuation), response) in PAIRS.iter().zip(responses) {
            let tokens = tokenize(&format!("{context}{continuation}"));
            close(&response.unwrap(), expected(&tokens, tokenize(context.trim_end()).len()));
        }
    }
}

#[test]
fn a_token_that_holds_the_boundary_counts_to_the_continuation() {
    let server = Server::bigram(Quirks::default());
    let response = one(&server, options(), log_likelihood("The cat t", "he")).unwrap();
    close(&response, expected(&tokenize("The cat the"), 2));
}

#[test]
fn the_models_own_continuation_is_greedy() {
    let server = Server::bigram(Quirks::default());
    let response = one(&server, options(), log_likelihood("The cat", &greedy("The cat", 3))).unwrap();
    assert!(matches!(response, Response::LogLikelihood { is_greedy: true, .. }));
}

#[test]
fn without_usage_plain_texts_are_scored_and_split_characters_refused() {
    let server = Server::bigram(Quirks { no_usage: true, ..Quirks::default() });
    let response = one(&server, options(), log_likelihood("The", " cat")).unwrap();
    close(&response, expected(&tokenize("The cat"), 1));
    assert!(matches!(fault(&server, log_likelihood("The caf", "é")), Fault::Misaligned(_)));
}

#[test]
fn a_continuation_after_nothing_needs_a_prefix() {
    let server = Server::bigram(Quirks::default());
    let text = "The cat";
    assert!(matches!(fault(&server, log_likelihood("", text)), Fault::NothingBefore { token } if token == "The"));
    assert!(matches!(fault(&server, log_likelihood(" ", "cat")), Fault::NothingBefore { .. }));
    let prefixed = Options { prefix: "|".into(), ..options() };
    let response = one(&server, prefixed, log_likelihood("", text)).unwrap();
    close(&response, expected(&tokenize("|The cat"), 1));
    // A server that puts BOS there itself needs none.
    let server = Server::bigram(Quirks { bos: true, ..Quirks::default() });
    assert!(one(&server, options(), log_likelihood("", text)).is_ok());
}

#[test]
fn a_rolling_log_likelihood_is_that_of_the_whole_text() {
    let text = "The cat sat on the mat. Thé fox\n";
    let all = tokenize(text).len();
    for (quirks, prefix, counted) in [
        (Quirks::default(), "", all - 1),
        (Quirks::default(), "|", all),
        (Quirks { hidden_bos: true, ..Quirks::default() }, "", all),
    ] {
        let server = Server::bigram(quirks);
        let response = one(&server, Options { prefix: prefix.into(), ..options() }, rolling(text)).unwrap();
        let Response::Rolling { log_likelihood, tokens } = response else { panic!("{response:?}") };
        assert_eq!(tokens, Some(counted));
        if !quirks.hidden_bos {
            let tokens = tokenize(&format!("{prefix}{text}"));
            assert!((log_likelihood - expected(&tokens, tokens.len() - counted).0).abs() < 1e-9);
        }
    }
}

#[test]
fn a_text_beyond_the_context_is_cut_and_loses_no_token() {
    // Every byte is a token here, and a bigram model looks at one token, which every piece has before it: the sum is that
    // of the whole.
    let words: String = (10..90).map(|n| format!("{n} ")).collect();
    for text in [words, "ab".repeat(120)] {
        let tokens = tokenize(&text);
        assert_eq!(tokens.len(), text.len());
        let server = Server::bigram(Quirks { context: Some(80), ..Quirks::default() });
        let Response::Rolling { log_likelihood, tokens: Some(counted) } =
            one(&server, options(), rolling(&text)).unwrap()
        else {
            panic!()
        };
        assert_eq!(counted, tokens.len() - 1);
        assert!((log_likelihood - expected(&tokens, 1).0).abs() < 1e-9);
        let pieces = server.seen().iter().filter(|s| s.body["echo"] == json!(true)).count();
        assert!(pieces > 4, "{pieces}");
    }
    // What cannot be cut further is refused.
    let server = Server::start(|_, request| match request.body["prompt"].as_str() {
        Some("Z") => Reply::Json(400, json!({"error": "the request exceeds the available context size"})),
        _ => bigram(request, &Quirks::default()),
    });
    let error = one(&server, options(), rolling("Z")).unwrap_err();
    assert!(matches!(error, Error { asked: Asked::Request(0), fault: Fault::TooLong(_), .. }), "{error}");
}

#[test]
fn servers_that_cannot_score_are_refused_not_scored() {
    let request = || log_likelihood("The cat", " sat");
    let with = |echo| Server::bigram(Quirks { echo, ..Quirks::default() });
    assert!(matches!(fault(&with(Echo::Ignored), request()), Fault::NoEcho { .. }));
    assert!(matches!(fault(&with(Echo::TextOnly), request()), Fault::NoPromptLogProbs { .. }));
    assert!(matches!(fault(&with(Echo::Nulls), request()), Fault::NoPromptLogProbs { .. }));
    assert!(matches!(fault(&with(Echo::NoTop), request()), Fault::NoPromptLogProbs { .. }));
    assert!(matches!(fault(&with(Echo::Shifted), request()), Fault::EchoContradicts { .. }));
    let error = one(&with(Echo::Ignored), options(), request()).unwrap_err();
    assert_eq!(error.asked, Asked::EchoCheck);
    assert!(error.to_string().contains("does not echo the prompt"), "{error}");
}

#[test]
fn refusals_of_echo_and_of_log_probabilities_say_so_without_further_tries() {
    for (status, message, no_echo) in [
        (400, "Only no echo is supported", true),
        (500, "Unsupported param: echo", true),
        (500, "logprobs is not supported for models created with logits_all=False", false),
    ] {
        let server = Server::start(move |_, _| Reply::Json(status, json!({"error": {"message": message}})));
        let fault = one(&server, Options { retries: 3, ..options() }, log_likelihood("a", "b")).unwrap_err().fault;
        assert_eq!(matches!(fault, Fault::NoEcho { .. }), no_echo, "{fault}");
        assert!(fault.to_string().contains(message));
        assert_eq!(server.seen().len(), 1);
    }
}

#[test]
fn a_server_that_generates_nothing_cannot_be_checked() {
    let empty = json!({"choices": [{"text": "", "finish_reason": "stop", "logprobs": null}]});
    let server = Server::start(move |_, _| Reply::Json(200, empty.clone()));
    assert!(matches!(fault(&server, rolling("The cat")), Fault::EchoUnchecked));
}

#[test]
fn a_request_beyond_the_context_is_named() {
    let server = Server::bigram(Quirks { context: Some(80), ..Quirks::default() });
    let long = log_likelihood(&"x".repeat(200), " the");
    let (_, result) = ask(&mut model(&server, options()), &[log_likelihood("The", " cat"), long]);
    let error = result.unwrap_err();
    assert_eq!(error.asked, Asked::Request(1));
    assert!(matches!(error.fault, Fault::TooLong(_)));
    assert!(error.to_string().starts_with("request 1 (http://127.0.0.1"), "{error}");
}

#[test]
fn generation_is_greedy_text_cut_at_the_stop_strings() {
    let server = Server::bigram(Quirks::default());
    let whole = greedy("The cat", 12);
    let options_of = |until: &[&str]| GenerationOptions {
        until: until.iter().map(|s| (*s).to_owned()).collect(),
        max_tokens: 12,
        ..GenerationOptions::default()
    };
    let response = one(&server, options(), generate("The cat", options_of(&[]))).unwrap();
    assert_eq!(response, Response::Generated { text: whole.clone(), tokens: Some(12), capped: true });
    // Five stop strings of which the API takes four: the fifth is cut here.
    let (at, last) = whole.char_indices().nth(5).unwrap();
    let last = last.to_string();
    let until = ["", "#1", "#2", "#3", "#4", last.as_str()];
    let end = whole.find(&last).unwrap();
    let response = one(&server, options(), generate("The cat", options_of(&until))).unwrap();
    assert_eq!(response, Response::Generated { text: whole[..end].to_owned(), tokens: Some(12), capped: false });
    assert!(end <= at);
    assert_eq!(server.seen().last().unwrap().body["stop"], json!(["#1", "#2", "#3", "#4"]));
}

#[test]
fn sampling_is_asked_for_only_where_there_is_any() {
    let server = Server::bigram(Quirks::default());
    let sampled = GenerationOptions {
        temperature: 0.7,
        top_p: 0.9,
        top_k: 20,
        seed: 3,
        max_tokens: 2,
        ..GenerationOptions::default()
    };
    let requests = [generate("a", GenerationOptions { max_tokens: 2, ..Default::default() }), generate("a", sampled)];
    let extra = json!({"min_tokens": 1}).as_object().unwrap().clone();
    ask(
        &mut model(&server, Options { concurrency: 1, fields: Fields { extra, ..Fields::default() }, ..options() }),
        &requests,
    )
    .1
    .unwrap();
    let bodies: Vec<_> = server.seen().into_iter().map(|s| s.body).collect();
    let neutral = json!({"model": "bigram", "prompt": "a", "max_tokens": 2, "temperature": 0.0, "repeat_penalty": 1.0,
        "repetition_penalty": 1.0, "min_tokens": 1});
    assert_eq!(bodies[0], neutral);
    for (field, value) in [("temperature", json!(0.7)), ("top_p", json!(0.9)), ("top_k", json!(20)), ("seed", json!(3))]
    {
        assert_eq!(bodies[1][field], value);
    }
    assert!(bodies[1].get("min_p").is_none());
}

#[test]
fn a_field_without_effect_that_the_server_refuses_is_left_out_from_then_on() {
    let server = Server::bigram(Quirks { refuses: Some("repetition_penalty"), ..Quirks::default() });
    let request = || generate("The", GenerationOptions { max_tokens: 1, ..GenerationOptions::default() });
    ask(&mut model(&server, Options { concurrency: 1, ..options() }), &[request(), request()]).1.unwrap();
    assert_eq!(server.seen().len(), 3);
    // One that asks for something is not.
    let server = Server::bigram(Quirks { refuses: Some("top_k"), ..Quirks::default() });
    let sampled = GenerationOptions { temperature: 1.0, top_k: 5, ..GenerationOptions::default() };
    assert!(matches!(fault(&server, generate("The", sampled)), Fault::Refused { status: 400, within: false, .. }));
}

#[test]
fn chat_mode_sends_the_messages_and_leaves_the_template_to_the_server() {
    let server = Server::start(|_, _| {
        let message = json!({"role": "assistant", "content": "4, of course"});
        Reply::Json(
            200,
            json!({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 9,
            "completion_tokens": 5}}),
        )
    });
    let mut model = model(&server, Options { chat: true, concurrency: 1, ..options() });
    let messages = [Message { role: "user".into(), content: "2 + 2?".into() }];
    let prompt = model.chat_prompt(&messages, false).unwrap();
    let until = vec![",".to_owned()];
    let requests = [
        generate(&prompt, GenerationOptions { until, ..GenerationOptions::default() }),
        generate(&(prompt.clone() + "It is "), GenerationOptions::default()),
    ];
    let (responses, result) = ask(&mut model, &requests);
    result.unwrap();
    assert_eq!(responses[0], Some(Response::Generated { text: "4".into(), tokens: Some(5), capped: false }));
    let seen = server.seen();
    assert_eq!(seen[0].path, "/v1/chat/completions");
    assert_eq!(seen[0].body["messages"], json!([{"role": "user", "content": "2 + 2?"}]));
    assert!(seen[0].body.get("continue_final_message").is_none());
    assert_eq!(seen[1].body["messages"][1], json!({"role": "assistant", "content": "It is "}));
    assert_eq!(seen[1].body["continue_final_message"], json!(true));
    let fault_of = |result: Result<(), Error>| result.unwrap_err().fault;
    assert!(matches!(fault_of(ask(&mut model, &[log_likelihood("a", "b")]).1), Fault::ChatScoring));
    assert!(matches!(fault_of(ask(&mut model, &[generate("a", GenerationOptions::default())]).1), Fault::NotChat));
}

#[test]
fn without_chat_mode_there_is_no_template() {
    let server = Server::bigram(Quirks::default());
    let error = model(&server, options()).chat_prompt(&[], false).unwrap_err();
    assert!(matches!(error.fault, Fault::NoTemplate) && error.asked == Asked::ChatPrompt);
}

#[test]
fn the_only_model_is_taken_and_several_are_listed() {
    let unnamed = || Options { model: None, ..options() };
    assert_eq!(model(&Server::bigram(Quirks::default()), unnamed()).model(), "bigram");
    let with = |ids: &[&str]| {
        let data: Vec<_> = ids.iter().map(|id| json!({"id": id})).collect();
        let server = Server::start(move |_, _| Reply::Json(200, json!({"data": data})));
        OpenAi::new(&server.url, unnamed()).err().unwrap()
    };
    assert!(with(&["a", "b"]).to_string().contains("2 models, name one of them: a, b"));
    assert!(matches!(with(&[]).fault, Fault::NoModel));
    let server = Server::start(|_, _| Reply::Json(200, json!({"models": []})));
    let error = OpenAi::new(&server.url, unnamed()).err().unwrap();
    assert!(matches!(error.fault, Fault::Unexpected(_)) && error.asked == Asked::Models);
}

#[test]
fn the_key_is_sent_and_never_shown() {
    let server = Server::start(|_, _| {
        Reply::Json(401, json!({"error": {"message": "Incorrect API key: sk-secret", "code": "invalid_api_key"}}))
    });
    let options = Options { api_key: Some(ApiKey::new("sk-secret")), ..options() };
    assert!(!format!("{options:?}").contains("secret"));
    let error = one(&server, options, rolling("a b")).unwrap_err();
    assert_eq!(server.seen()[0].authorization.as_deref(), Some("Bearer sk-secret"));
    let (shown, debugged) = (error.to_string(), format!("{error:?}"));
    assert!(!shown.contains("secret") && !debugged.contains("secret"), "{shown} {debugged}");
    assert!(shown.contains("Incorrect API key: (hidden) (invalid_api_key); set OPENAI_API_KEY"), "{shown}");
}

#[test]
fn each_way_to_fail_has_its_own_words() {
    let request = || generate("a", GenerationOptions::default());
    type Case = (fn() -> Reply, fn(&Fault) -> bool, &'static str);
    let cases: [Case; 8] = [
        (
            || Reply::Raw(200, "content-type: text/html\r\n", "<!DOCTYPE html><title>Hi".into()),
            |f| matches!(f, Fault::Html { .. }),
            "an HTML page instead of JSON (`<!DOCTYPE html><title>Hi`)",
        ),
        (|| Reply::Raw(200, "", "{\"choices\": oops".into()), |f| matches!(f, Fault::NotJson { .. }), "oops"),
        (|| Reply::Json(200, json!({"data": 1})), |f| matches!(f, Fault::Unexpected(_)), "choices"),
        (
            || Reply::Json(200, json!({"error": "no model loaded"})),
            |f| matches!(f, Fault::Refused { status: 502, within: true, .. }),
            "the server says: no model loaded",
        ),
        (
            || Reply::Json(404, json!({"detail": "Not Found"})),
            |f| matches!(f, Fault::Refused { status: 404, .. }),
            "Not Found",
        ),
        (
            || Reply::Raw(307, "location: /x\r\n", String::new()),
            |f| matches!(f, Fault::Refused { status: 307, within: false, .. }),
            "307",
        ),
        (|| Reply::Truncated, |f| matches!(f, Fault::Transport(Broken::Connection(_))), "the connection broke"),
        (|| Reply::Hangup, |f| matches!(f, Fault::Transport(Broken::Connection(_))), "did the server die?"),
    ];
    for (reply, is, words) in cases {
        let fault = fault(&Server::start(move |_, _| reply()), request());
        assert!(is(&fault) && fault.to_string().contains(words), "{fault:?}: {fault}");
    }
}

#[test]
fn an_address_without_v1_gets_a_hint() {
    let server = Server::bigram(Quirks::default());
    let base = server.url.strip_suffix("/v1").unwrap();
    let error = OpenAi::new(base, Options { model: None, ..options() }).err().unwrap();
    assert!(error.to_string().ends_with("the address has no /v1 at its end: is it missing?"), "{error}");
}

#[test]
fn a_closed_port_is_a_refused_connection() {
    // The near end of a connection: nobody else is given the port while it lives, and nobody listens at it.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let port = taken.local_addr().unwrap().port();
    let error =
        OpenAi::new(&format!("http://127.0.0.1:{port}/v1"), Options { model: None, ..options() }).err().unwrap();
    assert!(matches!(error.fault, Fault::Transport(Broken::Refused)), "{error:?}");
}

#[test]
fn silence_ends_with_the_time_out_and_is_tried_again_while_tries_are_left() {
    let silent = Server::start(|_, _| Reply::Silence);
    let timeout = Duration::from_millis(200);
    let mut tried = model(&silent, Options { timeout, retries: 1, ..options() });
    let error = ask(&mut tried, &[plain()]).1.unwrap_err();
    assert!(matches!(error.fault, Fault::Transport(Broken::TimedOut(t)) if t == timeout), "{error:?}");
    assert_eq!(tried.tally().retries, [("a time-out".to_owned(), 1)].into());
    // One answer that does not come; a slow machine may miss more, and tries them again as well.
    let once = Server::start(|number, request| match number {
        1 => Reply::Silence,
        _ => bigram(request, &Quirks::default()),
    });
    let timeout = Duration::from_secs(1);
    let mut model = model(&once, Options { timeout, retries: 1000, concurrency: 1, ..options() });
    ask_all(&mut model, &[plain(), plain()]);
    let retries = model.tally().retries;
    assert!(retries.len() == 1 && retries["a time-out"] >= 1, "{retries:?}");
}

#[test]
fn what_may_pass_is_tried_again_when_the_server_says() {
    let start = Instant::now();
    let server = Server::start(|number, request| match number {
        0 => Reply::Raw(429, "retry-after: 1\r\n", "{\"error\": \"busy\"}".into()),
        1 => Reply::Raw(503, "retry-after: 0\r\n", String::new()),
        2 => Reply::Hangup,
        _ => bigram(request, &Quirks::default()),
    });
    one(&server, Options { retries: 3, ..options() }, generate("a", Default::default())).unwrap();
    // One second asked for, none asked for, and the third wait of the own doubling: 2 s.
    assert!(start.elapsed() >= Duration::from_secs(3));
    assert_eq!(server.seen().len(), 4);
}

#[test]
fn tries_end() {
    let server = Server::start(|_, _| Reply::Raw(500, "retry-after: 0\r\n", "worker died".into()));
    let error = one(&server, Options { retries: 2, ..options() }, generate("a", Default::default())).unwrap_err();
    assert!(
        matches!(error.fault, Fault::Refused { status: 500, within: false, .. })
            && error.to_string().ends_with("HTTP 500: worker died")
    );
    assert_eq!(server.seen().len(), 3);
}

#[test]
fn what_was_answered_before_the_server_died_is_not_lost() {
    let server = Server::start(|number, request| match number {
        0..6 => bigram(request, &Quirks::default()),
        _ => Reply::Hangup,
    });
    let requests: Vec<_> = (0..40).map(|n| generate(&format!("The {n}"), Default::default())).collect();
    let (responses, result) = ask(&mut model(&server, options()), &requests);
    assert_eq!(responses.iter().flatten().count(), 6);
    assert!(matches!(
        result.unwrap_err(),
        Error { asked: Asked::Request(_), fault: Fault::Transport(Broken::Connection(_)), .. }
    ));
    // It stops instead of asking a dead server for all the rest.
    assert!(server.seen().len() <= 6 + Options::default().concurrency);
}

#[test]
fn it_stops_when_told_and_keeps_that_many_requests_under_way() {
    static UNDER_WAY: Mutex<(usize, usize)> = Mutex::new((0, 0));
    // The first three are answered when all three are there.
    let three = Barrier::new(3);
    let server = Server::start(move |number, request| {
        let mut now = UNDER_WAY.lock().unwrap();
        now.0 += 1;
        now.1 = now.1.max(now.0);
        drop(now);
        if number < 3 {
            three.wait();
        }
        UNDER_WAY.lock().unwrap().0 -= 1;
        bigram(request, &Quirks::default())
    });
    let requests: Vec<_> = (0..100).map(|_| generate("The", Default::default())).collect();
    let mut answered = 0;
    let result = model(&server, Options { concurrency: 3, ..options() }).answer(&requests, &mut |_, _| {
        answered += 1;
        if answered == 10 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    result.unwrap();
    assert_eq!(answered, 10);
    assert!(server.seen().len() <= 10 + 2 * 3);
    assert_eq!(UNDER_WAY.lock().unwrap().1, 3);
}

#[test]
fn nothing_asked_is_nothing_sent() {
    let server = Server::bigram(Quirks::default());
    assert!(ask(&mut model(&server, options()), &[]).1.is_ok());
    assert!(server.seen().is_empty());
}

/// An answer as most servers give it.
fn completion(text: &str) -> serde_json::Value {
    json!({"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
}

fn plain() -> Request {
    generate("a", GenerationOptions::default())
}

/// The text that comes of one request to a server whose first answer is `first`, and what was counted.
fn after(first: impl Fn() -> Reply + Send + Sync + 'static) -> (Result<Response, Error>, Tally, usize) {
    let server =
        Server::start(move |number, _| if number == 0 { first() } else { Reply::Json(200, completion(" 42")) });
    let mut model = model(&server, Options { retries: 1, ..options() });
    let (mut responses, result) = ask(&mut model, &[plain()]);
    let response = result.map(|()| responses.pop().flatten().unwrap());
    (response, model.tally(), server.seen().len())
}

#[test]
fn the_status_decides_before_the_words() {
    for (status, message) in [
        (429, "Rate limit reached on tokens per min. Shorten the context length or wait 1 s."),
        (503, "model 'echo-7b' is loading, logprobs and all"),
        (520, ""),
        (524, "<html>A timeout occurred</html>"),
        (529, "overloaded"),
        (408, "maximum context length"),
    ] {
        let (response, tally, asked) = after(move || Reply::Raw(status, "retry-after: 0\r\n", message.into()));
        assert!(matches!(response.unwrap(), Response::Generated { text, .. } if text == " 42"), "{status}");
        assert_eq!((asked, tally.retries), (2, [(format!("HTTP {status}"), 1)].into()));
    }
    for status in [400, 402, 404, 422, 501] {
        let (response, tally, asked) = after(move || Reply::Json(status, json!({"error": "echo"})));
        assert!(response.unwrap_err().to_string().contains("echo") && tally.retries.is_empty());
        assert_eq!(asked, 1, "{status}");
    }
}

#[test]
fn a_rate_limit_does_not_change_a_rolling_log_likelihood() {
    let text = "The cat sat on the mat";
    let busy = json!({"error": {"message": "Rate limit: shorten the context length"}});
    let server = Server::start(move |number, request| match number {
        3 => Reply::Raw(429, "retry-after: 0\r\n", busy.to_string()),
        _ => bigram(request, &Quirks::default()),
    });
    let mut asked = model(&server, Options { retries: 1, concurrency: 1, ..options() });
    let responses = ask_all(&mut asked, &[rolling(text), rolling(text)]);
    assert_eq!(responses[0], responses[1]);
    assert_eq!((asked.tally().cut_texts, asked.tally().retries["HTTP 429"]), (0, 1));
    // Where a text is really cut, that is counted.
    let short = Server::bigram(Quirks { context: Some(80), ..Quirks::default() });
    let mut cut = model(&short, options());
    ask_all(&mut cut, &[rolling(&"ab".repeat(120)), rolling("The cat")]);
    assert_eq!(cut.tally().cut_texts, 1);
    assert!(cut.tally().sentences()[0].starts_with("warning: 1 text was longer than the server's context"));
}

#[test]
fn an_error_inside_of_an_answer_is_an_error() {
    let broken = json!({"choices": [{"text": "", "finish_reason": "error",
        "error": {"code": 502, "message": "Upstream error from provider"}}]});
    for first in [
        broken.clone(),
        json!({"choices": [{"text": "4", "finish_reason": "abort"}]}),
        json!({"object": "error", "message": "The model is overloaded", "code": 50001}),
        json!({"detail": "Model is still loading"}),
        json!({"message": "slow down", "statusCode": 429}),
        json!({"error": {"message": "no worker", "type": "server_error"}, "choices": null}),
    ] {
        let (response, tally, asked) = after(move || Reply::Json(200, first.clone()));
        assert!(matches!(response.unwrap(), Response::Generated { text, .. } if text == " 42"));
        assert_eq!((asked, tally.retries.values().sum::<u64>()), (2, 1));
    }
    let server = Server::start(move |_, _| Reply::Json(200, broken.clone()));
    let error = one(&server, options(), plain()).unwrap_err().to_string();
    assert!(error.ends_with("the server says: Upstream error from provider"), "{error}");
    // One that will not pass is not tried again.
    let (response, _, asked) = after(|| Reply::Json(200, json!({"error": {"message": "bad key", "code": 401}})));
    assert!(response.unwrap_err().to_string().contains("the server says: bad key"));
    assert_eq!(asked, 1);
    let (response, ..) = after(|| Reply::Json(200, json!({"error": null, "choices": [{"text": "x", "error": {}}]})));
    assert!(matches!(response.unwrap(), Response::Generated { text, .. } if text == "x"));
}

#[test]
fn answers_that_are_no_answers_are_counted() {
    let server = Server::start(|number, request| {
        assert_eq!(request.path, "/v1/chat/completions");
        let choice = match number {
            0 => json!({"message": {"content": null, "reasoning_content": "thinking…"}, "finish_reason": "length"}),
            1 => json!({"message": {"content": ""}, "finish_reason": "content_filter"}),
            2 => json!({"message": {"content": null, "refusal": "I cannot"}, "finish_reason": "stop"}),
            _ => json!({"message": {"content": "42", "reasoning_content": "so"}, "finish_reason": "stop"}),
        };
        Reply::Json(200, json!({"choices": [choice]}))
    });
    let mut chat = model(&server, Options { chat: true, concurrency: 1, ..options() });
    let prompt = chat.chat_prompt(&[Message { role: "user".into(), content: "q".into() }], false).unwrap();
    let requests: Vec<_> = (0..4).map(|_| generate(&prompt, GenerationOptions::default())).collect();
    let responses = ask_all(&mut chat, &requests);
    assert_eq!(responses[0], Response::Generated { text: String::new(), tokens: None, capped: true });
    assert_eq!(responses[3], Response::Generated { text: "42".into(), tokens: None, capped: false });
    let tally = chat.tally();
    assert_eq!((tally.only_reasoning, tally.filtered, tally.declined), (1, 1, 1));
    assert_eq!(tally.sentences().len(), 3);
}

#[test]
fn a_limit_is_sent_by_the_name_that_the_server_wants() {
    let server = Server::start(|_, request| match request.body.get("max_tokens") {
        Some(_) => Reply::Json(
            400,
            json!({"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use \
                'max_completion_tokens' instead.", "code": "unsupported_parameter", "param": "max_tokens"}}),
        ),
        None => Reply::Json(200, completion(&format!("{}", request.body["max_completion_tokens"]))),
    });
    let eight = || generate("a", GenerationOptions { max_tokens: 8, ..GenerationOptions::default() });
    let mut asked = model(&server, Options { concurrency: 1, ..options() });
    let responses = ask_all(&mut asked, &[eight(), eight()]);
    assert!(responses.iter().all(|r| matches!(r, Response::Generated { text, .. } if text == "8")));
    assert_eq!(server.seen().len(), 3);
    assert_eq!(asked.tally().renamed["max_tokens"], "max_completion_tokens");
    // One that is only too large is not.
    let small = Server::start(|_, _| Reply::Json(400, json!({"error": "max_tokens is too large: 8, at most 4"})));
    assert!(matches!(fault(&small, eight()), Fault::Refused { status: 400, within: false, .. }));
}

#[test]
fn a_server_without_greedy_answers_is_used_and_that_is_said() {
    let server = Server::start(|_, request| match request.body.get("temperature") {
        Some(t) if *t != json!(1.0) => Reply::Json(
            400,
            json!({"error": {"message": "Unsupported value: 'temperature' does not support 0 with this model. Only the \
                default (1) value is supported."}}),
        ),
        _ if request.body.get("stop").is_some() => {
            Reply::Json(400, json!({"error": {"message": "Unsupported parameter: 'stop'"}}))
        }
        _ => Reply::Json(200, completion("4\n2")),
    });
    let until = vec!["\n".to_owned()];
    let request = generate("a", GenerationOptions { until, ..GenerationOptions::default() });
    let mut asked = model(&server, options());
    let responses = ask_all(&mut asked, &[request]);
    assert!(matches!(&responses[0], Response::Generated { text, .. } if text == "4"));
    let tally = asked.tally();
    assert_eq!(tally.temperature_not_sent, 1);
    assert_eq!(tally.left_out, ["stop".to_owned(), "temperature".to_owned()].into());
    assert!(tally.sentences()[0].contains("sampled as it does by default"));
    // What was asked for is never left out.
    let sampled = GenerationOptions { temperature: 0.7, ..GenerationOptions::default() };
    assert!(matches!(fault(&server, generate("a", sampled)), Fault::Refused { status: 400, within: false, .. }));
}

#[test]
fn options_add_rename_and_leave_out_fields() {
    let server = Server::start(|_, _| Reply::Json(200, completion("4")));
    let fields = Fields {
        extra: json!({"provider": {"order": ["x"]}}).as_object().unwrap().clone(),
        rename: [("max_tokens".to_owned(), "max_completion_tokens".to_owned())].into(),
        omit: ["temperature", "repeat_penalty", "repetition_penalty"].map(str::to_owned).into(),
    };
    let mut asked = model(&server, Options { fields, ..options() });
    ask_all(&mut asked, &[generate("a", GenerationOptions { max_tokens: 8, ..GenerationOptions::default() })]);
    let body = json!({"model": "bigram", "prompt": "a", "max_completion_tokens": 8, "provider": {"order": ["x"]}});
    assert_eq!(server.seen()[0].body, body);
    assert_eq!(asked.tally().temperature_not_sent, 1);
    let wrong = Fields { omit: ["prompt".to_owned()].into(), ..Fields::default() };
    let error = OpenAi::new(&server.url, Options { fields: wrong, ..options() }).err().unwrap();
    assert_eq!(error.asked, Asked::Settings);
}

#[test]
fn what_was_set_to_off_is_sent_as_off_and_what_was_not_set_is_not_sent() {
    let server = Server::start(|_, _| Reply::Json(200, completion("4")));
    let sampled = |off: &[&str]| {
        let off = off.iter().map(|s| (*s).to_owned()).collect();
        generate("a", GenerationOptions { temperature: 0.7, off, ..GenerationOptions::default() })
    };
    let mut asked = model(&server, Options { concurrency: 1, ..options() });
    ask_all(&mut asked, &[sampled(&[]), sampled(&["top_k", "min_p"])]);
    let sent = |at: usize| ["top_k", "min_p"].map(|name| server.seen()[at].body.get(name).cloned());
    assert_eq!(sent(0), [None, None]);
    assert_eq!(sent(1), [Some(json!(-1)), Some(json!(0.0))]);
}

#[test]
fn a_query_and_a_password_of_the_address_are_sent_and_the_password_is_never_shown() {
    let server = Server::start(|number, request| match number {
        0 => Reply::Json(200, completion("4")),
        _ => Reply::Json(403, json!({"error": format!("no s3cret dXNlcjpzM2NyZXQ= at {}", request.path)})),
    });
    let host = server.url.strip_prefix("http://").unwrap();
    let address = format!("HTTP://user:s3cret@{host}/completions?api-version=2024-02-01&sig=k3yk3y");
    let mut asked = OpenAi::new(&address, Options { concurrency: 1, ..options() }).unwrap();
    ask_all(&mut asked, &[plain()]);
    let seen = &server.seen()[0];
    assert_eq!(seen.path, "/v1/completions?api-version=2024-02-01&sig=k3yk3y");
    assert_eq!(seen.authorization.as_deref(), Some("Basic dXNlcjpzM2NyZXQ="));
    let error = ask(&mut asked, &[plain()]).1.unwrap_err();
    for text in [error.to_string(), format!("{error:?}"), asked.address()] {
        assert!(!text.contains("s3cret") && !text.contains("dXNl") && !text.contains("k3y"), "{text}");
    }
    assert!(error.to_string().contains("/v1/completions?api-version=2024-02-01&sig=(hidden)"), "{error}");
    let error = OpenAi::new("http://user:s3cret@h h/v1", options()).err().unwrap().to_string();
    assert!(!error.contains("s3cret"), "{error}");
}

#[test]
fn a_wait_beyond_ten_minutes_is_not_waited_for() {
    let (response, _, asked) = after(|| Reply::Raw(429, "retry-after: 86400\r\n", "daily quota".into()));
    let error = response.unwrap_err().to_string();
    assert!(
        asked == 1
            && error.ends_with("the server asks to wait 86400 s, which is too long: start the same command again then"),
        "{error}"
    );
}
