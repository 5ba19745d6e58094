//! `recoup sweep`: every way is made and measured once, one that fails loses no other, and what is wrong is said before.

use crate::support::command::{BF16, Folder, fail, run, said, succeed};

const TEXT: &str = "src/corpus/calibration.txt";

const MEASURED: [&str; 9] = ["--tasks", "none", "--text", "books", "--window", "64", "--windows", "3", "--threads=2"];

#[test]
fn ways_stand_beside_each_other_with_which_to_take() {
    let folder = Folder::new();
    let out = folder.name("out");
    let recipes = "nvfp4,fp8,nvfp4_fp8_auto:bits=6,nvfp4_fp8_auto:bits=7";
    let arguments = [&["sweep", BF16, "--recipes", recipes, "--calibration", TEXT, "-o", &out][..], &MEASURED].concat();
    let (table, said) = succeed(&arguments);
    assert_eq!(said.matches("linears by").count(), 4, "{said}");
    // What was measured for one budget is not measured for the other.
    let sensitivities: Vec<String> = std::fs::read_dir(folder.at("out"))
        .unwrap()
        .filter_map(|e| std::fs::read_to_string(e.unwrap().path().join("recoup_sensitivity.json")).ok())
        .collect();
    assert_eq!(sensitivities.len(), 2);
    let comparison = folder.json("out/report/comparison.json");
    let labels: Vec<&str> =
        comparison["models"].as_array().unwrap().iter().map(|m| m["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["BF16", "nvfp4", "fp8", "nvfp4_fp8_auto_6", "nvfp4_fp8_auto_7"]);
    let kl = |i: usize| comparison["divergences"][i - 1]["kl"]["value"].as_f64().unwrap();
    let bits = |i: usize| comparison["models"][i]["facts"]["bits_per_weight"].as_f64().unwrap();
    assert!(bits(1) < bits(3) && bits(3) < bits(4) && bits(4) < bits(2) && kl(2) < kl(3) && kl(3) < kl(1));
    let taken = table.split("The best of each size").nth(1).unwrap();
    assert!(taken.contains("nvfp4") && taken.contains("fp8"), "{table}");
    assert!(std::fs::read_to_string(folder.at("out/report/report.html")).unwrap().contains("The best of each size"));
    // Nothing is left to do; another way is added to what there is.
    let (again, said) = succeed(&arguments);
    assert!(again == table && !said.contains("linears by"), "{said}");
    let more = [&["sweep", BF16, "--recipes", "fp8,mxfp4", "-o", &out, "--calibration", TEXT][..], &MEASURED].concat();
    let (_, said) = succeed(&more);
    assert_eq!(said.matches("linears by").count(), 1, "{said}");
}

#[test]
fn what_was_recovered_stands_beside_what_it_was_made_of() {
    let folder = Folder::new();
    let out = folder.name("out");
    let recover = |minutes: &str| {
        let given = ["sweep", BF16, "--recipes", "nvfp4_smooth", "--recover", minutes, "--data", TEXT, "-o", &out];
        run(&[&given[..], &MEASURED].concat())
    };
    // Ten steps take longer on a busy machine than is known here.
    let mut minutes = "0.3".to_owned();
    let mut made = recover(&minutes);
    for _ in 0..4 {
        let said = said(&made);
        let Some(needed) = said.split("give --minutes ").nth(1) else { break };
        let needed: f64 = needed.split_whitespace().next().unwrap().trim_end_matches([',', '.']).parse().unwrap();
        assert!(!made.status.success());
        minutes = format!("{:.2}", 1.5 * needed + 0.1);
        made = recover(&minutes);
    }
    assert!(made.status.success(), "{}", said(&made));
    let comparison = folder.json("out/report/comparison.json");
    assert_eq!(comparison["models"][2]["label"], format!("nvfp4_smooth_recovered_{minutes}min"));
    let kl = |i: usize| comparison["divergences"][i]["kl"]["value"].as_f64().unwrap();
    assert!(kl(1) < kl(0), "{} {}", kl(1), kl(0));
    // The plain model that it was rounded from is as large as the model, and goes.
    let left = std::fs::read_dir(folder.at("out")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|name| !name.ends_with("-unrounded")));
    let said = said(&recover(&minutes));
    assert!(!said.contains("masters from") && !said.contains("linears by"), "{said}");
    // Recovered for another time, it needs that plain model again, and is not trained without.
    let longer = recover(&format!("{:.2}", 1.3 * minutes.parse::<f64>().unwrap()));
    let talk = crate::support::command::said(&longer);
    assert!(longer.status.success() && talk.matches("linears by").count() == 1, "{talk}");
    assert!(talk.contains("masters from unrounded model"), "{talk}");
}

#[test]
fn a_way_that_fails_loses_no_other() {
    let folder = Folder::new();
    let out = folder.name("out");
    let recipe = folder.write("none.json", r#"{"rules": [{"modules": "*.no_such_module", "scheme": "nvfp4"}]}"#);
    let recipes = format!("{recipe},nvfp4");
    let made = run(&[&["sweep", BF16, "--recipes", &recipes, "-o", &out][..], &MEASURED].concat());
    let said = said(&made);
    assert_eq!(made.status.code(), Some(1), "{said}");
    assert!(said.contains("error: none: ended with"), "{said}");
    assert_eq!(folder.json("out/report/comparison.json")["models"][1]["label"], "nvfp4");
}

#[test]
fn what_is_wrong_is_said_before_anything_is_made() {
    let folder = Folder::new();
    let out = folder.name("out");
    let said = |given: &[&str]| fail(&[&["sweep", BF16, "-o", &out][..], given].concat());
    assert!(said(&["--recipes", "nvfp4,nofp4"]).contains("recipe `nofp4`: no shipped recipe"));
    assert!(said(&["--recipes", "nvfp4,nvfp4"]).contains("nvfp4 and nvfp4 would have one name"));
    assert!(said(&["--recipes", "nvfp4:bits=5"]).contains("--bits and --sensitivity are for recipes"));
    assert!(said(&["--recipes", "nvfp4_fp8_auto:bits=many"]).contains("invalid value 'many' for '--bits"));
    assert!(said(&["--tasks", "no_such_task"]).contains("no_such_task"));
    assert!(said(&["--text", "no-such-file.txt"]).contains("no-such-file.txt"));
    assert!(said(&["--calibration", "no-such-file.txt"]).contains("no-such-file.txt"));
    assert!(said(&["--recover", "1", "--data", "no-such-file.txt"]).contains("no-such-file.txt"));
    assert!(said(&["--recover", "soon", "--data", TEXT]).contains("invalid value 'soon' for '--minutes"));
    assert!(said(&["--calibration", "-"]).contains("standard input can be read once"));
    assert!(said(&["--recover", "0.0", "--data", TEXT]).contains("expected minutes"));
    assert!(said(&["--limit=-3"]).contains("-3"));
    assert!(!folder.at("out").exists());
}
