//! The client of OpenAI-compatible servers against a server that computes exactly and misbehaves as told.

mod support;

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use recoup_eval::openai::{ApiKey, Asked, Error, Fault, OpenAi, Options};
use recoup_eval::{GenerationOptions, LanguageModel, Message, Request, Response};
use serde_json::json;
use support::{Echo, Quirks, Reply, Server, bigram, expected, greedy, tokenize};

fn options() -> Options {
    Options { model: Some("bigram".into()), retries: 0, timeout: Duration::from_secs(10), ..Options::default() }
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
    assert!(matches!(error, Error { asked: Asked::Request(0), fault: Fault::TooLong { .. }, .. }), "{error}");
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
    assert!(matches!(error.fault, Fault::TooLong { .. }));
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
    ask(&mut model(&server, Options { concurrency: 1, extra, ..options() }), &requests).1.unwrap();
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
    assert!(matches!(fault(&server, generate("The", sampled)), Fault::Status { status: 400, .. }));
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
            |f| matches!(f, Fault::Status { .. }),
            "no model loaded",
        ),
        (|| Reply::Json(404, json!({"detail": "Not Found"})), |f| matches!(f, Fault::NotFound { .. }), "Not Found"),
        (
            || Reply::Raw(307, "location: /x\r\n", String::new()),
            |f| matches!(f, Fault::Status { status: 307, .. }),
            "307",
        ),
        (|| Reply::Truncated, |f| matches!(f, Fault::Broken(_)), "the connection broke"),
        (|| Reply::Hangup, |f| matches!(f, Fault::Broken(_)), "did the server die?"),
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
    assert!(matches!(error.fault, Fault::Refused), "{error:?}");
}

#[test]
fn silence_ends_with_the_time_out_and_is_not_tried_again() {
    let server = Server::start(|_, _| Reply::Silence(Duration::from_secs(5)));
    let timeout = Duration::from_millis(200);
    let start = Instant::now();
    let error =
        one(&server, Options { timeout, retries: 5, ..options() }, generate("a", Default::default())).unwrap_err();
    assert!(matches!(error.fault, Fault::TimedOut(t) if t == timeout), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(4));
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
    assert!(matches!(error.fault, Fault::Status { status: 500, ref message } if message == "worker died"));
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
    assert!(matches!(result.unwrap_err(), Error { asked: Asked::Request(_), fault: Fault::Broken(_), .. }));
    // It stops instead of asking a dead server for all the rest.
    assert!(server.seen().len() <= 6 + Options::default().concurrency);
}

#[test]
fn it_stops_when_told_and_keeps_that_many_requests_under_way() {
    static UNDER_WAY: Mutex<(usize, usize)> = Mutex::new((0, 0));
    let server = Server::start(|_, request| {
        let mut now = UNDER_WAY.lock().unwrap();
        now.0 += 1;
        now.1 = now.1.max(now.0);
        drop(now);
        std::thread::sleep(Duration::from_millis(30));
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
