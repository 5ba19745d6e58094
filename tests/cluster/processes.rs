//! Ranks that are processes, begun by mpirun.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::begun::{children, done, is_there};
use crate::support::command::{Folder, NVFP4, recoup, said};
use crate::support::project;

/// `mpirun -n N recoup …`, of which `cage` is what begins each process, if anything is.
fn by(processes: usize, cage: &[&str], words: &[&str]) -> Command {
    let alone = recoup(words);
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &processes.to_string()]).args(cage);
    command.arg(alone.get_program()).args(alone.get_args());
    command.current_dir(alone.get_current_dir().unwrap()).env("CUDA_VISIBLE_DEVICES", "");
    command
}

/// The options of so many ranks.
fn sizes(tensor: usize, pipeline: usize) -> [String; 4] {
    let [tensor, pipeline] = [tensor, pipeline].map(|n| n.to_string());
    ["--tensor-parallel-size".into(), tensor, "--pipeline-parallel-size".into(), pipeline]
}

#[test]
fn processes_and_threads_compute_the_bytes_of_one() {
    let folder = Folder::new();
    folder.write("ids.json", "[[1, 2, 3, 5, 8, 13, 21, 34, 2], [7, 7, 7, 1, 1, 1, 9, 9, 9]]");
    let ids = folder.name("ids.json");
    let models =
        [NVFP4, "tests/fixtures-models/modelopt/nemotron_h/bf16", "tests/fixtures-models/modelopt/qwen3_5/bf16"];
    for model in models {
        let model = project().join(model).display().to_string();
        let out = |name: &str| folder.name(name);
        let words =
            |out: &str| ["logits", &model, "--input-ids", &ids, "--device", "cpu", "-o", out].map(str::to_owned);
        let run = |name: &str, processes: usize, more: &[String]| {
            let given = [&words(&out(name))[..], more].concat();
            let given: Vec<&str> = given.iter().map(String::as_str).collect();
            done(&mut if processes == 0 { recoup(&given) } else { by(processes, &[], &given) });
            let bytes = std::fs::read(folder.at(name)).unwrap();
            std::fs::remove_file(folder.at(name)).unwrap();
            bytes
        };
        let alone = run("alone", 0, &[]);
        for (tensor, pipeline) in [(2, 1), (1, 2), (2, 2)] {
            let more = sizes(tensor, pipeline);
            assert!(run("threads", 0, &more) == alone, "{model}: {tensor} x {pipeline} threads");
            let processes = run("processes", tensor * pipeline, &more);
            assert!(processes == alone, "{model}: {tensor} x {pipeline} processes");
        }
    }
}

/// On the driver and the NCCL of scripts/cuda-standin.sh, where they have been built: by both roads, of every kind of exchange.
#[test]
fn several_gpus_compute_the_bits_of_one() {
    let driver = project().join("target/standin");
    if !driver.join("libnccl.so.2").exists() {
        println!("no stand-in: not tested");
        return;
    }
    let folder = Folder::new();
    folder.write("ids.json", "[[1, 2, 3, 5, 8, 13, 21, 34, 2]]");
    let ids = folder.name("ids.json");
    let run = |mut command: Command, devices: &str, nccl: &str| {
        command.env("CUDA_VISIBLE_DEVICES", "0,1,2,3").env("LD_LIBRARY_PATH", &driver);
        command.env("STANDIN_DEVICES", devices).env("RECOUP_CACHE", folder.name("cache")).env("RECOUP_NCCL", nccl);
        command.env("STANDIN_NCCL_LOG", folder.name("sent")).output().unwrap()
    };
    let words = |model: &str, name: &str, more: &[String]| -> Vec<String> {
        let out = folder.name(name);
        let words = ["logits", model, "--input-ids", &ids, "--device", "cuda:0", "-o", &out].map(str::to_owned);
        [&words[..], more].concat()
    };
    let alone = |words: &[String]| recoup(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let took = |name: &str| {
        let bytes = std::fs::read(folder.at(name)).unwrap();
        std::fs::remove_file(folder.at(name)).unwrap();
        bytes
    };
    // Heads of keys that two of four ranks have; experts; layers of two kinds, by stages.
    let models = [
        (NVFP4, [(2, 1), (1, 2)]),
        ("tests/fixtures/modelopt/qwen3_moe/nvfp4", [(4, 1), (2, 2)]),
        ("tests/fixtures-models/modelopt/nemotron_h/bf16", [(2, 1), (1, 2)]),
    ];
    for (model, cut) in models {
        let model = project().join(model).display().to_string();
        let out = run(alone(&words(&model, "alone", &[])), "1", "");
        assert!(out.status.success() && !said(&out).contains("exchange"), "{}", said(&out));
        let expected = took("alone");
        for (tensor, pipeline) in cut {
            let words = words(&model, "out", &sizes(tensor, pipeline));
            for (nccl, by) in
                [("", "NCCL 2.32.3"), ("off", "the host's memory (no NCCL at rank 0: RECOUP_NCCL is off)")]
            {
                let out = run(alone(&words), "4", nccl);
                assert!(out.status.success(), "{}", said(&out));
                assert!(said(&out).contains(&format!("ranks exchange by {by}")), "{}", said(&out));
                assert!(took("out") == expected, "{model} by {tensor} x {pipeline}, {by}");
            }
            let sent = String::from_utf8(took("sent")).unwrap();
            // A stage that only receives sends nothing; the ranks of a stage alone are a group of their own.
            assert!(sent.lines().count() >= tensor * pipeline, "{sent}");
            let some = sent.lines().filter(|line| !line.contains("sent 0 bytes")).count();
            assert!(some + 1 >= tensor * pipeline, "{sent}");
        }
    }
    // Processes; what NCCL brings is what is computed with; devices that there are not.
    let words = words(NVFP4, "out", &sizes(2, 1));
    let strs: Vec<&str> = words.iter().map(String::as_str).collect();
    let out = run(alone(&[&words[..6], &["-o".into(), folder.name("one")]].concat()), "1", "");
    assert!(out.status.success(), "{}", said(&out));
    let out = run(by(2, &[], &strs), "2", "");
    assert!(out.status.success() && said(&out).contains("ranks exchange by NCCL"), "{}", said(&out));
    let one = took("one");
    assert!(took("out") == one);
    let mut wrong = alone(&words);
    wrong.env("STANDIN_NCCL_WRONG", "1");
    let out = run(wrong, "2", "");
    assert!(!out.status.success() || took("out") != one, "a byte that is another goes unnoticed");
    let out = run(alone(&words), "1", "");
    assert!(!out.status.success() && said(&out).contains("no device 1"), "{}", said(&out));
}

#[test]
fn one_of_them_talks_and_what_is_wrong_is_said() {
    let run = ["run", NVFP4, "--raw", "-p", "The ship", "-n", "12", "--temperature", "0", "--device", "cpu"];
    let two = ["--tensor-parallel-size", "2"];
    let text = |out: &Output| String::from_utf8_lossy(&out.stdout).into_owned();
    let alone = text(&done(&mut recoup(&run)));
    assert_eq!(text(&done(&mut by(2, &[], &[&run[..], &two].concat()))), alone);
    let refused = |n: usize, words: &[&str]| {
        let began = Instant::now();
        let out = by(n, &[], words).output().unwrap();
        assert!(!out.status.success() && began.elapsed() < Duration::from_secs(30), "{words:?}");
        said(&out)
    };
    let said = refused(3, &[&run[..], &two].concat());
    assert!(said.contains("3 processes were begun together") && said.contains("is for 2"), "{said}");
    let folder = Folder::new();
    let never = folder.name("never");
    let said = refused(2, &["eval", NVFP4, "--tasks", "piqa", "--shard", "auto", "-o", &never, two[0], two[1]]);
    assert!(said.contains("ranks of one model"), "{said}");
    // Nobody waits for a model that there is none of.
    done(&mut by(2, &[], &["eval", "--list-tasks", two[0], two[1]]));
    let said = refused(2, &["run", "/no/such/folder", "-p", "x", two[0], two[1]]);
    assert!(said.contains("/no/such/folder"), "{said}");
    let said = refused(5, &[&run[..], &["--tensor-parallel-size", "5"]].concat());
    assert!(said.contains("5 ranks cannot share a layer of 4 attention heads"), "{said}");
    let said = refused(16, &[&run[..], &["--pipeline-parallel-size", "16"]].concat());
    assert!(said.contains("layers do not make 16 stages"), "{said}");
}

/// Network namespaces as machines, on a wire that delays frames and loses some.
#[test]
fn two_machines_with_a_bad_wire_between_them_compute_the_bytes_of_one() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: no network namespaces");
        return;
    }
    let folder = Folder::new();
    folder.write("ids.json", "[[1, 2, 3, 5, 8, 13, 21, 34, 2]]");
    let (ids, here, there) = (folder.name("ids.json"), folder.name("here"), folder.name("there"));
    let words = |out: &str| ["logits", NVFP4, "--input-ids", &ids, "--device", "cpu", "-o", out].map(str::to_owned);
    done(&mut recoup(&words(&here).each_ref().map(String::as_str)));
    let given = [&words(&there)[..], &sizes(2, 2)].concat();
    let alone = recoup(&given.iter().map(String::as_str).collect::<Vec<_>>());
    let words = [alone.get_program()].into_iter().chain(alone.get_args()).map(|w| w.to_str().unwrap());
    let line = words.map(|w| shlex::try_quote(w).unwrap().into_owned()).collect::<Vec<_>>().join(" ");
    let mut command = Command::new(project().join("tests/cluster/nodes.sh"));
    command.args(["sh", "-c", &format!("mpirun --oversubscribe --map-by node --hostfile $NODES -n 4 {line}")]);
    command.current_dir(alone.get_current_dir().unwrap()).env("CUDA_VISIBLE_DEVICES", "").env("WIRE_LOSS", "0.002");
    let text = said(&done(&mut command));
    assert!(text.contains("4 processes on 2 machines"), "{text}");
    assert!(std::fs::read(here).unwrap() == std::fs::read(there).unwrap());
}

#[test]
fn a_process_that_is_lost_while_it_serves_ends_all() {
    for victim in [0, 1] {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let words = ["serve", NVFP4, "--port", &port, "--device", "cpu", "--tensor-parallel-size", "2"];
        let running = by(2, &[], &words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let began = Instant::now();
        while std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
            assert!(began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(20));
        }
        let ranks = children(running.id());
        assert_eq!(ranks.len(), 2);
        let killed = Instant::now();
        assert!(Command::new("kill").args(["-9", &ranks[victim].to_string()]).status().unwrap().success());
        let ended = running.wait_with_output().unwrap();
        assert!(!ended.status.success() && said(&ended).contains("signal 9"), "{}", said(&ended));
        while ranks.iter().any(|pid| is_there(*pid)) {
            assert!(killed.elapsed() < Duration::from_secs(30), "one of {ranks:?} is still there");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Begins a command in a memory cgroup of its own: CAGE MIB COMMAND…
const CAGE: &str = r#"
root=/sys/fs/cgroup/memory; file=memory.limit_in_bytes
[ -d $root ] || { root=/sys/fs/cgroup; file=memory.max; }
own=$root/recoup-test-$$
mkdir $own && echo $(($1 << 20)) > $own/$file && echo $$ > $own/cgroup.procs || exit 77
shift
exec "$@"
"#;

#[test]
fn a_model_that_one_process_has_no_memory_for_is_run_by_two_and_four() {
    let folder = Folder::new();
    folder.write("cage.sh", CAGE);
    let cage = folder.name("cage.sh");
    let caged = |mib: &'static str| ["sh", &cage, mib].map(str::to_owned);
    if !Command::new("sh").args([&cage, "64", "true"]).output().unwrap().status.success() {
        println!("no memory cgroup can be made here: not tested");
        return;
    }
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 1024,
        "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;
    folder.write("shape.json", config);
    folder.write("ids.json", "[[1, 2, 3, 5, 8, 13, 21, 34, 2]]");
    let (shape, model, ids) = (folder.name("shape.json"), folder.name("model"), folder.name("ids.json"));
    done(&mut recoup(&["convert", "--model-shape", &shape, "-o", &model]));
    let words = |out: &str| ["logits", &model, "--input-ids", &ids, "--device", "cpu", "-o", out].map(str::to_owned);
    let run = |name: &str, processes: usize, more: &[String], mib: &'static str| {
        let given = [&words(&folder.name(name))[..], more].concat();
        let given: Vec<&str> = given.iter().map(String::as_str).collect();
        let cage = caged(mib);
        let cage: Vec<&str> = cage.iter().map(String::as_str).collect();
        if processes == 0 { recoup(&given).output() } else { by(processes, &cage, &given).output() }.unwrap()
    };
    // 400 MB of weights: too much is refused before anything is loaded, of one process and of two.
    assert!(run("alone", 0, &[], "").status.success());
    let refused = run("caged", 1, &[], "330");
    assert!(
        !refused.status.success() && said(&refused).contains("this machine has 330.0 MiB in all"),
        "{}",
        said(&refused)
    );
    let refused = run("caged", 2, &sizes(2, 1), "160");
    assert!(!refused.status.success(), "{}", said(&refused));
    for part in ["rank 0 needs about", "160.0 MiB in all on", "within", "more ranks have less each"] {
        assert!(said(&refused).contains(part), "{part}: {}", said(&refused));
    }
    assert!(!folder.at("caged").exists());
    let bytes = |name: &str| std::fs::read(folder.at(name)).unwrap();
    for (tensor, pipeline) in [(2, 1), (4, 1), (2, 2)] {
        let name = format!("{tensor}-{pipeline}");
        let out = run(&name, tensor * pipeline, &sizes(tensor, pipeline), "330");
        assert!(out.status.success(), "{tensor} x {pipeline}: {}", said(&out));
        assert!(bytes(&name) == bytes("alone"), "{tensor} x {pipeline}");
    }
}
