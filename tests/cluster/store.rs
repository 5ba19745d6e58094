//! Results in an object store, which may be slow, refuse, or break off.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::command::{BF16, Folder, NVFP4, files, recoup, said, succeed};

/// What the store does with what is written to it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Takes,
    /// Of three writes one is answered 503, and one is broken off in the middle.
    Fails,
    Refuses,
}

/// S3's protocol, as far as it is used: objects are written, read and listed.
struct S3 {
    address: String,
    objects: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    writes: Arc<AtomicUsize>,
}

impl S3 {
    fn start(mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (objects, writes) = (Arc::<Mutex<BTreeMap<String, Vec<u8>>>>::default(), Arc::new(AtomicUsize::new(0)));
        let (kept, counted) = (objects.clone(), writes.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (kept, counted) = (kept.clone(), counted.clone());
                std::thread::spawn(move || serve(stream.unwrap(), mood, &kept, &counted));
            }
        });
        Self { address, objects, writes }
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = recoup(args);
        command.env("AWS_ENDPOINT", &self.address).env("AWS_ALLOW_HTTP", "true").env("AWS_REGION", "here");
        command.env("AWS_ACCESS_KEY_ID", "who").env("AWS_SECRET_ACCESS_KEY", "secret");
        command.env_remove("http_proxy").env_remove("HTTP_PROXY").env("NO_PROXY", "127.0.0.1");
        command
    }

    /// What lies below a path, by what it is called there.
    fn below(&self, path: &str) -> BTreeMap<String, Vec<u8>> {
        let objects = self.objects.lock().unwrap();
        let own = |(key, bytes): (&String, &Vec<u8>)| Some((key.strip_prefix(path)?.to_owned(), bytes.clone()));
        objects.iter().filter_map(own).collect()
    }
}

fn serve(stream: TcpStream, mood: Mood, objects: &Mutex<BTreeMap<String, Vec<u8>>>, writes: &AtomicUsize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut out = stream;
    loop {
        let (mut first, mut length) = (String::new(), 0);
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return;
        }
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            match line.trim_end().split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().unwrap();
                }
                Some(_) => {}
                None => break,
            }
        }
        let words: Vec<&str> = first.split(' ').collect();
        let (path, query) = words[1].split_once('?').unwrap_or((words[1], ""));
        let key = path.trim_start_matches('/').to_owned();
        let mut answer = |status: &str, body: &[u8]| {
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\netag: \"x\"\r\nlast-modified: Mon, 30 Nov 2026 00:00:00 GMT\r\n\r\n",
                body.len()
            );
            out.write_all(&[head.as_bytes(), body].concat()).is_ok()
        };
        // A little slow, always.
        std::thread::sleep(Duration::from_millis(5));
        let goes_on = match words[0] {
            "PUT" => {
                let turn = writes.fetch_add(1, Ordering::Relaxed);
                if mood == Mood::Fails && turn % 3 == 1 {
                    // Half of it arrives, and nothing is said.
                    let _ = reader.read_exact(&mut vec![0; length / 2]);
                    return;
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                match mood {
                    Mood::Refuses => answer("403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>"),
                    Mood::Fails if turn.is_multiple_of(3) => answer("503 Slow Down", b""),
                    _ => {
                        objects.lock().unwrap().insert(key, body);
                        answer("200 OK", b"")
                    }
                }
            }
            "GET" if query.contains("list-type=2") => {
                let prefix = query.split('&').find_map(|q| q.strip_prefix("prefix=")).unwrap_or("");
                let prefix = format!("{key}/{}", prefix.replace("%2F", "/"));
                let item = |(at, bytes): (&String, &Vec<u8>)| {
                    let name = at.strip_prefix(&format!("{key}/"))?;
                    Some(format!(
                        "<Contents><Key>{name}</Key><Size>{}</Size><ETag>x</ETag><LastModified>2026-11-30T00:00:00.000Z</LastModified></Contents>",
                        bytes.len()
                    ))
                };
                let objects = objects.lock().unwrap();
                let items: String = objects.iter().filter(|(at, _)| at.starts_with(&prefix)).filter_map(item).collect();
                answer("200 OK", format!("<ListBucketResult>{items}</ListBucketResult>").as_bytes())
            }
            "GET" => match objects.lock().unwrap().get(&key) {
                Some(bytes) => answer("200 OK", bytes),
                None => answer("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>"),
            },
            other => panic!("{other} {path}?{query}"),
        };
        if !goes_on {
            return;
        }
    }
}

const EVAL: [&str; 6] = ["eval", NVFP4, "--tasks", "books_cloze", "--limit", "12"];

#[test]
fn shards_and_their_merge_go_through_a_store_that_fails_now_and_then() {
    let (folder, s3) = (Folder::new(), S3::start(Mood::Fails));
    let one = folder.name("one");
    succeed(&[&EVAL[..], &["-o", &one]].concat());
    let parts = "s3://bucket/runs/parts";
    for rank in ["0", "1"] {
        let args = [&EVAL[..], &["--shard", "auto", "-o", parts]].concat();
        let out = s3.command(&args).env("PMI_RANK", rank).env("PMI_SIZE", "2").output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
    }
    assert!(s3.writes.load(Ordering::Relaxed) > s3.below("bucket/runs/parts/").len(), "nothing failed");
    // Again: what is there is not asked again.
    let again = s3.command(&[&EVAL[..], &["--shard", "1/2", "-o", "s3://bucket/runs/parts/shard-1-of-2"]].concat());
    let again = { again }.output().unwrap();
    assert!(said(&again).contains("6 of 6 answers are there already"), "{}", said(&again));
    let merged = s3.run(&[&EVAL[..], &["--merge", parts, "-o", "s3://bucket/runs/all"]].concat());
    assert!(merged.status.success() && said(&merged).contains("wrote s3://bucket/runs/all"), "{}", said(&merged));
    let (expected, all) = (files(&folder.at("one")), s3.below("bucket/runs/all/"));
    assert_eq!(all, expected);
    let nothing = s3.run(&[&EVAL[..], &["--merge", "s3://bucket/nowhere", "-o", &folder.name("x")]].concat());
    assert!(said(&nothing).contains("s3://bucket/nowhere: there is nothing"), "{}", said(&nothing));
}

#[test]
fn what_a_store_refuses_stays_here() {
    let s3 = S3::start(Mood::Refuses);
    let args = ["quantize", BF16, "--recipe", "w4a16_nvfp4", "-o", "s3://bucket/model"];
    let out = s3.run(&args);
    let said = said(&out);
    assert!(!out.status.success() && said.contains("s3://bucket/model cannot be written"), "{said}");
    assert!(said.contains("AccessDenied") || said.contains("403"), "{said}");
    let (_, rest) = said.split_once("what was found is in the folder ").unwrap();
    let (kept, _) = rest.split_once(": copy it there").unwrap();
    assert!(std::path::Path::new(kept).join("model.safetensors").exists(), "{kept}");
    std::fs::remove_dir_all(std::path::Path::new(kept).parent().unwrap()).unwrap();
}

#[test]
fn a_run_that_is_killed_goes_on_from_what_the_store_has() {
    let s3 = S3::start(Mood::Takes);
    let args = ["eval", BF16, "--tasks", "arc_easy", "--limit", "300", "--threads", "1", "-o", "s3://bucket/killed"];
    let mut run = s3.command(&args).env("RECOUP_STORE_SECONDS", "0.05").spawn().unwrap();
    let answers = || {
        let kept = s3.below("bucket/killed/");
        kept.get("responses.jsonl").map_or(0, |text| text.iter().filter(|b| **b == b'\n').count())
    };
    while answers() < 20 {
        assert!(run.try_wait().unwrap().is_none(), "it ended before");
        std::thread::sleep(Duration::from_millis(5));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    let out = s3.run(&args);
    assert!(out.status.success() && said(&out).contains("answers are there already"), "{}", said(&out));
    assert!(s3.below("bucket/killed/").contains_key("results.json"));
}

#[test]
fn a_folder_may_be_an_address_too() {
    let folder = Folder::new();
    let place = format!("file://{}", folder.name("far"));
    succeed(&["quantize", BF16, "--recipe", "w4a16_nvfp4", "-o", &place]);
    assert!(folder.at("far/model.safetensors").exists());
    let full = recoup(&["quantize", BF16, "--recipe", "w4a16_nvfp4", "-o", &place]).output().unwrap();
    assert!(said(&full).contains("is not empty"), "{}", said(&full));
}
