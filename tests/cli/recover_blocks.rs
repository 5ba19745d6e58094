//! Blocks trained one at a time: what it takes is told and stays that of a block; killed anywhere it goes on; a time is kept.

use serde_json::{Value, json};

use crate::support::command::{BF16 as TEACHER, Folder, NVFP4 as STUDENT, assert_same_files, fail, recoup, succeed};
#[cfg(unix)]
use crate::support::held::Held;

const COMMON: [&str; 10] = [
    "--teacher",
    TEACHER,
    "--data",
    "src/corpus/calibration.txt",
    "--samples",
    "24",
    "--length",
    "64",
    "--watch-samples",
    "2",
];

fn arguments<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    ["recover"].iter().chain(more).chain(&COMMON).chain(&["-o", out]).copied().collect()
}

#[cfg(unix)]
#[test]
fn blocks_alone_give_the_same_bytes_whatever_the_threads_and_after_being_killed_anywhere() {
    let folder = Folder::new();
    let (first, second, third) = (folder.name("first"), folder.name("second"), folder.name("third"));
    let method =
        ["--recipe", "nvfp4_smooth", "--method", "block:steps=6,samples=16,norms=true,scales=true", "--threads"];
    let (_, said) = succeed(&arguments(&first, &[&method[..], &["2"]].concat()));
    for part in
        ["12 blocks, one at a time: ", " each on average, ", " on disk meanwhile", " for the result", "peak memory "]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    succeed(&arguments(&second, &[&method[..], &["1"]].concat()));
    assert_same_files(&folder.at("first"), &folder.at("second"));
    let resumed = arguments(&third, &[&method[..], &["2", "--resume"]].concat());
    // Before the first block is there, among the blocks, and when all are.
    for events in [1, 5, 13] {
        Held::killed_at(recoup(&resumed), &folder.at("third.training/curve.jsonl"), events);
        assert!(!folder.at("third").exists());
    }
    succeed(&resumed);
    assert_same_files(&folder.at("first"), &folder.at("third"));
    assert!(!folder.at("third.training").exists());
    let record = folder.json("first/recoup_recovery.json");
    let watched = &record["watched_loss"];
    let sum = |at: &str| watched[at].as_object().unwrap().values().filter_map(Value::as_f64).sum::<f64>();
    assert!(sum("after") < sum("before"), "{record:#}");
    assert!(record["changed"]["codes"]["changed"].as_u64().unwrap() > 0, "{record:#}");
}

/// Under a time the plan is made of what a block takes; the same plan gives the same bytes, and Ctrl-C the best until then.
#[test]
fn a_time_is_planned_for_blocks_and_its_plan_gives_the_same_bytes() {
    let folder = Folder::new();
    let (out, again) = (folder.name("out"), folder.name("again"));
    let (_, said) = succeed(&arguments(&out, &[STUDENT, "--method", "block:steps=5", "--minutes", "1000"]));
    assert!(said.contains("5 steps of every block, ") && said.contains("on disk meanwhile"), "{said}");
    let plan = folder.name("out/recoup_plan.json");
    let given = [
        "recover",
        STUDENT,
        "--teacher",
        TEACHER,
        "--data",
        "src/corpus/calibration.txt",
        "--plan",
        &plan,
        "-o",
        &again,
    ];
    succeed(&given);
    assert_same_files(&folder.at("out"), &folder.at("again"));
    let error =
        fail(&arguments(&folder.name("short"), &[STUDENT, "--method", "block:steps=100000", "--minutes", "0.2"]));
    assert!(error.contains("--minutes 0.2 is too little here"), "{error}");
}

/// Six times the layers take no more memory: neither weights nor what trains them is there for more than a block.
#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_number_of_blocks() {
    let folder = Folder::new();
    succeed(&["convert", "--model-shape", "tiny", "-o", &folder.name("tiny")]);
    let mut config = folder.json("tiny/config.json");
    for (key, value) in [("hidden_size", 256), ("intermediate_size", 1024), ("head_dim", 64)] {
        config[key] = json!(value);
    }
    let peak = |layers: usize, method: &str| {
        let mut config = config.clone();
        config["num_hidden_layers"] = json!(layers);
        let shape = folder.write("shape.json", config.to_string());
        let name = |what: &str| folder.name(format!("{what}-{layers}"));
        let (student, teacher, out) = (name("student"), name("teacher"), name(&format!("out-{}", method.len())));
        for (model, recipe) in [(&teacher, None), (&student, Some(["--recipe", "nvfp4"]))] {
            if std::fs::exists(model).unwrap() {
                continue;
            }
            let all = ["convert", "--model-shape", &shape, "-o", model];
            succeed(&all.iter().copied().chain(recipe.into_iter().flatten()).collect::<Vec<_>>());
        }
        let given = ["--method", method, "--samples", "8", "--length", "32", "--watch-samples", "1", "--threads", "2"];
        let models = ["recover", &student, "--teacher", &teacher, "--data", "src/corpus/calibration.txt", "-o", &out];
        let (_, said) = succeed(&[&models[..], &given].concat());
        let memory = said.rsplit_once("peak memory ").unwrap().1.trim();
        let (number, unit) = memory.split_once(' ').unwrap();
        number.parse::<f64>().unwrap() * if unit.starts_with("GiB") { 1024.0 } else { 1.0 }
    };
    let [few, many] = [4, 24].map(|layers| peak(layers, "block:steps=2"));
    let whole = peak(24, "qad:steps=1,warmup=0");
    // All that is beside a block of 20 MiB is some 90.
    assert!(many < 1.6 * few && 4.0 * many < whole, "{few} MiB, {many} MiB, with the whole model {whole} MiB");
}
