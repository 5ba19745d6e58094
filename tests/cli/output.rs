//! Work that is not lost: outputs of every kind, readers and signals that come and go, two runs in one place.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::command::{BF16, Folder, NVFP4, copy_model, names, recoup, run, said};
#[cfg(unix)]
use crate::support::held::Held;
use crate::support::project;

fn quantize(out: &Path, recipe: &str) -> Command {
    recoup(&["quantize".as_ref(), BF16.as_ref(), "-o".as_ref(), out.as_os_str(), "--recipe".as_ref(), recipe.as_ref()])
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_the_model_is_looked_at() {
    let folder = Folder::new();
    let at = |name: &str| folder.name(name);
    folder.write("file", "x");
    std::fs::create_dir(at("full")).unwrap();
    folder.write("full/precious", "x");
    // The model does not exist: only what looks at the output first can complain of the output.
    for verb in [
        &["quantize", "no-model", "--recipe", "nvfp4"][..],
        &["convert", "no-model"],
        &["recover", "no-model", "--teacher", "no-model", "--method", "qad", "--data", "no-data"],
        &["pretrain", "no-model", "--data", "no-data", "--watch", "no-data"],
    ] {
        for (output, part) in [("file", "no folder"), ("full", "not empty"), ("file/out", "file")] {
            let output = at(output);
            let out = run(&[verb, &["-o", &output]].concat());
            assert_eq!(out.status.code(), Some(1), "{verb:?}: {}", said(&out));
            assert!(said(&out).contains(&output) && said(&out).contains(part), "{verb:?}: {}", said(&out));
        }
    }
    for verb in [&["eval", BF16, "--tasks", "piqa", "-L", "2"][..], &["compare", BF16, BF16, "--tasks", "none"]] {
        let out = run(&[verb, &["-o", &at("file")]].concat());
        assert!(!out.status.success() && said(&out).contains("file: cannot create"), "{}", said(&out));
    }
    assert_eq!(names(folder.path()), ["file", "full"]);
    assert_eq!(names(&folder.at("full")), ["precious"]);
}

/// A folder of that name here is not what is meant.
#[cfg(not(feature = "object-store"))]
#[test]
fn an_address_is_no_output_folder() {
    let folder = Folder::new();
    let configurations = serde_json::json!({"a": NVFP4, "b": BF16});
    let trial = serde_json::json!({"teacher": BF16, "texts": ["README.md"], "common": [], "baseline": "a",
        "configurations": configurations});
    folder.write("trial.json", trial.to_string());
    let trial = folder.name("trial.json");
    for verb in [
        &["quantize", BF16, "--recipe", "nvfp4"][..],
        &["convert", BF16],
        &["eval", BF16, "--tasks", "piqa", "-L", "2"],
        &["compare", BF16, BF16, "--tasks", "none"],
        &["sweep", BF16, "--recipes", "nvfp4"],
        &["lab", &trial],
        &["recover", NVFP4, "--teacher", BF16, "--method", "qad", "--data", "README.md"],
    ] {
        let out = run(&[verb, &["-o", "s3://bucket/x"]].concat());
        assert_eq!(out.status.code(), Some(1), "{verb:?}: {}", said(&out));
        let told = said(&out);
        assert!(told.contains("s3://bucket/x") && told.contains("folders"), "{verb:?}: {told}");
        assert!(!project().join("s3:").exists(), "{verb:?}");
    }
}

/// Runs a line of the shell in a user's own name space, where one may mount; `None` where that cannot be had, or the
/// line ends with 77.
#[cfg(target_os = "linux")]
fn where_one_may_mount(line: &str) -> Option<Output> {
    let Ok(ran) = Command::new("unshare").args(["-rm", "sh", "-c", line]).current_dir(project()).output() else {
        println!("skipped: no unshare here");
        return None;
    };
    if ran.status.code() == Some(77) || said(&ran).contains("unshare") {
        println!("skipped: nothing can be mounted here: {}", said(&ran));
        return None;
    }
    Some(ran)
}

#[cfg(target_os = "linux")]
#[test]
fn a_mounted_folder_is_filled() {
    let folder = Folder::new();
    let out = folder.at("out");
    std::fs::create_dir(&out).unwrap();
    let line = format!(
        "mount -t tmpfs tmpfs {out} || exit 77; {recoup} quantize {BF16} -o {out} --recipe nvfp4_smooth || exit 1; \
         {recoup} inspect {out} >{folder}/shown || exit 1; ls -A {out} >{folder}/listed",
        out = out.display(),
        recoup = env!("CARGO_BIN_EXE_recoup"),
        folder = folder.path().display()
    );
    let Some(ran) = where_one_may_mount(&line) else { return };
    assert!(ran.status.success(), "{}", said(&ran));
    let listed = folder.read("listed");
    assert!(listed.contains("model.safetensors") && !listed.contains(".recoup"), "{listed}");
    assert_eq!(names(folder.path()), ["listed", "out", "shown"]);
}

#[cfg(target_os = "linux")]
#[test]
fn answers_that_would_not_fit_are_refused_before_the_first() {
    let folder = Folder::new();
    let (out, comparison) = (folder.at("out"), folder.at("comparison"));
    [&out, &comparison].iter().for_each(|f| std::fs::create_dir(f).unwrap());
    let line = format!(
        "mount -t tmpfs -o size=64k tmpfs {out} || exit 77; mount -t tmpfs -o size=64k tmpfs {comparison} || exit 77; \
         {recoup} eval {BF16} --tasks hellaswag,arc_easy -L 100 -o {out}; echo $?; ls {out}; \
         {recoup} compare {BF16} models/books-nvfp4 --tasks hellaswag -L 50 --text none --no-speed -o {comparison}; echo $?",
        out = out.display(),
        comparison = comparison.display(),
        recoup = env!("CARGO_BIN_EXE_recoup"),
    );
    let Some(ran) = where_one_may_mount(&line) else { return };
    let said = said(&ran);
    assert_eq!(said.matches("what is asked and answered needs about").count(), 2, "{said}");
    assert!(said.contains("free some space"), "{said}");
    let shown = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert_eq!(shown.split_whitespace().filter(|w| *w == "1").count(), 2, "{shown}{said}");
}

#[cfg(target_os = "linux")]
#[test]
fn talk_that_nobody_reads_ends_no_work() {
    let folder = Folder::new();
    let at = |name: &str| folder.name(name);
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let gone = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        writer
    };
    let (q, r, e, c) = (at("q"), at("r"), at("e"), at("c"));
    let recover = ["recover", NVFP4, "--teacher", BF16, "--data", "built-in", "--samples", "4", "--length", "32"];
    let method = ["--method", "qad:steps=2", "--evaluate-every", "1", "-o", &r];
    let compare = ["compare", BF16, NVFP4, "--tasks", "none", "--text", "books", "--windows", "2", "--no-speed"];
    for (verb, made) in [
        (["quantize", BF16, "--recipe", "nvfp4", "-o", &q].to_vec(), "q/model.safetensors"),
        ([&recover[..], &method].concat(), "r/model.safetensors"),
        (["eval", BF16, "--tasks", "piqa", "-L", "3", "-o", &e].to_vec(), "e/results.json"),
        ([&compare[..], &["-o", &c]].concat(), "c/report.html"),
    ] {
        let status = recoup(&verb).stdout(gone()).stderr(full()).env("RECOUP_LOG_SECONDS", "0").status().unwrap();
        assert_eq!(status.code(), Some(0), "{verb:?}");
        assert!(folder.at(made).is_file(), "{verb:?}");
    }
    // A gate is not passed because nobody reads the table.
    let again = [&compare[..], &["-o", &c, "--require-recovery", "5"]].concat();
    let again: Vec<&str> = again.iter().map(|a| if *a == "none" { "piqa" } else { *a }).chain(["-L", "2"]).collect();
    assert_eq!(recoup(&again).stdout(gone()).stderr(full()).status().unwrap().code(), Some(3));
    // Data that cannot be written is an error, when everything else is done.
    let e2 = at("e2");
    let out = recoup(&["eval", BF16, "--tasks", "piqa", "-L", "3", "-o", &e2]).stdout(full()).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(said(&out).contains("standard output cannot be written"), "{}", said(&out));
    assert!(Path::new(&e2).join("results.json").is_file());
}

#[test]
fn a_log_says_how_far_the_work_is() {
    let folder = Folder::new();
    let at = |name: &str| folder.name(name);
    let out = recoup(&["eval", BF16, "--tasks", "piqa", "-L", "4", "-o", &at("e")])
        .env("RECOUP_LOG_SECONDS", "0")
        .output()
        .unwrap();
    assert!(said(&out).contains("books-bf16: answers: 8/8"), "{}", said(&out));
    let out = quantize(Path::new(&at("q")), "nvfp4_best").env("RECOUP_LOG_SECONDS", "0").output().unwrap();
    for what in ["loading", "smoothing: 1/", "rounding: 1/"].iter().skip(1) {
        assert!(said(&out).contains(what), "{what}: {}", said(&out));
    }
}

#[cfg(unix)]
fn signal(name: &str, process: u32) {
    assert!(Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status().unwrap().success());
}

/// What ended the process.
#[cfg(unix)]
fn signal_of(status: std::process::ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(unix)]
#[test]
fn a_run_that_is_told_to_end_says_so_and_takes_its_scratch_away() {
    let folder = Folder::new();
    let out = folder.at("out");
    // A background job of a shell ignores Ctrl-C, and so do its children, this test's run among them.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    let heard = |code: i32| ignored.unwrap_or(0) & (1 << (code - 1)) == 0;
    for (name, code) in [("TERM", 15), ("INT", 2)].into_iter().filter(|(_, code)| heard(*code)) {
        // It reads a text that never ends.
        let mut command = quantize(&out, "nvfp4_best");
        command.args(["--calibration", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut text = child.stdin.take().unwrap();
        text.write_all(&vec![b' '; 1 << 20]).unwrap();
        assert!(folder.at(".out.recoup").exists());
        signal(name, child.id());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(signal_of(ended.status), Some(code), "{}", said(&ended));
        assert!(said(&ended).contains("interrupted"), "{}", said(&ended));
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
    }
}

#[cfg(unix)]
#[test]
fn a_run_that_is_told_to_end_ends_though_nobody_reads_what_it_says() {
    let folder = Folder::new();
    let mut run = Held::start(quantize(&folder.at("out"), "nvfp4_best"));
    run.until(|| folder.at(".out.recoup/smoothed").exists());
    signal("TERM", run.id());
    assert_eq!(signal_of(run.wait_unheard()), Some(15));
    assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
}

#[cfg(unix)]
#[test]
fn a_terminal_that_closes_ends_no_work() {
    let folder = Folder::new();
    let out = folder.at("out");
    let mut run = Held::start(quantize(&out, "nvfp4_best"));
    run.until(|| folder.at(".out.recoup/smoothed").exists());
    signal("HUP", run.id());
    let (status, said) = run.let_go();
    assert!(status.success(), "{said}");
    assert!(out.join("model.safetensors").is_file());
}

#[cfg(unix)]
#[test]
fn a_second_run_in_the_same_place_is_refused_and_the_first_is_not_disturbed() {
    let folder = Folder::new();
    let out = folder.at("out");
    let mut run = Held::start(quantize(&out, "nvfp4_best"));
    run.until(|| folder.at(".out.recoup/smoothed").exists());
    let second = quantize(&out, "nvfp4").output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let pid = run.id().to_string();
    assert!(said(&second).contains("another run writes there") && said(&second).contains(&pid), "{}", said(&second));
    let (status, said) = run.let_go();
    assert!(status.success(), "{said}");
    assert_eq!(names(folder.path()), ["out"]);
}

#[cfg(unix)]
#[test]
fn answers_of_two_runs_never_go_into_one_file() {
    let folder = Folder::new();
    let out = folder.name("out");
    let args = ["eval", BF16, "--tasks", "hellaswag,piqa", "-L", "100", "-o", &out];
    let mut first = Held::start(recoup(&args));
    first.until(|| Path::new(&out).join("responses.jsonl").exists());
    let second = run(&args);
    let other = ["compare", BF16, BF16, "--labels", "a,b", "--tasks", "none", "-o", &out];
    let third = run(&other);
    for refused in [second, third] {
        assert!(said(&refused).contains("another run writes there"), "{}", said(&refused));
    }
    let (status, said) = first.let_go();
    assert!(status.success(), "{said}");
    assert!(!names(Path::new(&out)).iter().any(|n| n.starts_with('.')), "{:?}", names(Path::new(&out)));
}

#[cfg(target_os = "linux")]
#[test]
fn names_that_are_no_text_are_names() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;
    let folder = Folder::new();
    let at = |name: &[u8]| folder.at(OsString::from_vec(name.to_vec()));
    let model = at(b"mod\xffel");
    copy_model(BF16, &model);
    let run = |words: &[&str], rest: &[&PathBuf]| {
        let words = words.iter().map(OsString::from).chain(rest.iter().map(|p| p.as_os_str().to_owned()));
        let out = recoup(&words.collect::<Vec<_>>()).output().unwrap();
        assert!(out.status.success(), "{rest:?}: {}", said(&out));
    };
    let (q, r, e, c, l) = (at(b"q\xff"), at(b"r\xff"), at(b"e\xff"), at(b"c\xff"), at(b"l\xff"));
    run(&["inspect"], &[&model]);
    run(&["quantize", "--recipe", "nvfp4", "-o"], &[&q, &model]);
    let data = ["--data", "built-in", "--samples", "4", "--length", "32"];
    let method = ["--method", "qad:steps=1", "--method", "qat:steps=1", "--keep-stages", "-o"];
    let teacher = [&PathBuf::from("--teacher"), &model];
    run(&[&["recover"][..], &data, &method].concat(), &[&r, &q, teacher[0], teacher[1]]);
    assert!(at(b"r\xff-1-qad").join("config.json").is_file());
    run(&["eval", "--tasks", "piqa", "-L", "2", "-o"], &[&e, &q]);
    run(&["compare", "--tasks", "none", "--text", "books", "--windows", "2", "--no-speed", "-o"], &[&c, &model, &q]);
    let (recipe, text, tasks) = (at(b"rec\xffipe.json"), at(b"te\xffxt.txt"), at(b"ta\xffsk.yaml"));
    std::fs::write(&recipe, r#"{"rules": [{"modules": "*", "scheme": "fp8"}]}"#).unwrap();
    std::fs::write(&text, "It was a dark and stormy night, and the rain fell in torrents. ".repeat(20)).unwrap();
    folder.write("d.jsonl", "{\"q\": \"It was\"}\n{\"q\": \"The\"}\n");
    let task = "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n\
                output_type: multiple_choice\ndoc_to_text: \"{{q}}\"\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n\
                metric_list: [{metric: acc}]\n";
    std::fs::write(&tasks, task).unwrap();
    let option = |name: &str| PathBuf::from(name);
    run(&["quantize", "-o"], &[&at(b"o\xff"), &model, &option("--recipe"), &recipe]);
    let few = ["recover", "--samples", "4", "--length", "32", "--method", "qad:steps=1", "-o"];
    let (data, watch) = (option("--data"), option("--watch"));
    run(&few, &[&at(b"s\xff"), &q, teacher[0], teacher[1], &data, &text, &watch, &text]);
    run(&["eval", "-o"], &[&at(b"f\xff"), &q, &option("--tasks"), &tasks]);
    run(
        &["compare", "--no-speed", "--window", "32", "--windows", "2", "-o"],
        &[&at(b"g\xff"), &model, &q, &option("--tasks"), &tasks, &option("--text"), &text],
    );
    let ids = folder.write("ids.json", "[[1, 2, 3]]");
    run(&["logits", "--input-ids", &ids, "-o"], &[&l, &q]);
}

#[cfg(target_os = "linux")]
#[test]
fn logits_go_into_a_stream_as_into_a_file() {
    let folder = Folder::new();
    let (ids, file) = (folder.write("ids.json", "[[1, 2, 3]]"), folder.name("logits"));
    let args = |out: &str| ["logits", BF16, "--input-ids", &ids, "-o", out].map(str::to_owned);
    assert!(run(&args(&file)).status.success());
    let piped = run(&args("/dev/stdout"));
    assert!(piped.status.success(), "{}", said(&piped));
    assert!(piped.stdout == std::fs::read(&file).unwrap());
    assert!(run(&args("/dev/null")).status.success());
    assert!(std::os::unix::fs::FileTypeExt::is_char_device(&std::fs::metadata("/dev/null").unwrap().file_type()));
    let here = run(&args(&folder.name("")));
    assert!(said(&here).contains("is a folder"), "{}", said(&here));
    assert_eq!(names(folder.path()), ["ids.json", "logits"]);
}

/// Whatever one asks for, no more threads compute than there are cores: the rest would wait for each other.
#[test]
fn a_thousand_threads_are_no_more_work_than_one_per_core() {
    let args =
        |threads: &'static str| ["run", BF16, "-p", "It was", "-n", "8", "--temperature", "0", "--threads", threads];
    let (one, many) = (run(&args("1")), run(&args("1000")));
    assert!(many.status.success() && one.stdout == many.stdout, "{}", said(&many));
    let cores = std::thread::available_parallelism().unwrap();
    assert!(said(&many).contains(&format!("{cores} threads instead of 1000")), "{}", said(&many));
}
