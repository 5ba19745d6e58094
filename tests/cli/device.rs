//! Where a model runs, and how fast: `--device`, `bench`, models of random weights. Here without a GPU; tests/cuda.rs has the rest.

use crate::support::command::{BF16, Folder, NVFP4, fail, recoup, run, said, shown_json, succeed};

#[test]
fn without_a_gpu_auto_is_the_cpu_and_who_insists_is_told() {
    let base = ["run", NVFP4, "--raw", "-p", "The ship", "-n", "8", "--temperature", "0", "--device"];
    let with = |device: &'static str| [&base[..], &[device]].concat();
    assert_eq!(succeed(&with("auto")).0, succeed(&with("cpu")).0);
    // No driver, or one that shows no device.
    for device in ["cuda", "cuda:3"] {
        let error = fail(&with(device));
        assert!(
            error.contains("--device cuda:") && (error.contains("no CUDA driver") || error.contains("no device")),
            "{error}"
        );
    }
    assert_eq!(run(&with("gpu")).status.code(), Some(2));
    let error = fail(&["eval", "http://127.0.0.1:1/v1", "--tasks", "piqa", "--device", "cuda"]);
    assert!(error.contains("--device is of a model that runs here"), "{error}");
    assert!(succeed(&["doctor"]).0.contains("GPU       none"));
}

#[test]
fn bench_measures_what_was_asked_for() {
    let report =
        shown_json(&["bench", BF16, "--batch", "1,3", "--prompt", "20", "-n", "6", "--repeats", "1", "--json"]);
    let cases = report["cases"].as_array().unwrap();
    let of = |key: &str| cases.iter().map(|c| c[key].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!((of("batch"), of("prompt_tokens")), (vec![1.0, 3.0], vec![20.0; 2]));
    for case in cases {
        let get = |key: &str| case[key].as_f64().unwrap();
        assert!(
            get("first_token_seconds") > 0.0
                && get("step_seconds") > 0.0
                && get("step_p99_seconds") >= get("step_seconds")
        );
        // Nothing is faster than reading the weights once, but what fits into a cache.
        assert!(get("step_floor_seconds") > 0.0, "{case}");
        let rate = get("batch") / get("step_seconds");
        assert!((get("tokens_per_second") / rate - 1.0).abs() < 1e-9);
    }
    // All of this model's weights but norms: its embedding is its head.
    let stored =
        std::fs::metadata(crate::support::project().join(BF16).join("model.safetensors")).unwrap().len() as f64;
    let weights = report["weight_bytes_per_step"].as_f64().unwrap();
    assert!((weights / stored - 1.0).abs() < 0.05, "{weights} of {stored}");
    let error = fail(&["bench", BF16, "--prompt", "100000"]);
    assert!(error.contains("positions"), "{error}");
    let error = fail(&["bench", "--model-shape", "llama-4-9000b"]);
    assert!(error.contains("llama-3.1-8b"), "{error}");
    assert!(said(&recoup(&["bench", "--recipe", "nvfp4", BF16]).output().unwrap()).contains("--model-shape"));
}

#[test]
fn a_folder_of_random_weights_runs_in_every_verb() {
    let folder = Folder::new();
    let model = folder.name("m");
    succeed(&["convert", "--model-shape", "tiny", "--recipe", "nvfp4_kv_fp8", "-o", &model]);
    assert!(succeed(&["inspect", &model]).0.contains("no problems"));
    succeed(&["run", &model, "--raw", "-p", "The ship", "-n", "4"]);
    succeed(&["eval", &model, "--tasks", "piqa", "--limit", "2", "-o", &folder.name("out")]);
    let error = fail(&["convert", "--model-shape", "tiny", "--to", "modelopt", "-o", &folder.name("n")]);
    assert!(error.contains("without --recipe"), "{error}");
    let error = fail(&["convert", "--model-shape", "tiny", "--recipe", "nvfp4_fp8_auto", "-o", &folder.name("n")]);
    assert!(error.contains("random weights"), "{error}");
    assert!(!folder.at("n").exists());
}
