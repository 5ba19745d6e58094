//! `recoup bench`: a model that runs here, and a server.

use crate::support::command::{BF16, Folder, fail, recoup, run, said, shown_json};
use crate::support::http::Server;

#[test]
fn a_model_is_measured_beside_what_the_machine_and_others_allow() {
    let folder = Folder::new();
    let file = folder.name("bench.json");
    let words = ["bench", BF16, "--batch", "1,3", "--prompt", "20", "-n", "6", "--repeats", "1", "--json", "-o", &file];
    let report = shown_json(&words);
    assert_eq!(folder.json("bench.json"), report);
    let cases = report["cases"].as_array().unwrap();
    let of = |key: &str| cases.iter().map(|c| c[key].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!((of("batch"), of("prompt_tokens")), (vec![1.0, 3.0], vec![20.0; 2]));
    for case in cases {
        let get = |key: &str| case[key].as_f64().unwrap();
        let steps = ["step_seconds", "step_p90_seconds", "step_p99_seconds"].map(get);
        assert!(get("first_token_seconds") > 0.0 && steps[0] > 0.0 && steps.is_sorted(), "{case}");
        // Nothing is faster than reading the weights once, but what fits into a cache.
        assert!(get("step_floor_seconds") > 0.0, "{case}");
        let rate = get("batch") / get("step_seconds");
        assert!((get("tokens_per_second") / rate - 1.0).abs() < 1e-9);
    }
    // All of this model's weights but norms: its embedding is its head.
    let stored =
        std::fs::metadata(crate::support::project().join(BF16).join("model.safetensors")).unwrap().len() as f64;
    for weights in ["weight_bytes_per_step", "weight_bytes"] {
        let weights = report[weights].as_f64().unwrap();
        assert!((weights / stored - 1.0).abs() < 0.05, "{weights} of {stored}");
    }
    let devices = report["devices"].as_array().unwrap();
    let b200 = devices.iter().find(|d| d["name"] == "B200").unwrap();
    let floor = b200["cases"][0]["step_floor_seconds"].as_f64().unwrap();
    assert!((floor * 8e12 / report["weight_bytes"].as_f64().unwrap() - 1.0).abs() < 0.2, "{floor}");
    assert_eq!(b200["cases"][1]["fits"], true);
}

#[test]
fn what_cannot_be_measured_is_refused_before_it_is_tried() {
    let error = fail(&["bench", BF16, "--prompt", "100000"]);
    assert!(error.contains("positions"), "{error}");
    let error = fail(&["bench", "--model-shape", "llama-4-9000b"]);
    assert!(error.contains("llama-3.1-8b"), "{error}");
    assert!(said(&recoup(&["bench", "--recipe", "nvfp4", BF16]).output().unwrap()).contains("--model-shape"));
    let error = fail(&["bench", BF16, "--concurrency", "2"]);
    assert!(error.contains("--concurrency is of a server"), "{error}");
    let error = fail(&["bench", "http://127.0.0.1:9", "--batch", "2"]);
    assert!(error.contains("--batch is of a model that runs here"), "{error}");
    let error = fail(&["bench", "http://127.0.0.1:9", "--engine", "reference"]);
    assert!(error.contains("--engine is of a model"), "{error}");
    if cfg!(not(feature = "reference")) {
        let error = fail(&["bench", BF16, "--engine", "reference"]);
        assert!(error.contains("--features reference"), "{error}");
    }
    let error = fail(&["bench", "http://127.0.0.1:9"]);
    assert!(error.contains("refused"), "{error}");
    let error = fail(&["bench", "http://127.0.0.1:9", "--request-rate", "0"]);
    assert!(error.contains("more than 0"), "{error}");
    let out = run(&["bench", "http://127.0.0.1:9", "--goodput", "speed:3"]);
    assert!(out.status.code() == Some(2) && said(&out).contains("ttft:500"), "{}", said(&out));
}

#[test]
fn a_server_is_measured_by_clients_and_by_rates() {
    let folder = Folder::new();
    let model = folder.model("m", BF16);
    folder.write("m/chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let server = Server::start(&[&model]);
    let url = format!("http://{}", server.address);
    let usual = ["bench", &url, "--prompt", "40", "-n", "12", "--repeats", "2", "--json"];
    let ask = |more: &[&str]| shown_json(&[&usual[..], more].concat());
    let report = ask(&["--concurrency", "1,3", "--requests", "2", "--goodput", "ttft:60000", "tpot:60000"]);
    let case = &report["cases"][0];
    for (level, clients) in case["levels"].as_array().unwrap().iter().zip([1, 3]) {
        let get = |name: &str| level[name].as_f64().unwrap_or_else(|| panic!("{name}: {level}"));
        // Two runs of two requests of each client, each of twelve tokens.
        let requests = f64::from(4 * clients);
        assert_eq!((get("max_concurrency"), get("completed"), get("failed")), (f64::from(clients), requests, 0.0));
        assert_eq!(get("total_output_tokens"), 12.0 * requests);
        let prompts = get("total_input_tokens") / requests;
        assert!((prompts / 40.0 - 1.0).abs() < 0.2, "{prompts}");
        for latency in ["ttft", "tpot", "itl", "e2el"] {
            let of = |what: &str| get(&format!("{what}_{latency}_ms"));
            assert!(of("median") > 0.0 && of("median") <= of("p90") && of("p90") <= of("p99"), "{level}");
        }
        let whole = get("mean_ttft_ms") + 11.0 * get("mean_tpot_ms");
        assert!((whole / get("mean_e2el_ms") - 1.0).abs() < 0.2, "{level}");
        assert_eq!(get("request_goodput"), get("request_throughput"));
        assert!(get("output_throughput") > 0.0 && level["output_throughput_runs"].as_array().unwrap().len() == 2);
    }
    // What nothing keeps; chats; and at a rate.
    let report = ask(&["--chat", "--request-rate", "40", "--requests", "10", "--goodput", "ttft:0.000001"]);
    let level = &report["cases"][0]["levels"][0];
    assert_eq!((&level["completed"], &level["request_rate"]), (&20.into(), &40.0.into()), "{level}");
    assert_eq!(level["request_goodput"], 0.0);
    let out = run(&["bench", &url, "--prompt", "40", "-n", "12", "--repeats", "1", "--concurrency", "2"]);
    let text = String::from_utf8(out.stdout).unwrap();
    // Prompts are random: how many tokens theirs are on average is near what was asked for.
    let prompts =
        text.split_once("prompts of ").and_then(|(_, rest)| rest.split_once(" tokens")).map(|(n, _)| n.parse());
    assert!(matches!(prompts, Some(Ok(33..=47))), "{text}");
    assert!(text.contains("first token p50"), "{text}");
}

#[test]
fn requests_that_fail_are_counted_and_said() {
    // A queue of one: most of eight at once are sent away.
    let server = Server::start(&[BF16, "--max-num-seqs", "1", "--max-queue", "1"]);
    let url = format!("http://{}", server.address);
    let words =
        ["bench", &url, "--prompt", "20", "-n", "40", "--repeats", "1", "--concurrency", "8", "--requests", "2"];
    let out = run(&words);
    assert_eq!(out.status.code(), Some(0), "{}", said(&out));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("of 16 requests failed") && text.contains("503"), "{text}");
}

#[cfg(not(feature = "parallel"))]
#[test]
fn a_build_without_ranks_says_so() {
    let out = recoup(&["scale", "--model-shape", "llama-3.1-70b", "--gpu", "h100"]).output().unwrap();
    assert!(!out.status.success() && said(&out).contains("--features parallel"), "{}", said(&out));
}
