//! `recoup recover --until-recovery`: it stops as soon as enough is kept, and says so where nothing keeps enough.

use serde_json::Value;

use crate::support::command::{BF16, Folder, NVFP4, fail, run, said, succeed};

const TEXT: &str = "src/corpus/calibration.txt";

fn arguments<'a>(out: &'a str, share: &'a str, on: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let all = ["recover", "--teacher", BF16, "--until-recovery", share, "--on", on, "--data", TEXT, "-o", out];
    [&all[..], &["--length", "32", "--watch-samples", "2", "--threads", "2"], more].concat()
}

#[test]
fn it_stops_as_soon_as_enough_is_kept() {
    let folder = Folder::new();
    let out = folder.name("out");
    let (_, said) = succeed(&arguments(&out, "0.6", TEXT, &[]));
    assert!(said.contains("nvfp4: keeps ") && said.contains("nvfp4 keeps at least 60.0 %"), "{said}");
    assert!(!said.contains("masters from") && said.matches("linears by").count() == 1, "{said}");
    let record = folder.json("out/recoup_until.json");
    let kept = |of: &str| record["looks"][0]["kept"][of].as_f64().unwrap();
    assert!(record["met"] == true && record["looks"].as_array().unwrap().len() == 1, "{record:#}");
    assert!(kept("low") >= 0.6 && kept("low") < kept("estimate") && kept("estimate") < kept("high"), "{record:#}");
    // It is a model like any other, and the share is what a comparison says of it, in a wider interval than one look's.
    let compared = folder.name("compared");
    let compare = ["compare", BF16, &out, "--tasks", "none", "--text", TEXT, "--no-speed", "--json", "-o", &compared];
    let comparison: Value = serde_json::from_str(&succeed(&compare).0).unwrap();
    let ratio = &comparison["divergences"][0]["log_perplexity_ratio"];
    let (lost, error) = (ratio["value"].as_f64().unwrap(), ratio["standard_error"].as_f64().unwrap());
    assert!((kept("estimate") - (-lost).exp()).abs() < 1e-9, "{record:#}");
    assert!((-lost - 1.96 * error).exp() > kept("low"), "{record:#}");
    // As a run leaves it that was killed after it had written the plain model and before the quantized one.
    let work = std::fs::read_dir(folder.at("out.until")).unwrap().map(|e| e.unwrap().path());
    let made: Vec<_> = work.filter(|path| path.join("config.json").exists()).collect();
    assert_eq!(made.len(), 2, "{made:?}");
    let quantized = made.iter().find(|path| !path.to_string_lossy().ends_with("-unrounded")).unwrap();
    for folder in [quantized, &folder.at("out")] {
        std::fs::remove_dir_all(folder).unwrap();
    }
    let (_, said) = succeed(&arguments(&out, "0.6", TEXT, &[]));
    assert!(said.matches("linears by").count() == 1 && folder.json("out/recoup_until.json") == record, "{said}");
}

#[test]
fn what_is_not_reached_is_said_and_nothing_is_done_again() {
    let folder = Folder::new();
    let out = folder.name("out");
    let go = || run(&[arguments(&out, "0.9999", "books", &[]), vec![NVFP4, "--limit", "24"]].concat());
    let made = go();
    let talk = said(&made);
    assert_eq!(made.status.code(), Some(3), "{talk}");
    assert_eq!(talk.matches("masters from").count(), 2, "{talk}");
    let record = folder.json("out/recoup_until.json");
    let looks = record["looks"].as_array().unwrap();
    assert_eq!(
        looks.iter().map(|l| l["model"].as_str().unwrap()).collect::<Vec<_>>(),
        ["given", "given_quick", "given_best"]
    );
    let best = looks.iter().max_by(|a, b| {
        let of = |l: &Value| l["kept"]["estimate"].as_f64().unwrap();
        of(a).total_cmp(&of(b))
    });
    assert!(record["met"] == false && record["chosen"] == best.unwrap()["model"], "{record:#}");
    assert!(
        folder.at("out/config.json").exists() && talk.contains("is not shown") || talk.contains("more bits"),
        "{talk}"
    );
    std::fs::remove_dir_all(folder.at("out")).unwrap();
    let again = go();
    assert_eq!(again.status.code(), Some(3));
    assert!(!said(&again).contains("masters from") && folder.json("out/recoup_until.json") == record);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_made() {
    let folder = Folder::new();
    let out = folder.name("out");
    let said = |on: &str, more: &[&str]| fail(&arguments(&out, "0.9", on, more));
    assert!(said("no_such_task", &[]).contains("--on: there is no task"));
    assert!(said(TEXT, &["--recipe", "nofp4"]).contains("recipe `nofp4`: no shipped recipe"));
    assert!(said(TEXT, &["--data", "no-such-file.txt"]).contains("no-such-file.txt"));
    for (share, more) in [("98", &[][..]), ("0.9", &["--minutes", "3"]), ("0.9", &["--method", "qad"])] {
        assert_eq!(run(&arguments(&out, share, TEXT, more)).status.code(), Some(2), "{share} {more:?}");
    }
    assert!(!folder.at("out").exists() && !folder.at("out.until").exists());
}
