//! `recoup recover` by a time, by a preset and by a stored plan: what is told, that the plan gives the same bytes, and what ends
//! it early.

use std::path::Path;

use serde_json::Value;

use super::recover::TEXT;
use crate::support::command::{
    BF16 as TEACHER, Folder, NVFP4 as STUDENT, assert_same_files, fail, lines, recoup, run, said, succeed,
};
#[cfg(unix)]
use crate::support::held::Held;

fn arguments<'a>(student: &[&'a str], out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let common = ["--teacher", TEACHER, "--data", TEXT, "--threads", "2", "-o", out];
    ["recover"].iter().chain(student).chain(&common).chain(more).copied().collect()
}

/// What of the amounts is given along with a time, so that steps are short.
const SHORT: [&str; 4] = ["--length", "64", "--watch-samples", "2"];

fn plan(folder: &Folder, name: &str) -> Value {
    folder.json(format!("{name}/recoup_plan.json"))
}

/// Steps fitted to a time; the plan gives the same bytes, whatever the clock says by then.
#[test]
fn a_time_becomes_a_plan_that_gives_the_same_bytes() {
    let folder = Folder::new();
    let (first, second) = (folder.name("first"), folder.name("second"));
    // As long as the least takes on this machine, and more, however busy it is.
    let mut minutes = "0.3".to_owned();
    let made = (0..6).any(|_| {
        let out = run(&arguments(&[STUDENT], &first, &[&["--minutes", &minutes], &SHORT[..]].concat()));
        let said = said(&out);
        if let Some(needed) = said.split("give --minutes ").nth(1) {
            let needed: f64 = needed.split_whitespace().next().unwrap().parse().unwrap();
            minutes = format!("{:.2}", 1.5 * needed + 0.1);
        }
        assert!(out.status.success() || said.contains("is too little here"), "{said}");
        out.status.success()
    });
    assert!(made, "no time was enough, up to {minutes} minutes");
    let made = plan(&folder, "first");
    let method = made["methods"][0].as_str().unwrap();
    assert!(method.starts_with("qad:steps=") && method.contains("hidden=1"), "{made:#}");
    assert_eq!((&made["length"], &made["watch_samples"]), (&64.into(), &2.into()));
    let steps: usize = method["qad:steps=".len()..].split(',').next().unwrap().parse().unwrap();
    assert!(steps >= 10, "{made:#}");
    assert_eq!(made["samples"], 4 * steps);
    assert!(made["measured"]["stages"][0]["step"].as_f64().unwrap() > 0.0, "{made:#}");
    let path = folder.name("first/recoup_plan.json");
    succeed(&arguments(&[STUDENT], &second, &["--plan", &path]));
    assert_same_files(&folder.at("first"), &folder.at("second"));
}

/// Killed under a time and gone on with, by the plan that was made first; and the same bytes by the plan alone, killed too.
#[cfg(unix)]
#[test]
fn a_plan_gives_the_same_bytes_after_being_killed() {
    let folder = Folder::new();
    let (first, second, third) = (folder.name("first"), folder.name("second"), folder.name("third"));
    let save = ["--save-every", "0", "--resume"];
    // Time enough on any machine: what is cut depends on the clock.
    let asked = ["--minutes", "1000", "--method", "qad:steps=20", "--evaluate-every", "4"];
    let timed = arguments(&[STUDENT], &first, &[&asked[..], &SHORT, &save].concat());
    let mut run = Held::start(recoup(&timed));
    run.until(|| lines(&folder.at("first.training/curve.jsonl")) >= 6);
    run.kill();
    // Another time is another plan.
    let mut longer = timed.clone();
    longer[11] = "2000";
    let error = fail(&longer);
    assert!(error.contains("was planned for another minutes: 1000.0, and now it is 2000.0"), "{error}");
    let (_, said) = succeed(&timed);
    assert!(!said.contains("measuring"), "it was planned already: {said}");

    let by_plan = folder.name("first/recoup_plan.json");
    let by_plan = ["--plan", by_plan.as_str()];
    succeed(&arguments(&[STUDENT], &second, &by_plan));
    assert_same_files(&folder.at("first"), &folder.at("second"));
    let again = arguments(&[STUDENT], &third, &[&by_plan[..], &save].concat());
    let mut run = Held::start(recoup(&again));
    run.until(|| lines(&folder.at("third.training/curve.jsonl")) >= 6);
    run.kill();
    succeed(&again);
    assert_same_files(&folder.at("first"), &folder.at("third"));
    assert!(!folder.at("third.training").exists());
}

/// What it will do, how long and with what, before it begins; and while it goes on, when it ends and what it would keep.
#[test]
fn a_plan_is_told_and_what_is_given_stays() {
    let folder = Folder::new();
    let out = folder.name("out");
    let method =
        ["--method", "block:steps=2,samples=8", "--method", "qad:lr=3e-5,steps=12,scales=true", "--minutes", "1000"];
    let given = ["--samples", "24", "--evaluate-every", "4", "--seed", "3", "--keep-stages"];
    let (_, said) = succeed(&arguments(&[STUDENT], &out, &[&method[..], &SHORT, &given].concat()));
    for part in [
        "the plan for 1000 minutes, ",
        "of which are gone",
        "2 steps of every block, ",
        "12 steps of 4 x 64 tokens, ",
        "every 4 steps",
        "over after about ",
        "peak memory ",
        "on disk meanwhile",
        "Ctrl-C writes the best until then",
        "; over in ",
        "ended now (Ctrl-C) it keeps step ",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let made = plan(&folder, "out");
    assert_eq!(made["methods"][0], "block:warmup=0,steps=2,samples=8", "{made:#}");
    assert_eq!(made["methods"][1], "qad:warmup=3,hidden=100,average=0.58,lr=3e-5,steps=12,scales=true");
    assert_eq!((&made["samples"], &made["evaluate_every"], &made["seed"]), (&24.into(), &4.into(), &3.into()));
    assert!(made["cuts"] == serde_json::json!([[], []]), "{made:#}");
    // Nothing of the measuring is in the result: it is what the same settings give without it.
    let (other, by_hand) = (folder.name("other"), ["--method", "block:warmup=0,steps=2,samples=8", "--method"]);
    let method = ["qad:warmup=3,hidden=100,average=0.58,lr=3e-5,steps=12,scales=true"];
    succeed(&arguments(&[STUDENT], &other, &[&by_hand[..], &method, &SHORT, &given].concat()));
    std::fs::remove_file(folder.at("out/recoup_plan.json")).unwrap();
    assert_same_files(&folder.at("out"), &folder.at("other"));
}

/// A preset is done whatever it takes, from the recipe that starts best where nothing is given; ended early it keeps the best,
/// and its plan says where it ended.
#[cfg(unix)]
#[test]
fn a_preset_that_is_ended_by_ctrl_c_keeps_the_best_and_a_plan_that_gives_the_same_bytes() {
    let folder = Folder::new();
    let (out, again) = (folder.name("out"), folder.name("again"));
    let preset = [&["--preset", "best"], &SHORT[..], &["--evaluate-every", "2"]].concat();
    // A background job of a shell ignores Ctrl-C, and so do its children, this test's run among them.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    if ignored.unwrap_or(0) & 2 != 0 {
        println!("skipped: this process ignores Ctrl-C");
        return;
    }
    let mut run = Held::start(recoup(&arguments(&[], &out, &preset)));
    run.until(|| lines(&folder.at("out.training/curve.jsonl")) >= 5);
    let id = rustix::process::Pid::from_raw(run.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    let (status, said) = run.let_go();
    assert!(status.success() && said.contains("ending early with the best so far"), "{status}: {said}");
    let made = plan(&folder, "out");
    assert_eq!((&made["recipe"], &made["samples"]), (&"nvfp4_best_channels".into(), &1200.into()), "{made:#}");
    let cut = &made["cuts"][0][0];
    assert!(cut["at"] == cut["steps"] && cut["at"].as_u64().unwrap() < 300, "{made:#}");
    let record: Value = folder.json("out/recoup_recovery.json");
    assert_eq!(record["cuts"], made["cuts"]);
    let by_plan = folder.name("out/recoup_plan.json");
    succeed(&arguments(&[], &again, &["--plan", &by_plan]));
    assert_same_files(&folder.at("out"), &folder.at("again"));
}

#[test]
fn what_cannot_be_planned_is_told_with_what_would_do() {
    let folder = Folder::new();
    let out = folder.name("out");
    let try_with = |student: &[&str], more: &[&str]| {
        let error = fail(&arguments(student, &out, &[more, &SHORT].concat()));
        assert!(!Path::new(&out).exists() && !Path::new(&format!("{out}.training")).exists(), "{more:?}: {error}");
        error
    };
    let error = try_with(&[STUDENT], &["--minutes", "0.0001"]);
    assert!(error.contains("--minutes 0.0001 is too little") && error.contains("10 steps of qad"), "{error}");
    let needed: f64 = error.split("give --minutes ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(needed > 0.0 && needed < 600.0, "{error}");
    let error = try_with(&[STUDENT], &["--minutes", "1", "--method", "qad:steps=100000000"]);
    assert!(error.contains("100000000 steps of qad") && error.contains("give --minutes"), "{error}");
    let error = try_with(&[STUDENT], &["--minutes", "1", "--method", "magic"]);
    assert!(error.contains("block, qad and qat"), "{error}");
    let mut stdin = arguments(&[STUDENT], &out, &["--minutes", "1"]);
    stdin[5] = "-";
    assert!(fail(&stdin).contains("standard input can be read once"));
    for contrary in [
        &["--minutes", "1", "--preset", "quick"][..],
        &["--preset", "quick", "--method", "qad"],
        &["--plan", "x.json", "--minutes", "1"],
        &["--plan", "x.json", "--samples", "8"],
        &["--plan", "x.json", "--seed", "1"],
        &["--preset", "slow"],
        &["--minutes", "0"],
        &["--minutes", "many"],
        &[],
    ] {
        let out = run(&arguments(&[STUDENT], &out, contrary));
        assert_eq!(out.status.code(), Some(2), "{contrary:?}");
    }
}

#[test]
fn a_plan_of_another_model_or_of_other_data_is_refused() {
    let folder = Folder::new();
    let (out, other) = (folder.name("out"), folder.name("other"));
    let few = ["--minutes", "1000", "--method", "qad:steps=2", "--samples", "8"];
    succeed(&arguments(&[STUDENT], &out, &[&few[..], &SHORT].concat()));
    let path = folder.name("out/recoup_plan.json");
    let by_plan = ["--plan", path.as_str()];
    let refused = |args: &[&str], part: &str| {
        let error = fail(args);
        assert!(error.contains("recoup_plan.json") && error.contains(part), "{part}: {error}");
        assert!(!folder.at("other").exists(), "{error}");
    };
    let mut args = arguments(&[STUDENT], &other, &by_plan);
    args[3] = "models/books-nvfp4-qat";
    refused(&args, "is for another teacher");
    let mut args = arguments(&[STUDENT], &other, &by_plan);
    let text = folder.write("other.txt", "It was another text, of which there is a lot. ".repeat(400));
    args[5] = &text;
    refused(&args, "is for other data");
    refused(&arguments(&["models/books-nvfp4-qad"], &other, &by_plan), "is for another quantized model");
    assert!(fail(&arguments(&[], &other, &by_plan)).contains("give that model"));
    let nothing = folder.write("recoup_plan.json", "{}");
    refused(&arguments(&[STUDENT], &other, &["--plan", &nothing]), "is no plan");
    // Refused before anything was made of it, so that the right one can be given at once.
    succeed(&arguments(&[STUDENT], &other, &by_plan));
    assert_same_files(&folder.at("out"), &folder.at("other"));
}
