//! `recoup lab`: what is finished is not done again, what changed is, and the table has what the files have.

use serde_json::{Value, json};

use crate::support::command::{BF16, Folder, NVFP4, fail, succeed};

const TEXT: &str = "src/corpus/calibration.txt";

/// A trial of the shipped model: it as it is, and two ways to train it.
fn trial(method: &str) -> Value {
    json!({
        "teacher": BF16,
        "texts": ["books"],
        "common": [NVFP4, "--data", TEXT, "--samples", "16", "--length", "64", "--watch-samples", "0", "--threads", "1"],
        "baseline": "plain",
        "configurations": {
            "as it is": NVFP4,
            "plain": ["--method", "qad:steps=4"],
            "scales": ["--method", method],
        },
    })
}

#[test]
fn configurations_are_trained_once_and_stand_beside_each_other() {
    let folder = Folder::new();
    let out = folder.name("out");
    let go = |method: &str| {
        let file = folder.write("trial.json", trial(method).to_string());
        succeed(&["lab", &file, "-o", &out, "--windows", "4", "--window", "64"])
    };
    let (table, said) = go("qad:steps=4,scales=true,scale_lr=0.02");
    assert_eq!(said.matches("masters from").count(), 2, "{said}");
    let row = |name: &str| -> Vec<String> {
        let line = table.lines().find(|l| l.trim_start_matches(['|', ' ']).starts_with(name)).unwrap();
        line.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect()
    };
    let comparison = folder.json("out/compare/comparison.json");
    for (index, name) in ["as it is", "plain", "scales"].into_iter().enumerate() {
        let found = comparison["divergences"].as_array().unwrap().iter().find(|d| d["model"] == index + 1).unwrap();
        assert!(row(name)[4].starts_with(&format!("{:.4} ±", found["kl"]["value"].as_f64().unwrap())), "{table}");
    }
    assert!(row("as it is")[1..4].iter().all(String::is_empty), "{table}");
    assert!(row("plain")[5].is_empty() && row("scales")[5].contains('['), "{table}");
    let share = |name: &str, column: usize| row(name)[column].trim_end_matches(" %").parse::<f64>().unwrap();
    assert!(share("plain", 2) > 0.0 && row("plain")[3].is_empty() && share("scales", 3) > 1.0, "{table}");
    // Nothing is left to do; another setting is another run.
    let (again, said) = go("qad:steps=4,scales=true,scale_lr=0.02");
    assert_eq!((again, said.matches("masters from").count()), (table, 0));
    let (_, said) = go("qad:steps=4,scales=true,scale_lr=0.03");
    assert_eq!(said.matches("masters from").count(), 1, "{said}");
}

#[test]
fn a_trial_that_is_none_is_refused_before_anything_is_trained() {
    let folder = Folder::new();
    let out = folder.name("out");
    let said = |change: &dyn Fn(&mut Value)| {
        let mut trial = trial("qad:steps=4");
        change(&mut trial);
        fail(&["lab", &folder.write("trial.json", trial.to_string()), "-o", &out])
    };
    assert!(said(&|t| t["baseline"] = json!("other")).contains("the baseline `other` is none of its configurations"));
    assert!(said(&|t| t["texts"] = json!([])).contains("must name one at least"));
    assert!(
        said(&|t| t["configurations"]["plain"] = json!(3))
            .contains("`plain` is neither a list of arguments nor a model")
    );
    assert!(said(&|t| t["steps"] = json!(3)).contains("unknown field `steps`"));
    assert!(!folder.at("out").exists());
}
