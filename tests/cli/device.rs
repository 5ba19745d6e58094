//! Where a model runs: `--device`, models of random weights. Here without a GPU; tests/cuda.rs has the rest.

use crate::support::command::{Folder, NVFP4, fail, run, shown_json, succeed};

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

#[cfg(not(feature = "parallel"))]
#[test]
fn a_build_for_one_device_refuses_several() {
    for option in ["--tensor-parallel-size", "--pipeline-parallel-size"] {
        let error = fail(&["run", NVFP4, "--raw", "-p", "The ship", "-n", "2", option, "2"]);
        assert!(error.contains("--features parallel") && error.contains("cluster"), "{error}");
        assert_eq!(run(&["run", NVFP4, "-p", "The ship", option, "0"]).status.code(), Some(2));
        succeed(&["run", NVFP4, "--raw", "-p", "The ship", "-n", "2", option, "1"]);
    }
    let error = fail(&["eval", "http://127.0.0.1:1/v1", "--tasks", "piqa", "--tensor-parallel-size", "2"]);
    assert!(error.contains("--features parallel"), "{error}");
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

/// Any config.json is a shape, too: of as many layers as wanted, say.
#[test]
fn a_configuration_is_a_shape_of_random_weights() {
    let folder = Folder::new();
    succeed(&["convert", "--model-shape", "tiny", "-o", &folder.name("tiny")]);
    let mut config = folder.json("tiny/config.json");
    config["num_hidden_layers"] = 3.into();
    let file = folder.write("three.json", config.to_string());
    succeed(&["convert", "--model-shape", &file, "--recipe", "nvfp4", "-o", &folder.name("three")]);
    let facts = shown_json(&["inspect", "--json", &folder.name("three")]);
    assert_eq!(folder.json("three/config.json")["num_hidden_layers"], 3, "{facts}");
    let (stdout, _) = succeed(&["run", &folder.name("three"), "--raw", "-n", "2", "-p", "a"]);
    assert!(!stdout.is_empty());
    for (name, content, part) in [("no.json", "{", "no.json"), ("other.json", "{\"model_type\": \"bert\"}", "bert")] {
        let file = folder.write(name, content);
        let error = fail(&["convert", "--model-shape", &file, "-o", &folder.name("out")]);
        assert!(error.contains(part), "{error}");
    }
    assert!(fail(&["convert", "--model-shape", "gone.json", "-o", &folder.name("out")]).contains("gone.json"));
}
