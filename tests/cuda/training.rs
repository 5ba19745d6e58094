//! Training whose products a GPU multiplies by cuBLAS. On the stand-in the library is the one beside it.

use std::path::Path;
use std::process::{Command, Output};

use candle_core::{Device, Tensor, Var};
use recoup::backend::autograd::multiplier::{Factor, Multiplier};
use recoup::backend::autograd::operand::{Operand, Precision};
use recoup::backend::autograd::{AutogradBackend, Linear, loss};
use recoup::backend::{Backend, BackendError};
use recoup::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use recoup::model::ModelConfig;
use serde_json::Value;

use crate::support::command::{self, BF16, Folder, NVFP4, assert_same_files, said};
use crate::support::fixtures::{Report, all_fixtures, bits, deviation};
use crate::support::random::Random;
use crate::support::{json_lines, project};

/// The GPU with cuBLAS, or a word on why there is none.
fn multiplier() -> Option<Multiplier> {
    super::device()?;
    match Multiplier::gpu(0) {
        Ok(multiplier) => Some(multiplier),
        Err(e) => {
            assert!(std::env::var_os("RECOUP_NEEDS_GPU").is_none(), "{e}");
            println!("{e}: not tested");
            None
        }
    }
}

/// What only the stand-in does.
fn on_the_stand_in() -> bool {
    let there = multiplier().and_then(|m| m.device()).is_some_and(|name| name.starts_with("stand-in"));
    if !there {
        println!("no stand-in: not tested");
    }
    there
}

fn operand(precision: Precision, values: &[f32]) -> Operand {
    Operand::new(precision, values)
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// Shapes whole and ragged, each side as it is and transposed, either precision. Sums of k products in f32, in any order, and a
/// little less exact for tensor cores, which cut off what they add: k + 2 roundings of the sum of magnitudes.
#[test]
fn products_of_every_shape_are_those_of_plain_sums() {
    let Some(gpu) = multiplier() else { return };
    let mut random = Random(7);
    for precision in [Precision::Bf16, Precision::F32] {
        for (m, k, n) in [(1, 1, 1), (3, 17, 200), (64, 128, 96), (70, 33, 50), (130, 2, 47), (9, 800, 49), (5, 64, 1)]
        {
            // What takes part in the product: rounded where the precision rounds.
            let rounded = |values: Vec<f32>| -> Vec<f32> {
                let width = values.len();
                operand(precision, &values).row(0, width)
            };
            let (a, b) = (rounded(random.values(m * k)), rounded(random.values(k * n)));
            let as_is = (Factor::new(operand(precision, &a), m, k), Factor::new(operand(precision, &b), k, n));
            let turned = (
                Factor::new(operand(precision, &transposed(&a, m, k)), k, m),
                Factor::new(operand(precision, &transposed(&b, k, n)), n, k),
            );
            let start = random.values(m * n);
            for alpha in [1.0f32, -0.3] {
                for (left, right) in [
                    (as_is.0.as_it_is(), as_is.1.as_it_is()),
                    (turned.0.transposed(), as_is.1.as_it_is()),
                    (as_is.0.as_it_is(), turned.1.transposed()),
                    (turned.0.transposed(), turned.1.transposed()),
                ] {
                    let set = gpu.product(alpha, left, right).unwrap();
                    let mut added = start.clone();
                    gpu.add_product(&mut added, alpha, left, right).unwrap();
                    for i in 0..m * n {
                        let terms = (0..k).map(|j| f64::from(a[i / n * k + j]) * f64::from(b[j * n + i % n]));
                        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                        let (sum, size) = (f64::from(alpha) * sum, f64::from(alpha.abs()) * size);
                        let bound = (k + 2) as f64 * size * 2f64.powi(-23);
                        let what = format!("{precision:?} {m}x{k}x{n} at {i}, {alpha}");
                        assert!((f64::from(set[i]) - sum).abs() <= bound, "{what}: {} {sum}", set[i]);
                        let sum = sum + f64::from(start[i]);
                        let bound = bound + sum.abs() * 2f64.powi(-23);
                        assert!((f64::from(added[i]) - sum).abs() <= bound, "{what}, added: {} {sum}", added[i]);
                    }
                }
            }
        }
    }
}

/// Operands and results that go through the page-locked memory in several parts, whole ones and a rest.
#[test]
fn large_matrices_arrive_whole() {
    let Some(gpu) = multiplier() else { return };
    let mut random = Random(11);
    // 49 MB each way; every value of a result depends on its place.
    let (rows, columns) = (3500, 3500);
    let (a, b) = (random.values(rows), random.values(columns));
    let (left, right) =
        (Factor::new(operand(Precision::F32, &a), rows, 1), Factor::new(operand(Precision::F32, &b), 1, columns));
    let outer = gpu.product(1.0, left.as_it_is(), right.as_it_is()).unwrap();
    for (i, v) in outer.iter().enumerate() {
        assert!((v - a[i / columns] * b[i % columns]).abs() <= 1e-7, "{i}: {v}");
    }
    // And back: one row is picked at a time.
    let matrix = Factor::new(operand(Precision::F32, &outer), rows, columns);
    for row in [0, 1, 1199, 2400, rows - 1] {
        let mut pick = vec![0.0; rows];
        pick[row] = 1.0;
        let pick = Factor::new(operand(Precision::F32, &pick), 1, rows);
        let got = gpu.product(1.0, pick.as_it_is(), matrix.as_it_is()).unwrap();
        assert_eq!(bits(&got), bits(&outer[row * columns..][..columns]), "row {row}");
    }
}

/// Row-major values as a tensor.
fn tensor(values: &[f32], columns: usize) -> Tensor {
    Tensor::from_slice(values, (values.len() / columns, columns), &Device::Cpu).unwrap()
}

/// What a linear gives for `x`, and the gradients of Σ weights · y: y, dL/dx and dL/dW.
fn three_products(backend: &AutogradBackend, linear: &Linear, x: &[f32], weights: &[f32]) -> [Vec<f32>; 3] {
    let x = Var::from_tensor(&tensor(x, linear.k())).unwrap();
    let y = backend.linears(x.as_tensor(), &[linear]).unwrap().remove(0);
    let store = loss::given(&y, 0.0, weights.to_vec()).unwrap().backward().unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let dw = linear.gradient().clone().unwrap();
    [values(&y), values(store.get(x.as_tensor()).unwrap()), dw]
}

/// Both have the same operands, rounded alike; sums of a few thousand products in two orders are this far apart, of their norm.
const ORDER: f64 = 5e-6;

/// Trains `linear` on both devices: two batches into one gradient, then, after its weight became another, the same again.
fn compare(report: &mut Report, what: &str, gpu: &Multiplier, precision: Precision, linear: &LinearTensors<'_>) {
    let mut random = Random(linear.n as u64 * 31 + linear.k as u64);
    let backends = [AutogradBackend::with_precision(precision), AutogradBackend::multiplied_by(gpu.clone(), precision)];
    let linears = backends.each_ref().map(|b| b.load_linear(linear.clone()));
    let [Ok(cpu), Ok(device)] = &linears else { return };
    let master = linear.decode();
    for round in 0..3 {
        if round > 0 {
            // As after an optimizer's step.
            let noise = random.values(master.len());
            let size = master.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let moved: Vec<f32> = master.iter().zip(&noise).map(|(w, e)| w + 0.3 * size * e).collect();
            [cpu, device].iter().for_each(|l| l.set(&mut moved.clone()));
        }
        [cpu, device].iter().for_each(|l| l.train());
        for batch in 0..2 {
            let rows = [5, 12][batch];
            let (x, weights) = (random.values(rows * linear.k), random.values(rows * linear.n));
            let expected = three_products(&backends[0], cpu, &x, &weights);
            let got = three_products(&backends[1], device, &x, &weights);
            for ((name, got), expected) in ["y", "dx", "dw"].iter().zip(&got).zip(&expected) {
                report.check(
                    &format!("{what} {precision:?} {name}, weight {round}, batch {batch}"),
                    deviation(got, expected),
                    ORDER,
                );
            }
        }
    }
}

#[test]
fn the_three_products_of_every_linear_are_those_of_the_cpu() {
    let Some(gpu) = multiplier() else { return };
    let mut report = Report::default();
    for fixture in all_fixtures() {
        let checkpoint = fixture.checkpoint();
        for module in ModelConfig::read(&checkpoint.config).unwrap().modules() {
            if module.layer.is_some_and(|l| l > 0) || module.expert.is_some_and(|e| e > 0) {
                continue;
            }
            let linear = checkpoint.linear(&module.name, module.role).unwrap();
            let what = format!("{} {} {} x {}", fixture.name, module.name, linear.weight_format(), linear.activation);
            compare(&mut report, &what, &gpu, Precision::Bf16, &linear);
            compare(&mut report, &what, &gpu, Precision::F32, &linear);
        }
    }
    // Scales of rows on one side, of columns on the other, of both; none.
    let mut random = Random(5);
    let (n, k) = (48, 64);
    let rows = || OutputScale::Row((0..n).map(|i| 0.01 + i as f32 * 1e-3).collect());
    for activation in
        [ActivationFormat::Float, ActivationFormat::Fp8Token, ActivationFormat::Fp8Static { scale: 0.004 }]
    {
        for output_scale in [OutputScale::One, OutputScale::Tensor(0.02), rows()] {
            let data: Vec<u8> =
                (0..n * k).map(|_| (random.next() % 120) as u8 | (random.next() as u8 & 0x80)).collect();
            let linear = LinearTensors {
                name: "m".into(),
                n,
                k,
                element: Element::E4m3,
                data: data.into(),
                block_scales: BlockScales::None,
                output_scale: output_scale.clone(),
                activation,
                pre_quant_scale: Some(random.values(k)),
                rotation: None,
                bias: Some(random.values(n)),
            };
            compare(&mut report, &format!("{activation} {output_scale:?}"), &gpu, Precision::Bf16, &linear);
        }
    }
    report.finish();
}

/// A weight's copy is kept from product to product and goes with the weight, an input's goes with the input.
#[test]
fn copies_are_kept_as_long_as_what_they_are_of() {
    let Some(Multiplier::Gpu(gpu)) = multiplier() else { return };
    let multiplier = Multiplier::Gpu(gpu.clone());
    let mut random = Random(3);
    let weight = Factor::new(operand(Precision::Bf16, &random.values(40 * 64)), 40, 64);
    for _ in 0..3 {
        let x = Factor::new(operand(Precision::Bf16, &random.values(7 * 64)), 7, 64);
        multiplier.product(1.0, x.as_it_is(), weight.transposed()).unwrap();
        assert_eq!(gpu.copies(), (2, 8192 + 1024), "two blocks for 5120 and 896 bytes");
    }
    assert_eq!(gpu.copies(), (1, 8192));
    drop(weight);
    assert_eq!(gpu.copies(), (0, 0));
}

/// Run by the test below on a device with little memory.
#[test]
#[ignore = "a part of the next test"]
fn weights_take_turns() {
    let Some(Multiplier::Gpu(gpu)) = multiplier() else { return };
    let multiplier = Multiplier::Gpu(gpu.clone());
    let mut random = Random(9);
    let mut weights: Vec<Option<Factor>> = [600, 600, 600, 600, 1200]
        .map(|n| Some(Factor::new(operand(Precision::Bf16, &random.values(n * 600)), n, 600)))
        .into();
    let x = Factor::new(operand(Precision::Bf16, &random.values(600)), 1, 600);
    let used = |w: &Option<Factor>| {
        multiplier.product(1.0, x.as_it_is(), w.as_ref().unwrap().transposed()).unwrap();
        assert!(gpu.copies().1 <= gpu.room(), "{:?} in {}", gpu.copies(), gpu.room());
    };
    // Blocks of 1 MiB, of which four find room; the first is used once more; the fifth, twice as large, takes the place of the second and the third.
    [0, 1, 2, 3, 0].iter().for_each(|i: &usize| used(&weights[*i]));
    assert_eq!(gpu.copies().0, 5);
    used(&weights[4]);
    for (i, there) in [(1, false), (2, false), (0, true), (3, true), (4, true)] {
        let before = gpu.copies().0;
        weights[i] = None;
        assert_eq!(gpu.copies().0 + usize::from(there), before, "weight {i}");
    }
    println!("outcome: all is well");
}

#[test]
fn what_was_used_longest_ago_gives_way() {
    if !on_the_stand_in() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "training::weights_take_turns", "--ignored", "--nocapture"]);
    let out = command.env("STANDIN_MEMORY", "38554432").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("all is well"), "{text}{}", said(&out));
}

/// Run by the test below in processes of its own.
#[test]
#[ignore = "a part of the next test"]
fn a_linear_is_trained() {
    let run = || -> Result<(), Box<dyn std::error::Error>> {
        let backend = AutogradBackend::multiplied_by(Multiplier::gpu(0)?, Precision::Bf16);
        let mut random = Random(2);
        let values = random.values(64 * 48);
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let linear = backend.load_linear(LinearTensors {
            name: "m".into(),
            n: 48,
            k: 64,
            element: Element::F32,
            data: data.into(),
            block_scales: BlockScales::None,
            output_scale: OutputScale::One,
            activation: ActivationFormat::Float,
            pre_quant_scale: None,
            rotation: None,
            bias: None,
        })?;
        linear.train();
        for step in 0..3 {
            let x = Var::from_tensor(&tensor(&random.values(9 * 64), 64))?;
            let y = backend.linears(x.as_tensor(), &[&linear])?.remove(0);
            loss::given(&y, 0.0, random.values(9 * 48))?.backward()?;
            linear.set(&mut values.iter().map(|v| v * (step as f32 + 2.0)).collect::<Vec<f32>>());
        }
        Ok(())
    };
    match run() {
        Ok(()) => println!("outcome: all is well"),
        Err(e) => println!("outcome: {}", e.to_string().replace('\n', " ")),
    }
}

#[test]
fn whatever_call_fails_there_is_an_error_and_an_end() {
    if !on_the_stand_in() {
        return;
    }
    let outcome = |value: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let out = command
            .args(["--exact", "training::a_linear_is_trained", "--ignored", "--nocapture"])
            .env("STANDIN_FAIL", value)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let said = text.split("outcome: ").nth(1).map(|t| t.lines().next().unwrap_or_default().to_owned());
        said.unwrap_or_else(|| panic!("{value}: {text}{}", String::from_utf8_lossy(&out.stderr)))
    };
    assert_eq!(outcome("0"), "all is well");
    let (mut failed, mut call, mut last) = (0, 0, 0);
    // Until no call is left that could fail.
    while call < last + 12 {
        call += 1;
        for code in [719, [2, 999][call % 2]] {
            let said = outcome(&format!("{call}:{code}"));
            assert!(
                said == "all is well"
                    || said.contains("CUDA")
                    || said.contains("cuBLAS")
                    || said.contains("GPU memory"),
                "{call}:{code}: {said}"
            );
            if said != "all is well" {
                (failed, last) = (failed + 1, call);
            }
        }
    }
    // Opening it takes some twenty, each product four to seven.
    assert!(last > 50 && failed > last, "{failed} of {last}");
}

/// The binary with the GPU that is there and an environment of its own.
fn run(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = command::recoup(args);
    command.env_remove("CUDA_VISIBLE_DEVICES").envs(environment.iter().copied()).output().unwrap()
}

#[track_caller]
fn succeed(args: &[&str], environment: &[(&str, &str)]) -> String {
    let out = run(args, environment);
    assert!(out.status.success(), "{args:?} {environment:?}: {}", said(&out));
    said(&out)
}

#[track_caller]
fn fail(args: &[&str], environment: &[(&str, &str)]) -> String {
    let out = run(args, environment);
    assert_eq!(out.status.code(), Some(1), "{args:?} {environment:?}: {}", said(&out));
    said(&out)
}

const TEXT: &str = "src/corpus/calibration.txt";

fn recover<'a>(out: &'a str, device: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    with(out, device, &[&["--samples", "16", "--length", "48", "--watch-samples", "2"], more].concat())
}

fn with<'a>(out: &'a str, device: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["recover", "--data", TEXT, "--teacher", BF16, "-o", out, "--device", device], more].concat()
}

const QAD: [&str; 5] = [NVFP4, "--method", "qad:steps=8,lr=3e-5,sequences=2", "--evaluate-every", "4"];

/// KLs of the watched texts, look by look.
fn watched(out: &Path) -> Vec<f64> {
    let curve = json_lines(&out.join("recoup_curve.jsonl"));
    let looks = curve.iter().filter(|e| e["event"] == "watched");
    looks.flat_map(|e| e["loss"].as_object().unwrap().values().map(|v| v.as_f64().unwrap())).collect()
}

#[test]
fn a_model_is_recovered_on_the_gpu_as_on_the_cpu() {
    if multiplier().is_none() {
        return;
    }
    let folder = Folder::new();
    // Four bits that lose more than the shipped ones: what 16 steps bring is far beyond noise.
    let more = "--recipe mxfp4 --samples 64 --length 64 --watch-samples 6 --evaluate-every 8 --method \
                qad:steps=16,lr=1e-4,sequences=4,norms=true";
    let more: Vec<&str> = more.split_whitespace().collect();
    let [a, b] = ["cpu", "cuda:0"].map(|device| {
        let out = &device[..3];
        let told = succeed(&with(&folder.name(out), device, &more), &[]);
        assert_eq!(told.contains("products by ") && told.contains("cuBLAS "), device != "cpu", "{told}");
        let looks = watched(&folder.at(out));
        looks.chunks_exact(2).map(|texts| texts.iter().sum::<f64>()).collect::<Vec<f64>>()
    });
    // At the beginning inputs that lie between two codes go to another one here and there; from then on the two go ways of their
    // own, equally far.
    assert!(a.len() == 3 && b.len() == 3 && (a[0] - b[0]).abs() < 1e-2 * a[0], "{a:?} {b:?}");
    assert!(a[2] < 0.95 * a[0] && b[2] < 0.95 * b[0] && (a[2] - b[2]).abs() < 0.1 * a[2], "{a:?} {b:?}");
    let record: Value = folder.json("cud/recoup_recovery.json");
    assert!(record["device"].as_str().unwrap().contains("cuBLAS"), "{record:#}");
    assert!(folder.json("cpu/recoup_recovery.json").get("device").is_none());
}

#[test]
fn the_same_run_gives_the_same_bytes_whatever_finds_room() {
    if multiplier().is_none() {
        return;
    }
    let folder = Folder::new();
    let [gpu, again, less] = ["gpu", "again", "less"].map(|name| folder.name(name));
    succeed(&recover(&gpu, "cuda:0", &QAD), &[]);
    // With another number of threads.
    succeed(&recover(&again, "cuda", &[&QAD[..], &["--threads", "1"]].concat()), &[]);
    assert_same_files(&folder.at("gpu"), &folder.at("again"));
    if !on_the_stand_in() {
        return;
    }
    // And where only a part of the weights finds room on the device: 32 MiB are cuBLAS's workspace.
    let told = succeed(&recover(&less, "cuda", &QAD), &[("STANDIN_MEMORY", "37000000")]);
    assert!(told.contains("what finds no room is copied there in every pass"), "{told}");
    assert_same_files(&folder.at("gpu"), &folder.at("less"));
    let none = folder.name("none");
    let told = fail(&recover(&none, "cuda", &QAD), &[("STANDIN_MEMORY", "35000000")]);
    assert!(told.contains("the largest product of 96 tokens takes") && told.contains("--device cpu"), "{told}");
    let told = fail(&recover(&none, "cuda", &QAD), &[("STANDIN_MEMORY", "20000000")]);
    assert!(told.contains("MiB are needed at once"), "{told}");
}

/// Killed by a device that is lost, a run goes on where it stood; on another device, it does not, and a plan neither.
#[test]
fn a_run_and_a_plan_are_of_their_device() {
    if !on_the_stand_in() {
        return;
    }
    let folder = Folder::new();
    let [whole, parts, planned, other] = ["whole", "parts", "planned", "other"].map(|name| folder.name(name));
    let more = [&QAD[..], &["--save-every", "0"]].concat();
    succeed(&recover(&whole, "cuda", &more), &[]);
    let told = fail(&recover(&parts, "cuda", &more), &[("STANDIN_FAIL", "15000:719")]);
    assert!(told.contains("CUDA") || told.contains("cuBLAS"), "{told}");
    assert!(command::lines(&folder.at("parts.training/curve.jsonl")) > 4, "it came some way: {told}");
    let resume = [&more[..], &["--resume"]].concat();
    let told = fail(&recover(&parts, "cpu", &resume), &[]);
    assert!(told.contains("is of another run: device was \"stand-in") && told.contains("is cpu now"), "{told}");
    let told = fail(&recover(&parts, "cuda", &resume), &[("STANDIN_CUBLAS_VERSION", "130000")]);
    assert!(told.contains("is of another run: device was") && told.contains("cuBLAS 13.0.0"), "{told}");
    succeed(&recover(&parts, "cuda", &resume), &[]);
    assert_same_files(&folder.at("whole"), &folder.at("parts"));

    // What was given, the plan has.
    let base = ["recover", "--teacher", BF16, "--data", TEXT];
    let minutes = ["--minutes", "5", "--method", "qad:steps=10,sequences=2", "--samples", "8", "--length", "32"];
    let planned_run =
        [&base[..], &[NVFP4, "-o", &planned, "--device", "cuda", "--watch-samples", "1"], &minutes].concat();
    succeed(&planned_run, &[]);
    let plan = folder.name("planned/recoup_plan.json");
    let again = |device| [&base[..], &[NVFP4, "-o", &other, "--plan", &plan, "--device", device]].concat();
    let told = fail(&again("cpu"), &[]);
    assert!(told.contains("is for another device: device was \"stand-in") && told.contains("is cpu here"), "{told}");
    succeed(&again("cuda"), &[]);
    for file in ["model.safetensors", "recoup_curve.jsonl"] {
        let read = |name: &str| std::fs::read(folder.at(name).join(file)).unwrap();
        assert!(read("planned") == read("other"), "{file}");
    }
}

/// Attention, Mamba-2, a mixture whose experts have other rows each time, embedding and head of their own: from scratch.
#[test]
fn a_model_is_trained_from_scratch_on_the_gpu_as_on_the_cpu() {
    if multiplier().is_none() {
        return;
    }
    let folder = Folder::new();
    folder.write("shape/tokenizer.json", std::fs::read(project().join(BF16).join("tokenizer.json")).unwrap());
    let shape = serde_json::json!({
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-",
        "hidden_size": 64, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "mlp_hidden_act": "relu2",
        "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 2.5, "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": false,
    });
    folder.write("shape/config.json", shape.to_string());
    let losses = ["cpu", "cuda:0"].map(|device| {
        let (shape, out) = (folder.name("shape"), folder.name(&device[..3]));
        let line = format!(
            "pretrain {shape} -o {out} --data {TEXT} --watch {TEXT} --settings steps=20,lr=1e-2,sequences=4,warmup=5 --length 32 \
             --evaluate-every 10 --watch-samples 4 --device {device}"
        );
        succeed(&line.split_whitespace().collect::<Vec<_>>(), &[]);
        watched(&folder.at(&device[..3]))
    });
    let [cpu, gpu] = &losses;
    assert!(gpu.len() == 3 && gpu[2] + 0.5 < gpu[0], "{losses:?}");
    assert!(cpu.iter().zip(gpu).all(|(a, b)| (a - b).abs() < 2e-2 * a), "{losses:?}");
}

/// Blocks one by one, scales, norms, averages, in f32: whatever else is trained goes through the same products.
#[test]
fn every_method_runs_on_the_gpu() {
    if multiplier().is_none() {
        return;
    }
    let folder = Folder::new();
    let methods = [
        "--method",
        "block:steps=4",
        "--method",
        "qad:steps=4,lr=1e-5,sequences=2,hidden=10,average=0.8,scales=true,norms=true,recompute=true",
    ];
    let all = ["cpu", "cuda:0"].map(|device| {
        let out = folder.name(&device[..3]);
        succeed(&recover(&out, device, &[&[NVFP4, "--evaluate-every", "2", "--f32"][..], &methods].concat()), &[]);
        watched(&folder.at(&device[..3]))
    });
    let [cpu, gpu] = &all;
    assert!(gpu.len() == cpu.len() && gpu.len() == 10, "{all:?}");
    // In f32 no input is rounded before it is multiplied: until something is learned, only the order of sums differs. What is kept is
    // never worse than what there was.
    let near = |a: f64, b: f64, bound: f64| (a - b).abs() < bound * a;
    assert!((0..2).all(|i| near(cpu[i], gpu[i], 2e-5)) && (2..10).all(|i| near(cpu[i], gpu[i], 0.4)), "{all:?}");
}

/// One block at a time, each of which goes to the device anew.
#[test]
fn blocks_alone_run_on_the_gpu() {
    if multiplier().is_none() {
        return;
    }
    let folder = Folder::new();
    let all = ["cpu", "cuda:0"].map(|device| {
        let out = folder.name(&device[..3]);
        let told = succeed(&recover(&out, device, &[NVFP4, "--f32", "--method", "block:steps=4,samples=8"]), &[]);
        assert!(told.contains("12 blocks, one at a time: "), "{told}");
        watched(&folder.at(&device[..3]))
    });
    let [cpu, gpu] = &all;
    // Two texts, before and after.
    assert!(cpu.len() == gpu.len() && cpu.len() == 4 && (0..2).all(|i| cpu[i + 2] < cpu[i]), "{all:?}");
    let near = |i: usize, bound: f64| (cpu[i] - gpu[i]).abs() < bound * cpu[i];
    assert!((0..2).all(|i| near(i, 2e-5)) && (2..4).all(|i| near(i, 0.1)), "{all:?}");
}

/// Neither the library nor the driver is looked for unless it is asked for, and what is missing is said, with what to install.
#[test]
fn what_is_missing_is_named() {
    let folder = Folder::new();
    let out = folder.name("out");
    let told = fail(&recover(&out, "cuda", &QAD), &[("CUDA_VISIBLE_DEVICES", ""), ("LD_LIBRARY_PATH", "")]);
    assert!(told.contains("no CUDA driver") || told.contains("no device 0"), "{told}");
    if !on_the_stand_in() {
        return;
    }
    let standin = std::env::var("LD_LIBRARY_PATH").unwrap();
    let libraries = standin.split(':').map(|f| project().join(f)).find(|f| f.join("libcublas.so.13").exists()).unwrap();
    let copy = |from: &str, to: &str| folder.write(to, std::fs::read(libraries.join(from)).unwrap());
    copy("libcuda.so.1", "driver/libcuda.so.1");
    let driver = folder.name("driver");
    let home = folder.name("nobody");
    // Without what this machine may have.
    let alone = |more: &[(&str, &str)]| {
        let mut environment = vec![("LD_LIBRARY_PATH", driver.as_str()), ("HOME", &home)];
        environment.extend(["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"].map(|name| (name, "")));
        environment.extend(more.iter().copied());
        let out = folder.name("out");
        let args = recover(&out, "cuda", &QAD);
        let result = run(&args, &environment);
        (result.status.code() == Some(0), said(&result))
    };
    if !Path::new("/usr/local/cuda").exists() {
        let (done, told) = alone(&[]);
        assert!(!done && told.contains("libcublas.so.13") && told.contains("pip install nvidia-cublas"), "{told}");
    }
    // Where pip puts it, in an environment and in a folder that is named.
    copy("libcublas.so.13", "env/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13");
    let environment = folder.name("env");
    let (done, told) = alone(&[("VIRTUAL_ENV", &environment)]);
    assert!(done, "{told}");
    std::fs::remove_dir_all(folder.at("out")).unwrap();
    let lib = folder.name("env/lib/python3.12/site-packages/nvidia/cu13/lib");
    let (done, told) = alone(&[("RECOUP_CUBLAS", &lib)]);
    assert!(done, "{told}");
    std::fs::remove_dir_all(folder.at("out")).unwrap();
    for (place, said) in [
        (folder.name("nowhere"), "expected libcublas.so.13 or libcublas.so.12"),
        (folder.write("text/libcublas.so.13", "no library"), "text/libcublas.so.13"),
        (copy("libcuda.so.1", "another/libcublas.so.13"), "cublasCreate_v2 is not in it"),
    ] {
        let (done, told) = alone(&[("RECOUP_CUBLAS", &place)]);
        assert!(!done && told.contains(said), "{place}: {told}");
    }
    let (done, told) = alone(&[("RECOUP_CUBLAS", &lib), ("STANDIN_CUBLAS_VERSION", "110500")]);
    assert!(!done && told.contains("version 11.5.0 was found, 12.0 or newer is needed"), "{told}");
    let (done, told) = alone(&[("RECOUP_CUBLAS", &lib), ("STANDIN_CUBLAS_WRONG", "1")]);
    assert!(!done && told.contains("does not multiply as the CPU does (x Wᵀ in Bf16"), "{told}");
    assert!(!folder.at("out").exists());
}

#[test]
fn a_device_that_is_not_there_is_named_in_training_too() {
    if multiplier().is_none() {
        return;
    }
    assert!(
        matches!(Multiplier::gpu(99), Err(BackendError::Failed { message, .. }) if message.contains("no device 99"))
    );
    let folder = Folder::new();
    assert!(fail(&recover(&folder.name("out"), "cuda:99", &QAD), &[]).contains("no device 99"));
}
