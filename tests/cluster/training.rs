//! One training by several processes of MPI.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::begun::{children, done, is_there};
use crate::support::command::{BF16, Folder, NVFP4, assert_same_files, recoup, said};
use crate::support::json_lines;

const TEXT: &str = "src/corpus/calibration.txt";

/// `mpirun -n N recoup recover …` of the shipped models to `out`.
fn recover(processes: usize, out: &str, more: &[&str]) -> Command {
    let words = [
        "recover",
        NVFP4,
        "--teacher",
        BF16,
        "--data",
        TEXT,
        "--samples",
        "16",
        "--length",
        "64",
        "--watch-samples",
        "2",
        "-o",
        out,
    ];
    let alone = recoup(&[&words[..], more].concat());
    if processes == 0 {
        return alone;
    }
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &processes.to_string()]);
    command.arg(alone.get_program()).args(alone.get_args());
    command.current_dir(alone.get_current_dir().unwrap()).env("CUDA_VISIBLE_DEVICES", "");
    command
}

const METHOD: [&str; 5] =
    ["--method", "qad:steps=6,hidden=10,average=0.5,norms=true", "--evaluate-every", "3", "--f32"];

#[test]
fn processes_give_the_bytes_of_one() {
    let folder = Folder::new();
    let out = |name: &str| folder.name(name);
    let method = ["--method", "qad:steps=6,hidden=10,average=0.5,norms=true,sequences=1,accumulate=4"];
    done(&mut recover(0, &out("alone"), &[&method[..], &METHOD[2..]].concat()));
    for n in [1, 2, 3, 4] {
        let given = if n == 1 { [&method[..], &METHOD[2..]].concat() } else { METHOD.to_vec() };
        let text = said(&done(&mut recover(n, &out(&n.to_string()), &given)));
        assert_same_files(&folder.at("alone"), &folder.at(n.to_string()));
        assert_eq!(text.matches("wrote ").count(), 1, "one of them talks: {text}");
        assert!(n == 1 || text.contains(&format!("{n} processes on one machine, ")), "{text}");
        assert!(n == 1 || text.contains("sequences=1,accumulate=4"), "{text}");
    }
}

#[test]
fn a_process_that_is_lost_ends_all_and_any_number_goes_on() {
    let folder = Folder::new();
    let out = |name: &str| folder.name(name);
    let more = |extra: &[&'static str]| [&METHOD[..], &["--save-every", "0"], extra].concat();
    done(&mut recover(2, &out("whole"), &more(&[])));
    // Whichever of them it is.
    for (victim, then) in [(1, 3), (0, 2), (1, 0)] {
        let name = format!("killed-{victim}-{then}");
        let mut running = recover(2, &out(&name), &more(&[])).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let curve = folder.at(format!("{name}.training/curve.jsonl"));
        let steps = || {
            if curve.exists() { json_lines(&curve).iter().filter(|e| e["event"] == "step").count() } else { 0 }
        };
        let began = Instant::now();
        while steps() < 3 {
            assert!(began.elapsed() < Duration::from_secs(300) && running.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(5));
        }
        let ranks = children(running.id());
        assert_eq!(ranks.len(), 2);
        let killed = Instant::now();
        assert!(Command::new("kill").args(["-9", &ranks[victim].to_string()]).status().unwrap().success());
        let ended = running.wait_with_output().unwrap();
        assert!(!ended.status.success() && killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
        assert!(said(&ended).contains("signal 9"), "{}", said(&ended));
        while ranks.iter().any(|pid| is_there(*pid)) {
            assert!(killed.elapsed() < Duration::from_secs(30), "one of {ranks:?} is still there");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!folder.at(&name).exists());
        done(&mut recover(then, &out(&name), &more(&["--resume"])));
        assert_same_files(&folder.at("whole"), &folder.at(&name));
    }
}

/// Of a model of which a block at a time is in memory; killed in its midst, any number goes on.
#[test]
fn blocks_are_trained_by_all_and_what_was_done_of_them_goes_on() {
    const BLOCK: [&str; 3] = ["--method", "block:steps=6,norms=true", "--f32"];
    let folder = Folder::new();
    let out = |name: &str| folder.name(name);
    done(&mut recover(0, &out("alone"), &["--method", "block:steps=6,norms=true,sequences=1,accumulate=4", "--f32"]));
    for n in [2, 4] {
        let text = said(&done(&mut recover(n, &out(&n.to_string()), &BLOCK)));
        assert!(text.contains("sequences=1,accumulate=4"), "{text}");
        assert_same_files(&folder.at("alone"), &folder.at(n.to_string()));
    }
    for (victim, then) in [(1, 3), (0, 0)] {
        let name = format!("killed-{victim}");
        let mut running = recover(2, &out(&name), &BLOCK).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let trained = |block: usize| folder.at(format!("{name}.training/trained-{block}.safetensors")).exists();
        let began = Instant::now();
        while !trained(3) {
            assert!(began.elapsed() < Duration::from_secs(300) && running.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(2));
        }
        let ranks = children(running.id());
        assert!(Command::new("kill").args(["-9", &ranks[victim].to_string()]).status().unwrap().success());
        assert!(!running.wait_with_output().unwrap().status.success());
        assert!(!folder.at(&name).exists());
        done(&mut recover(then, &out(&name), &[&BLOCK[..], &["--resume"]].concat()));
        assert_same_files(&folder.at("alone"), &folder.at(&name));
    }
}

#[test]
fn what_processes_cannot_share_is_said_once_and_none_is_left() {
    let folder = Folder::new();
    let refused = |n: usize, more: &[&str]| {
        let out = recover(n, &folder.name("out"), more).output().unwrap();
        assert!(!out.status.success() && !folder.at("out").exists(), "{more:?}");
        said(&out)
    };
    for (more, part) in [
        (&["--method", "block:steps=4,rounding=true"][..], "rounding=true is learned in one process"),
        (&["--method", "qad:steps=4,sequences=4"], "sequences=1,accumulate=6"),
        (&["--method", "qad:steps=4,lr=0"], "learning rate"),
        (&["--until-recovery", "0.9", "--on", TEXT], "begun as one process, and 3 were begun"),
        (&["--method", "qad:steps=4", "--data", "/nowhere"], "/nowhere"),
    ] {
        let text = refused(3, more);
        assert!(text.contains(part), "{more:?}: {text}");
        assert!(!part.contains("learning") || text.matches("learning rate").count() == 1, "{text}");
    }
    assert!(refused(5, &METHOD).contains("accumulate=5"), "four sequences for five processes");
}

/// Network namespaces as machines, on a wire that delays frames and loses some: TCP brings them all, and the bytes are the same.
#[test]
fn two_machines_with_a_bad_wire_between_them_give_the_same_bytes() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: no network namespaces");
        return;
    }
    let folder = Folder::new();
    let (here, there) = (folder.name("here"), folder.name("there"));
    done(&mut recover(3, &here, &METHOD));
    let alone = recover(0, &there, &METHOD);
    let words = [alone.get_program()].into_iter().chain(alone.get_args()).map(|w| w.to_str().unwrap());
    let line = words.map(|w| shlex::try_quote(w).unwrap().into_owned()).collect::<Vec<_>>().join(" ");
    let mut command = Command::new(crate::support::project().join("tests/cluster/nodes.sh"));
    command.args(["sh", "-c", &format!("mpirun --oversubscribe --map-by node --hostfile $NODES -n 3 {line}")]);
    command.current_dir(alone.get_current_dir().unwrap()).env("CUDA_VISIBLE_DEVICES", "").env("WIRE_LOSS", "0.002");
    let text = said(&done(&mut command));
    assert!(text.contains("3 processes on 2 machines"), "{text}");
    assert_same_files(Path::new(&here), Path::new(&there));
}

#[test]
fn a_time_is_planned_for_all_of_them_together() {
    let folder = Folder::new();
    let out = folder.name("out");
    let began = Instant::now();
    let text = said(&done(&mut recover(2, &out, &["--minutes", "0.5", "--f32"])));
    assert!(began.elapsed() < Duration::from_secs(120), "{text}");
    let plan = folder.json("out/recoup_plan.json");
    assert!(plan["methods"][0].as_str().unwrap().contains("sequences=1,accumulate=4"), "{plan:#}");
    // The plan again, by one.
    let again = folder.name("again");
    let words = [
        "recover",
        NVFP4,
        "--teacher",
        BF16,
        "--data",
        TEXT,
        "--plan",
        &format!("{out}/recoup_plan.json"),
        "-o",
        &again,
    ];
    done(&mut recoup(&words));
    for file in ["model.safetensors", "recoup_curve.jsonl"] {
        assert!(
            std::fs::read(Path::new(&out).join(file)).unwrap() == std::fs::read(Path::new(&again).join(file)).unwrap(),
            "{file}"
        );
    }
}
