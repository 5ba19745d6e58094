//! What is wrong with a task, its data or its answers is said with file, line or document, and what to do.

use recoup_eval::{
    Response,
    tasks::{Chat, Library, Options, Task},
};
use tempfile::TempDir;

const CHOICE: &str = "task: t
dataset_path: json
dataset_kwargs:
  data_files: {test: d.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: \"Q: {{q}}\"
doc_to_choice: c
doc_to_target: a
";
const DATA: &str = "{\"q\": \"x\", \"c\": [\"1\", \"2\"], \"a\": 0}\n{\"q\": \"y\", \"c\": [\"1\", \"2\"], \"a\": 1}\n";

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn load(files: &[(&str, &str)], name: &str) -> Result<Task, String> {
    let folder = folder(files);
    let text = |e: recoup_eval::tasks::Error| e.to_string().replace(&format!("{}/", folder.path().display()), "");
    let mut library = Library::new(&[folder.path().into()], None).map_err(text)?;
    Ok(library.select(&[name]).map_err(text)?.tasks.remove(0))
}

fn mistake(yaml: &str, data: &str) -> String {
    load(&[("t.yaml", yaml), ("d.jsonl", data)], "t").unwrap_err()
}

fn asked(yaml: &str, data: &str, shots: usize) -> String {
    let task = load(&[("t.yaml", yaml), ("d.jsonl", data)], "t").unwrap();
    let options = Options { num_fewshot: Some(shots), ..Options::default() };
    task.instances(&options, None).unwrap_err().to_string()
}

fn has(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

#[test]
fn the_task_that_the_others_spoil_is_right() {
    let task = load(&[("t.yaml", CHOICE), ("d.jsonl", DATA)], "t").unwrap();
    assert_eq!(task.instances(&Options::default(), None).unwrap().len(), 2);
    assert_eq!(task.headline(), ("acc_norm", "none"));
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    has(
        &mistake(&format!("{CHOICE}fewshot_spilt: test\n"), DATA),
        &["t.yaml:10", "`fewshot_spilt`", "`fewshot_split`"],
    );
    let metric = format!("{CHOICE}metric_list:\n  - metric: acc\n    agregation: mean\n");
    has(&mistake(&metric, DATA), &["t.yaml:12", "`agregation`", "`aggregation`"]);
}

#[test]
fn a_python_function_is_refused_with_file_line_and_what_to_do() {
    for key in ["process_docs", "doc_to_text", "process_results", "description"] {
        let yaml = CHOICE.replace("doc_to_text: \"Q: {{q}}\"\n", "");
        let text = if key == "doc_to_text" { "" } else { "doc_to_text: q\n" };
        let yaml = format!("{yaml}{key}: !function utils.f\n{text}");
        has(&mistake(&yaml, DATA), &["t.yaml:9", key, "utils.f", "Jinja"]);
    }
    let aggregation = format!("{CHOICE}metric_list:\n  - metric: acc\n    aggregation: !function utils.mean\n");
    has(&mistake(&aggregation, DATA), &["t.yaml:12", "`aggregation: !function utils.mean`"]);
}

#[test]
fn malformed_yaml_is_reported_with_its_line() {
    has(&mistake("task: t\ndoc_to_text: \"open\n", DATA), &["t.yaml:", "not a YAML file"]);
    has(
        &mistake(&format!("{CHOICE}num_fewshot: many\n"), DATA),
        &["t.yaml:10", "`num_fewshot`", "a count", "\"many\""],
    );
    has(&mistake(&format!("{CHOICE}output_typ: x"), DATA), &["output_type"]);
}

#[test]
fn values_that_mean_nothing_are_refused() {
    let with = |line: &str| mistake(&format!("{CHOICE}{line}\n"), DATA);
    has(&mistake(&CHOICE.replace("multiple_choice", "multi"), DATA), &["t.yaml:6", "\"multi\"", "multiple_choice"]);
    has(&with("metric_list: [{metric: acc_nrom}]"), &["acc_nrom", "acc_norm"]);
    has(&with("metric_list: [{metric: acc}, {metric: acc}]"), &["twice"]);
    has(&with("metric_list: [{metric: acc, aggregation: median}]"), &["median", "mean"]);
    has(&with("fewshot_config: {sampler: balanced}"), &["balanced", "first_n"]);
    has(&with("filter_list: [{name: a, filter: [{function: take_frist}]}]"), &["take_frist", "take_first"]);
    has(&with("filter_list: [{name: a, filter: [{function: lowercase}]}]"), &["must be take_first"]);
    has(&with("use_prompt: promptsource"), &["use_prompt", "not supported"]);
    has(&with("unsafe_code: true"), &["unsafe_code"]);
}

#[test]
fn an_invalid_regular_expression_is_refused_when_the_task_loads() {
    let filter = "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '(a'}, {function: take_first}]}]";
    has(&mistake(&format!("{CHOICE}{filter}\n"), DATA), &["t.yaml:10", "invalid regular expression", "\"(a\""]);
    let generate = CHOICE.replace("multiple_choice", "generate_until");
    let metric = "metric_list: [{metric: exact_match, regexes_to_ignore: ['[']}]";
    has(&mistake(&format!("{generate}{metric}\n"), DATA), &["`regexes_to_ignore`", "invalid regular expression"]);
}

#[test]
fn a_missing_key_is_named() {
    has(&mistake(&CHOICE.replace("doc_to_choice: c\n", ""), DATA), &["t.yaml", "`doc_to_choice` is missing"]);
    has(&mistake(&CHOICE.replace("test_split: test\n", ""), DATA), &["`test_split` is missing", "validation_split"]);
    has(&mistake(&CHOICE.replace("dataset_path: json\n", ""), DATA), &["`dataset_path` is missing"]);
    has(&mistake(&CHOICE.replace("test_split: test", "test_split: dev"), DATA), &["test_split: dev", "has only: test"]);
}

#[test]
fn a_field_that_a_document_lacks_is_named_with_what_it_has() {
    let yaml = CHOICE.replace("{{q}}", "{{question}}");
    has(&mistake(&yaml, DATA), &["task `t`, document 0", "`doc_to_text`", "{{question}}", "q, c, a"]);
}

#[test]
fn a_template_that_fails_names_the_document() {
    let yaml = CHOICE.replace("doc_to_target: a", "doc_to_target: \"{{c.index(q)}}\"");
    let data = "{\"q\": \"1\", \"c\": [\"1\", \"2\"]}\n{\"q\": \"3\", \"c\": [\"1\", \"2\"]}\n";
    has(&asked(&yaml, data, 0), &["task `t`, document 1", "`doc_to_target`", "index"]);
    has(&mistake(&CHOICE.replace("{{q}}", "{{q"), DATA), &["t.yaml:7", "`doc_to_text`", "syntax error"]);
}

#[test]
fn data_without_documents_is_refused() {
    has(&mistake(CHOICE, ""), &["task `t`", "`test`", "no documents", "d.jsonl"]);
    has(&mistake(CHOICE, "\n\n"), &["no documents"]);
}

#[test]
fn a_wrong_line_of_data_is_named() {
    has(&mistake(CHOICE, &format!("{DATA}{{\"q\": \n")), &["d.jsonl:3", "not a JSON document"]);
    has(&mistake(CHOICE, &format!("{DATA}17\n")), &["d.jsonl:3", "expected an object", "a number"]);
    let mixed = format!("{DATA}{{\"q\": 3, \"c\": [\"1\"], \"a\": 0}}\n");
    has(&mistake(CHOICE, &mixed), &["d.jsonl", "field `q` is a text in some documents and a number in others"]);
    let csv = CHOICE.replace("path: json", "path: csv");
    has(&mistake(&csv, "a,b\n1,2\n1,2,3\n"), &["d.jsonl:3", "CSV"]);
}

#[test]
fn a_data_file_that_is_not_utf8_is_named_with_its_line() {
    let folder = folder(&[("t.yaml", CHOICE)]);
    std::fs::write(folder.path().join("d.jsonl"), b"{}\n\xff").unwrap();
    let mut library = Library::new(&[folder.path().into()], None).unwrap();
    has(&library.select(&["t"]).unwrap_err().to_string(), &["d.jsonl:2", "UTF-8"]);
}

#[test]
fn a_missing_data_file_says_where_it_was_looked_for_and_where_to_put_it() {
    has(&load(&[("t.yaml", CHOICE)], "t").unwrap_err(), &["task `t`", "`d.jsonl`", "none of", "--data-dir"]);
    let hub = CHOICE.replace("path: json", "path: allenai/ai2_arc").replace("dataset_kwargs:", "dataset_name: main");
    let hub = hub.replace("  data_files: {test: d.jsonl}\n", "");
    has(&mistake(&hub, DATA), &["allenai/ai2_arc/main/test.jsonl", "not downloaded"]);
    for task in ["arc_challenge", "winogrande", "text"] {
        let error = Library::new(&[], None).unwrap().select(&[task]).unwrap_err().to_string();
        has(&error, &[task, "data folder (--data-dir)"]);
    }
}

#[test]
fn an_answer_that_is_no_choice_is_found_before_a_model_works() {
    let data = DATA.replace("\"a\": 1", "\"a\": 2");
    has(&asked(CHOICE, &data, 0), &["document 1", "`doc_to_target` gives 2", "none of the 2 choices"]);
    let yaml = CHOICE.replace("doc_to_target: a", "doc_to_target: \"{{q}}\"");
    has(&asked(&yaml, DATA, 0), &["document 0", "'x'", "none of the 2 choices"]);
}

#[test]
fn choices_that_are_none_are_refused() {
    let empty = DATA.replace("\"q\": \"x\", \"c\": [\"1\", \"2\"]", "\"q\": \"x\", \"c\": []");
    has(&mistake(CHOICE, &empty), &["document 0", "no choices"]);
    has(
        &mistake(&CHOICE.replace("doc_to_choice: c", "doc_to_choice: \"{{q}}\""), DATA),
        &["`doc_to_choice` is no list"],
    );
    has(&mistake(&CHOICE.replace("doc_to_choice: c", "doc_to_choice: q"), DATA), &["must give a list", "'x'"]);
    has(&mistake(&CHOICE.replace("doc_to_choice: c", "doc_to_choice: [1, 2]"), DATA), &["must be a text, found 1"]);
}

#[test]
fn too_few_examples_are_reported_with_how_many_there_are() {
    has(&asked(CHOICE, DATA, 3), &["3 few-shot examples", "`test`", "2"]);
    let first = format!("{CHOICE}fewshot_split: test\nfewshot_config: {{sampler: first_n}}\n");
    // The document itself is no example.
    has(&asked(&first, DATA, 2), &["2 few-shot examples", "has 1"]);
    has(&asked(&format!("{CHOICE}fewshot_split: test\n"), DATA, 2), &["2 few-shot examples", "has 1"]);
}

#[test]
fn files_that_include_each_other_are_reported() {
    let files = [("a.yaml", "include: b.yaml\ntask: a\n"), ("b.yaml", "include: a.yaml\ntask: b\n")];
    has(&load(&files, "a").unwrap_err(), &["a.yaml → b.yaml → a.yaml", "include each other"]);
    has(&load(&[("a.yaml", "include: none.yaml\ntask: a\n")], "a").unwrap_err(), &["none.yaml", "cannot be read"]);
}

#[test]
fn groups_that_contain_each_other_are_reported() {
    let files = [("a.yaml", "group: a\ntask: [b]\n"), ("b.yaml", "group: b\ntask: [a]\n")];
    has(&load(&files, "a").unwrap_err(), &["group `a` contains itself", "a → b → a"]);
    has(&load(&[("a.yaml", "group: a\ntask: [none_such]\n")], "a").unwrap_err(), &["`none_such`"]);
    has(&load(&[("a.yaml", "group: a\ntasks: [b]\n")], "a").unwrap_err(), &["`tasks`", "`task`"]);
}

#[test]
fn a_name_defined_twice_or_not_at_all_is_reported() {
    let message = load(&[("a.yaml", CHOICE), ("b.yaml", CHOICE), ("d.jsonl", DATA)], "t").unwrap_err();
    has(&message, &["`t` is defined twice", "a.yaml", "b.yaml"]);
    let message = Library::new(&[], None).unwrap().select(&["helaswag"]).unwrap_err().to_string();
    has(&message, &["`helaswag`", "`hellaswag`"]);
    assert!(Library::new(&[], None).unwrap().select(&["nothing_*"]).is_err());
}

#[test]
fn answers_that_do_not_fit_the_requests_are_refused() {
    let task = load(&[("t.yaml", CHOICE), ("d.jsonl", DATA)], "t").unwrap();
    let instance = &task.instances(&Options::default(), None).unwrap()[1];
    let answer = Response::LogLikelihood { log_likelihood: -1.0, is_greedy: false };
    has(
        &task.score(instance, std::slice::from_ref(&answer)).unwrap_err().to_string(),
        &["document 1", "2 answers", "found 1"],
    );
    let rolling = Response::Rolling { log_likelihood: -1.0, tokens: None };
    has(&task.score(instance, &[answer, rolling]).unwrap_err().to_string(), &["LogLikelihood", "Rolling"]);
}

#[test]
fn a_chat_template_that_refuses_is_quoted_with_the_document() {
    let task = load(&[("t.yaml", CHOICE), ("d.jsonl", DATA)], "t").unwrap();
    let chat = Chat { render: &|_, _| Err("no system role".into()), fewshot_as_multiturn: true };
    let message = task.instances(&Options::default(), Some(&chat)).unwrap_err().to_string();
    has(&message, &["document 0", "chat template", "no system role"]);
}

#[test]
fn full_data_is_taken_instead_of_the_sample_by_name() {
    let data = "{\"text\": \"one two three\"}\n";
    let folder = folder(&[("lambada_openai_test.jsonl", data), ("text.txt", "a b\n")]);
    let mut library = Library::new(&[], Some(folder.path().into())).unwrap();
    let tasks = library.select(&["lambada_openai", "text", "lambada"]).unwrap().tasks;
    let names: Vec<(&str, usize)> = tasks.iter().map(|t| (t.name(), t.documents())).collect();
    assert_eq!(names, [("lambada_openai", 1), ("text", 1)]);
}

#[test]
fn data_files_may_be_patterns_and_marked_and_one_may_be_a_table() {
    let line = |q: &str| format!("{{\"q\": \"{q}\", \"c\": [\"1\", \"2\"], \"a\": 0}}\r\n");
    let yaml = CHOICE.replace("d.jsonl", "\"part-*.jsonl\"");
    let files = [
        ("t.yaml", yaml.clone()),
        ("part-0.jsonl", format!("\u{feff}{}", line("x"))),
        ("part-1.jsonl", line("y") + &line("z")),
    ];
    let files: Vec<(&str, &str)> = files.iter().map(|(n, t)| (*n, t.as_str())).collect();
    assert_eq!(load(&files, "t").unwrap().documents(), 3);
    has(&mistake(&yaml, DATA), &["part-*.jsonl", "in none of"]);
    let csv = CHOICE.replace("path: json", "path: csv").replace("d.jsonl", "d.tsv");
    let error = load(&[("t.yaml", &csv), ("d.tsv", "q\tq\n1\t2\n")], "t").unwrap_err();
    has(&error, &["d.tsv:1", "names the column `q` twice"]);
}

#[test]
fn all_shipped_tasks_load_and_ask() {
    let mut library = Library::new(&[], None).unwrap();
    let lacking = ["arc_challenge", "winogrande", "text"];
    let names: Vec<String> =
        library.list().into_iter().map(|l| l.name).filter(|n| !lacking.contains(&n.as_str())).collect();
    let names: Vec<String> = names.into_iter().filter(|n| n != "ai2_arc").collect();
    let selection = library.select(&names).unwrap();
    assert_eq!(selection.tasks.len(), 57 + 67 + 10);
    assert_eq!(selection.groups.len(), 6);
    for task in &selection.tasks {
        assert!(!task.instances(&Options::default(), None).unwrap().is_empty(), "{}", task.name());
    }
}

#[cfg(feature = "parquet")]
#[test]
fn a_parquet_file_holds_the_same_documents_as_its_json_lines() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let yaml = std::fs::read_to_string(golden.join("tasks/letters.yaml")).unwrap();
    let folder =
        folder(&[("t.yaml", &yaml.replace("path: json", "path: parquet").replace("letters.jsonl", "l.parquet"))]);
    std::fs::copy(golden.join("../../../ground/tests/golden/letters.parquet"), folder.path().join("l.parquet"))
        .unwrap();
    let ask = |folder: &std::path::Path| {
        let task = Library::new(&[folder.into()], None).unwrap().select(&["letters"]).unwrap().tasks.remove(0);
        task.instances(&Options { num_fewshot: Some(2), ..Options::default() }, None).unwrap()
    };
    assert_eq!(ask(folder.path()), ask(&golden.join("tasks")));
    std::fs::write(folder.path().join("l.parquet"), "no").unwrap();
    let error = Library::new(&[folder.path().into()], None).unwrap().select(&["letters"]).unwrap_err().to_string();
    has(&error, &["l.parquet", "not a Parquet file"]);
}

#[cfg(not(feature = "parquet"))]
#[test]
fn a_parquet_file_needs_a_feature_that_the_error_names() {
    has(&mistake(&CHOICE.replace("path: json", "path: parquet"), "PAR1"), &["d.jsonl", "feature `parquet`"]);
    let none = mistake(&CHOICE.replace("path: json", "path: parquet"), DATA);
    has(&none, &["d.jsonl", "not a Parquet file"]);
}

#[test]
fn an_answer_that_is_no_number_is_never_scored() {
    let task = load(&[("t.yaml", CHOICE), ("d.jsonl", DATA)], "t").unwrap();
    let instance = &task.instances(&Options::default(), None).unwrap()[1];
    let answer = |log_likelihood| Response::LogLikelihood { log_likelihood, is_greedy: false };
    for bad in [f64::NAN, f64::INFINITY] {
        for answers in [[answer(bad), answer(-1.0)], [answer(-1.0), answer(bad)]] {
            let error = task.score(instance, &answers).unwrap_err().to_string();
            has(&error, &["document 1", "no number", &bad.to_string()]);
        }
    }
    // An impossible choice is one that is not chosen.
    let scored = task.score(instance, &[answer(f64::NEG_INFINITY), answer(-1.0)]).unwrap();
    let other = task.score(instance, &[answer(-2.0), answer(-1.0)]).unwrap();
    assert_eq!(scored[0].values, other[0].values);
}

#[test]
fn files_that_nobody_asks_for_stop_nobody() {
    let good = CHOICE;
    for (name, text) in [
        ("twice.yaml", "include: t.yaml\ntask: other\nnum_fewshot: 1\nnum_fewshot: 0\n"),
        ("null.yaml", "include: t.yaml\ntask: other\ndescription: !!null\n"),
        ("base.yaml", "dataset_path: json\noutput_type: multiple_choice\n"),
        ("ci.yaml", "name: CI\non: push\n"),
        ("broken.yaml", "task: other\ndoc_to_text: [1, 2\n"),
        ("function.yaml", "task: other\ndoc_to_text: !function utils.f\n"),
        ("missing.yaml", "include: none_such.yaml\ntask: other\n"),
        ("list.yaml", "- a\n- b\n"),
        ("empty.yaml", ""),
        ("python.yaml", "task: other\ngroup: set\nclass: !function task.Qasper\n"),
        ("binary.yaml", "a: !!python/object:os.system x\n"),
    ] {
        assert!(load(&[("t.yaml", good), (name, text), ("d.jsonl", DATA)], "t").is_ok(), "{name}");
    }
    let group = "group: both\ntask: [t]\n";
    let twice = [("t.yaml", good), ("x.yaml", group), ("y.yaml", group), ("d.jsonl", DATA)];
    assert!(load(&twice, "t").is_ok());
    has(&load(&twice, "both").unwrap_err(), &["`both` is defined twice", "x.yaml", "y.yaml"]);
}

#[test]
fn what_is_wrong_with_a_file_is_said_to_who_asks_for_its_task() {
    let of =
        |text: &str, name: &str| load(&[("t.yaml", CHOICE), ("u.yaml", text), ("d.jsonl", DATA)], name).unwrap_err();
    has(&of("task: other\ndoc_to_text: [1, 2\n", "other"), &["`other` cannot be used", "u.yaml"]);
    has(&of("include: none.yaml\ntask: other # this\n", "other"), &["`other` cannot be used", "none.yaml"]);
    has(&of("dataset_path: json\n", "u"), &["u.yaml has no `task`"]);
    // A broken file of a shipped task's name does not bring the shipped one back.
    has(&of("task: hellaswag\nx: [1\n", "hellaswag"), &["`hellaswag` cannot be used", "u.yaml"]);
    has(&of("task: other\ngroup: set\nclass: !function task.Qasper\n", "other"), &["class", "Python"]);
}

#[test]
fn what_is_strange_about_files_is_noted() {
    let files = [
        ("t.yaml", CHOICE),
        ("u.yaml", "include: t.yaml\ntask: hellaswag\nnum_fewshot: 1\nnum_fewshot: 0\n"),
        ("v.yaml", "task: [\n"),
        ("w.yaml", "task: {\n"),
        ("d.jsonl", DATA),
    ];
    let folder = folder(&files);
    let mut library = Library::new(&[folder.path().into()], None).unwrap();
    let selection = library.select(&["hellaswag"]).unwrap();
    let notes = selection.notes.join("\n");
    has(&notes, &["u.yaml:4: key `num_fewshot` is there twice (line 3 before); the last counts"]);
    has(&notes, &["`hellaswag` is taken from", "not from <built-in>"]);
    has(&notes, &["v.yaml cannot be read as a task and is left out", "one more file like it"]);
    assert_eq!(selection.tasks[0].num_fewshot(&Options::default()), 0);
    assert!(Library::new(&[], None).unwrap().select(&["hellaswag"]).unwrap().notes.is_empty());
}

#[test]
fn a_file_that_has_the_name_of_a_task_that_was_asked_for_before_is_refused() {
    let folder = folder(&[("my.yaml", &CHOICE.replace("task: t", "task: piqa")), ("d.jsonl", DATA)]);
    let file = folder.path().join("my.yaml").to_str().unwrap().to_owned();
    let error = Library::new(&[], None).unwrap().select(&["piqa", &file]).unwrap_err().to_string();
    has(&error, &["`piqa` is defined twice", "my.yaml"]);
    assert_eq!(Library::new(&[], None).unwrap().select(&[&file, &file]).unwrap().tasks.len(), 1);
}

#[cfg(unix)]
#[test]
fn links_that_lead_in_circles_are_followed_once() {
    let folder = folder(&[("t.yaml", CHOICE), ("d.jsonl", DATA)]);
    std::os::unix::fs::symlink(folder.path(), folder.path().join("again")).unwrap();
    let mut library = Library::new(&[folder.path().into()], None).unwrap();
    assert_eq!(library.select(&["t"]).unwrap().tasks.len(), 1);
}

/// How many of `t`'s prompts hold their own document, with one example each.
fn holding_themselves(splits: &str, shots: usize) -> usize {
    let yaml = format!(
        "task: t\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: d.jsonl, validation: d.jsonl, train: e.jsonl}}\n\
         {splits}output_type: generate_until\ndoc_to_text: \"Q: {{{{q}}}}\\nA:\"\ndoc_to_target: a\n"
    );
    let data = (0..6).map(|i| format!("{{\"q\": \"q{i}\", \"a\": \"{i}\"}}\n")).collect::<String>();
    let other = (6..12).map(|i| format!("{{\"q\": \"q{i}\", \"a\": \"{i}\"}}\n")).collect::<String>();
    let task = load(&[("t.yaml", &yaml), ("d.jsonl", &data), ("e.jsonl", &other)], "t").unwrap();
    let instances = task.instances(&Options { num_fewshot: Some(shots), ..Options::default() }, None).unwrap();
    for (i, instance) in instances.iter().enumerate() {
        let recoup_eval::Request::Generate { context, .. } = &instance.requests[0] else { panic!("{instance:?}") };
        assert_eq!(instance.holds_itself, context.contains(&format!("Q: q{i}\nA: {i}")), "{context}");
    }
    instances.iter().filter(|i| i.holds_itself).count()
}

#[test]
fn prompts_that_hold_their_own_document_are_counted() {
    // Examples from the split that is evaluated, which lm-evaluation-harness leaves out only if `fewshot_split` names it.
    assert!(holding_themselves("test_split: test\n", 4) > 0);
    assert!(holding_themselves("validation_split: validation\nfewshot_split: validation\n", 4) > 0);
    assert_eq!(holding_themselves("test_split: test\nfewshot_split: test\n", 4), 0);
    assert_eq!(holding_themselves("test_split: test\ntraining_split: train\n", 4), 0);
    // The same documents under another split's name.
    assert!(holding_themselves("test_split: test\nfewshot_split: validation\n", 4) > 0);
    assert_eq!(holding_themselves("test_split: test\n", 0), 0);
}
