//! The CUDA backend computes what the CPU does. A binary of its own, because it runs where there is a driver, which may be the
//! stand-in that scripts/cuda-standin.sh builds: `LD_LIBRARY_PATH=target/standin cargo test --test cuda`.

#[path = "support/mod.rs"]
mod support;

use std::process::Command;

use recoup::backend::cuda::{CudaBackend, Device};
use recoup::backend::{Backend, BackendError};
use recoup::checkpoint::Checkpoint;
use recoup::formats::kv::KvFormat;
use recoup::model::{Decoder, ModelConfig};
use support::fixtures::{Fixture, Report, Session, all_fixtures, bits, cpu, deviation, incremental_logits, logits};
use support::project;

/// The device, or a word on why there is none.
fn device() -> Option<CudaBackend> {
    match Device::count() {
        Ok(0) => println!("no GPU: not tested"),
        Ok(_) => return Some(CudaBackend::new(0).unwrap()),
        Err(e) => println!("{e}: not tested"),
    }
    None
}

#[test]
fn every_checkpoint_gives_the_logits_it_gives_when_deployed() {
    let Some(backend) = device() else { return };
    let mut report = Report::default();
    for fixture in all_fixtures() {
        let decoder = fixture.load(backend.clone());
        let got = logits(&decoder, &fixture.input_ids());
        // An FP8 cache may round a key or value to the other neighbour.
        let bound =
            if fixture.checkpoint().announced.fp8_kv_cache { fixture.bound() } else { fixture.bound().min(1e-3) };
        report.check(&fixture.name, deviation(&got, &fixture.golden_logits()), bound);
        let split = incremental_logits(&decoder, &fixture.input_ids(), 3);
        assert!(bits(&split) == bits(&got), "{}: pieces give other bits", fixture.name);
    }
    report.finish();
}

#[test]
fn every_linear_gives_the_given_outputs() {
    let Some(backend) = device() else { return };
    let mut report = Report::default();
    for fixture in all_fixtures() {
        let (checkpoint, reference) = (fixture.checkpoint(), fixture.reference());
        for module in ModelConfig::read(&checkpoint.config).unwrap().modules() {
            let get = |what: &str| reference.get(&format!("{}.{what}", module.name)).map(|t| &t.values[..]);
            let (Some(input), Some(output)) = (get("input"), get("output")) else { continue };
            let linear = checkpoint.linear(&module.name, module.role).unwrap();
            let what = format!("{} {} {} x {}", fixture.name, module.name, linear.weight_format(), linear.activation);
            fn product<B: Backend>(
                backend: &B,
                linear: &recoup::formats::linear::LinearTensors<'_>,
                x: &[f32],
            ) -> Vec<f32> {
                let packed = backend.load_linear(linear.clone()).unwrap();
                let x = backend.tensor(x.to_vec(), linear.k).unwrap();
                backend.to_host(&backend.linears(&x, &[&packed]).unwrap().remove(0)).unwrap()
            }
            let got = product(&backend, &linear, input);
            report.check(&what, deviation(&got, output), 1e-4);
            report.check(&format!("{what}, from the CPU"), deviation(&got, &product(&cpu(1), &linear, input)), 2e-5);
        }
    }
    report.finish();
}

#[test]
fn a_sequence_has_the_same_bits_whatever_is_in_the_batch() {
    let Some(backend) = device() else { return };
    let checkpoint = Checkpoint::open(&project().join("models/books-nvfp4")).unwrap();
    let decoder = Decoder::load(backend, &checkpoint).unwrap();
    let texts: Vec<Vec<u32>> = (0..8u32).map(|i| (0..5 + 7 * i).map(|t| (t * 37 + i * 11) % 500).collect()).collect();
    let alone: Vec<Vec<f32>> =
        texts.iter().map(|t| Session::new(&decoder, 1, t.len()).forward(&[(0, 0, t)]).remove(0)).collect();
    for batch in [3, 8] {
        let mut session = Session::new(&decoder, batch, 64);
        let new: Vec<_> = texts[..batch].iter().enumerate().map(|(i, t)| (i, 0, &t[..])).collect();
        for (i, got) in session.forward(&new).iter().enumerate() {
            assert!(bits(got) == bits(&alone[i]), "sequence {i} of {batch}");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_cpu() {
    let Some(backend) = device() else { return };
    for model in ["books-bf16", "books-nvfp4"] {
        let checkpoint = Checkpoint::open(&project().join("models").join(model)).unwrap();
        let prompt = [3, 141, 59, 26, 53, 58, 97];
        fn tokens<B: Backend>(decoder: &Decoder<B>, prompt: &[u32], count: usize) -> Vec<u32> {
            let mut session = Session::new(decoder, 1, prompt.len() + count);
            let (mut all, mut done) = (prompt.to_vec(), 0);
            while all.len() < prompt.len() + count {
                let row = session.forward(&[(0, done, &all[done..])]).remove(0);
                done = all.len();
                let last = &row[row.len() - decoder.config.vocab..];
                let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
                all.push(best as u32);
            }
            all
        }
        let expected = tokens(&Decoder::load(cpu(0), &checkpoint).unwrap(), &prompt, 200);
        let got = tokens(&Decoder::load(backend.clone(), &checkpoint).unwrap(), &prompt, 200);
        assert_eq!(got, expected, "{model}");
    }
}

#[test]
fn a_cache_that_grows_and_forks_keeps_what_it_holds() {
    let Some(backend) = device() else { return };
    let decoder = Fixture::own("modelopt/llama/nvfp4_four_over_six").load(backend);
    let mut cache = decoder.new_cache(16, KvFormat::Bf16).unwrap();
    let span = |start, len, pages: &[u32]| recoup::backend::Span { start, len, pages: pages.to_vec() };
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 50).collect();
    let forward = |cache: &mut _, from: usize, to: usize, pages: &[u32]| {
        let batch =
            recoup::backend::Batch { tokens: tokens[from..to].to_vec(), spans: vec![span(from, to - from, pages)] };
        let x = decoder.forward(&batch, cache, recoup::model::Wanted::Last).unwrap();
        decoder.backend().to_host(&x).unwrap()
    };
    let _ = forward(&mut cache, 0, 12, &[0]);
    decoder.backend().grow(&mut cache, 5).unwrap();
    decoder.backend().fork(&mut cache, &span(0, 12, &[0]), &span(12, 0, &[3])).unwrap();
    let one = forward(&mut cache, 12, 20, &[0, 1]);
    let other = forward(&mut cache, 12, 20, &[3, 4]);
    assert!(bits(&one) == bits(&other));
}

/// Run by the test below in processes of its own.
#[test]
#[ignore = "a part of the next test"]
fn a_model_is_run() {
    let run = || -> Result<(), Box<dyn std::error::Error>> {
        let decoder = Decoder::load(CudaBackend::new(0)?, &Checkpoint::open(&project().join("models/books-nvfp4"))?)?;
        let mut cache = decoder.new_cache(64, KvFormat::Bf16)?;
        for start in 0..3 {
            let span = recoup::backend::Span { start, len: 1, pages: vec![0] };
            let batch = recoup::backend::Batch { tokens: vec![5], spans: vec![span] };
            let x = decoder.forward(&batch, &mut cache, recoup::model::Wanted::Last)?;
            decoder.backend().to_host(&x)?;
        }
        Ok(())
    };
    match run() {
        Ok(()) => println!("outcome: all is well"),
        Err(e) => println!("outcome: {e}"),
    }
}

#[test]
fn whatever_call_of_the_driver_fails_there_is_an_error_and_an_end() {
    let Some(backend) = device() else { return };
    if !backend.device().name.starts_with("stand-in") {
        println!("a real driver: not tested");
        return;
    }
    let outcome = |variable: &str, value: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let out = command
            .args(["--exact", "a_model_is_run", "--ignored", "--nocapture"])
            .env(variable, value)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let said = text.split("outcome: ").nth(1).map(|t| t.lines().next().unwrap_or_default().to_owned());
        said.unwrap_or_else(|| panic!("{variable}={value}: {text}{}", String::from_utf8_lossy(&out.stderr)))
    };
    assert_eq!(outcome("STANDIN_FAIL", "0"), "all is well");
    let mut failed = 0;
    for call in (1..40).chain((40..2000).step_by(131)) {
        for code in [2, 719, 999] {
            let said = outcome("STANDIN_FAIL", &format!("{call}:{code}"));
            // Memory is asked for again after what waits for its next use was given back.
            assert!(
                said == "all is well" || said.contains("CUDA") || said.contains("GPU memory"),
                "{call}:{code}: {said}"
            );
            failed += usize::from(said != "all is well");
        }
    }
    assert!(failed > 100, "{failed}");
    assert!(outcome("STANDIN_MEMORY", "2000000").contains("MiB are needed at once"));
    assert!(outcome("STANDIN_DEVICES", "0").contains("no device 0"));
    assert!(outcome("STANDIN_VERSION", "12080").contains("supports CUDA 12.8; 13.0 or newer is needed"));
}

#[test]
fn a_device_that_is_not_there_is_named() {
    if device().is_none() {
        return;
    }
    let Err(BackendError::Failed { message, .. }) = CudaBackend::new(9).map(drop) else {
        panic!("there are ten devices?")
    };
    assert!(message.contains("no device 9"), "{message}");
}

/// The binary, with the GPU that is there.
fn recoup(args: &[&str]) -> (Vec<u8>, String) {
    let mut command = support::command::recoup(args);
    let out = command.env_remove("CUDA_VISIBLE_DEVICES").output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    (out.stdout, String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn every_verb_gives_on_the_gpu_what_it_gives_on_the_cpu() {
    use support::command::{BF16, Folder, NVFP4};
    if device().is_none() {
        return;
    }
    let folder = Folder::new();
    let on = |device: &str, args: &[&str]| recoup(&[args, &["--device", device]].concat());
    let both = |args: &[&str]| ["cpu", "cuda:0"].map(|device| String::from_utf8(on(device, args).0).unwrap());

    for prompt in ["The ship", "It was a dark"] {
        let [cpu, gpu] = both(&["run", NVFP4, "--raw", "-p", prompt, "-n", "12", "--temperature", "0"]);
        assert_eq!(cpu, gpu);
        let [cpu, gpu] = both(&["run", NVFP4, "--raw", "-p", prompt, "-n", "12", "--seed", "4", "--top-p", "0.9"]);
        assert_eq!(cpu, gpu);
    }

    let ids = folder.write("ids.json", "[[3, 141, 59, 26, 53, 58, 97, 93], [23, 84, 62, 64, 33, 83, 27, 95]]");
    let [cpu, gpu] = ["cpu", "cuda:0"].map(|device| {
        let out = folder.name(format!("{}.safetensors", &device[..3]));
        on(device, &["logits", NVFP4, "--input-ids", &ids, "-o", &out]);
        let file = std::fs::read(&out).unwrap();
        // After the ids.
        let data = support::command::tensor_data(&file)[2 * 8 * 8..].to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<f32>>()
    });
    assert_eq!(cpu.len(), 2 * 8 * 4096);
    assert!(deviation(&gpu, &cpu) < 1e-4, "{}", deviation(&gpu, &cpu));

    let scores = |text: &str| {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        value["results"].clone()
    };
    let [cpu, gpu] = ["cpu", "cuda:0"].map(|device| {
        let out = folder.name(format!("eval-{}", &device[..3]));
        let json =
            on(device, &["eval", BF16, "--tasks", "piqa,lambada_openai", "--limit", "4", "-o", &out, "--json"]).0;
        let other = if device == "cpu" { "cuda:0" } else { "cpu" };
        // Answers of one device are not taken for those of another.
        let mut command =
            support::command::recoup(&["eval", BF16, "--tasks", "piqa,lambada_openai", "--limit", "4", "-o", &out]);
        let again = command.args(["--device", other]).env_remove("CUDA_VISIBLE_DEVICES").output().unwrap();
        assert!(!again.status.success(), "answers of {device} were taken for those of {other}");
        scores(&String::from_utf8(json).unwrap())
    });
    for (task, cpu) in cpu.as_object().unwrap() {
        for (metric, value) in cpu.as_object().unwrap().iter().filter(|(_, v)| v.is_f64()) {
            let (a, b) = (value.as_f64().unwrap(), gpu[task][metric].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-3 * a.abs(), "{task} {metric}: {a} and {b}");
        }
    }

    let text = folder.write("text.txt", "It was the best of times, it was the worst of times. ".repeat(12));
    let kl = ["cpu", "cuda:0"].map(|device| {
        let report = folder.name(format!("report-{}", &device[..3]));
        let base =
            ["compare", BF16, NVFP4, "--tasks", "none", "--window", "32", "--windows", "3", "--no-speed", "--json"];
        let json = on(device, &[&base[..], &["--text", &text, "-o", &report]].concat()).0;
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        value["divergences"][0]["kl"]["value"].as_f64().unwrap()
    });
    assert!((kl[0] - kl[1]).abs() < 1e-3 * kl[0], "{kl:?}");

    let out = folder.name("quantized");
    let base = ["quantize", BF16, "--recipe", "nvfp4", "--samples", "2", "--length", "16", "-o", &out];
    on("cuda:0", &base);
    assert!(String::from_utf8(recoup(&["inspect", &out]).0).unwrap().contains("no problems"));

    let args = ["bench", NVFP4, "--batch", "1,2", "--prompt", "8", "-n", "3", "--repeats", "1", "--json"];
    let bench: serde_json::Value = serde_json::from_slice(&on("cuda:0", &args).0).unwrap();
    assert!(bench["cases"][1]["tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn doctor_finds_every_kernel_right_and_auto_says_why_it_does_not_use_a_gpu() {
    use support::command::NVFP4;
    let Some(backend) = device() else { return };
    let (out, _) = recoup(&["doctor", "--device", "cuda:0"]);
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("checks passed") && !out.contains("WRONG"), "{out}");
    if backend.device().name.starts_with("stand-in") {
        let mut command = support::command::recoup(&["run", NVFP4, "--raw", "-p", "The ship", "-n", "2"]);
        let out = command.env_remove("CUDA_VISIBLE_DEVICES").env("STANDIN_MEMORY", "20000000").output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.success() && said.contains("the CPU computes, not the GPU") && said.contains("free"),
            "{said}"
        );
    }
}
