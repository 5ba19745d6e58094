//! `recoup quantize` as its users run it: formats by measurement, every kind of calibration file, kills, bad input.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use recoup::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES};
use recoup::checkpoint::{Checkpoint, CheckpointError};
use serde_json::Value;

use crate::support::command::{BF16, Folder, assert_same_files, names, recoup, run, said, succeed, tensor_data};
use crate::support::project;

/// What is said of a run that must fail with 1 and leave nothing under the name of the output.
#[track_caller]
fn fail(out: &Path, args: &[&str]) -> String {
    let said = crate::support::command::fail(args);
    assert!(!out.exists(), "{args:?}");
    said
}

/// The shipped model with the values of its tensors changed.
fn altered(out: &Path, change: impl Fn(&str, Vec<f32>) -> Vec<f32>) {
    reshaped(out, |name, shape, values| (shape.to_vec(), change(name, values)), |_| {});
}

/// The shipped model with its tensors and its configuration changed.
fn reshaped(
    out: &Path,
    change: impl Fn(&str, &[usize], Vec<f32>) -> (Vec<usize>, Vec<f32>),
    configure: impl Fn(&mut Value),
) {
    let source = Checkpoint::open(&project().join(BF16)).unwrap();
    let writer = FolderWriter::create(out).unwrap();
    let view = |name: &str| source.tensors.peek(name).unwrap();
    let changed = |name: &str| change(name, view(name).shape, view(name).floats().unwrap());
    let tensor = |name: &str| {
        let (shape, values) = changed(name);
        let bytes = move || Ok::<_, CheckpointError>(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        Pending::new(name, safetensors::Dtype::F32, &shape, bytes)
    };
    writer.tensors(source.tensors.names().map(tensor).collect(), SHARD_BYTES, &serde_json::Map::new()).unwrap();
    let mut config = source.config.value().clone();
    configure(&mut config);
    writer.json("config.json", &config).unwrap();
    writer.copy_text_files(source.tensors.folder()).unwrap();
    writer.commit().unwrap();
}

#[test]
fn formats_chosen_by_measurement_keep_the_budget_and_more_bits_lose_less() {
    let folder = Folder::new();
    let six = folder.name("six");
    let (table, _) =
        succeed(&["quantize", BF16, "-o", &six, "--recipe", "nvfp4_fp8_auto", "--bits", "6", "--samples", "4"]);
    let stored = folder.json("six/recoup_sensitivity.json");
    let groups = stored["groups"].as_array().unwrap();
    assert!(groups.len() > 4 && table.contains(groups[0]["name"].as_str().unwrap()), "{table}");
    let scheme = |g: &Value| g["scheme"].as_str().unwrap().to_owned();
    let chosen: std::collections::BTreeSet<String> = groups.iter().map(scheme).collect();
    assert!(chosen.len() > 1, "{chosen:?}");
    // What is stored is what was chosen.
    let source = Checkpoint::open(&folder.at("six")).unwrap();
    let (mut bits, mut weights) = (0.0, 0.0);
    for group in groups {
        for module in group["modules"].as_array().unwrap() {
            let name = format!("{}.weight", module.as_str().unwrap());
            let view = source.tensors.peek(&name).unwrap();
            let (dtype, per_weight) = match scheme(group).as_str() {
                "nvfp4" => (safetensors::Dtype::U8, 4.5),
                "fp8" => (safetensors::Dtype::F8_E4M3, 8.0),
                _ => (safetensors::Dtype::BF16, 16.0),
            };
            assert_eq!(view.dtype, dtype, "{name}");
            let elements = view.shape.iter().product::<usize>() * if per_weight < 5.0 { 2 } else { 1 };
            bits += elements as f64 * per_weight;
            weights += elements as f64;
        }
    }
    assert!(bits / weights <= 6.0 && (bits / weights - stored["bits"].as_f64().unwrap()).abs() < 1e-9);
    for group in groups {
        for option in group["options"].as_array().unwrap() {
            let (kl, scheme) = (option["kl"].as_f64().unwrap(), option["scheme"].as_str().unwrap());
            assert!(if scheme == "none" { kl == 0.0 } else { kl > 0.0 && kl < 1.0 }, "{option}");
        }
    }

    // The same table under another budget, without measuring again; the model runs.
    let (nine, stored_table) = (folder.name("nine"), folder.name("six/recoup_sensitivity.json"));
    let auto = ["quantize", BF16, "--recipe", "nvfp4_fp8_auto", "--samples", "4"];
    succeed(&[&auto[..], &["-o", &nine, "--bits", "9", "--sensitivity", &stored_table]].concat());
    let more = folder.json("nine/recoup_sensitivity.json");
    assert!(more["kl_sum"].as_f64() < stored["kl_sum"].as_f64() && more["bits"].as_f64() > stored["bits"].as_f64());
    succeed(&["run", &nine, "-p", "It was", "-n", "3"]);

    let out = folder.at("out");
    let to = ["-o", out.to_str().unwrap()];
    assert!(fail(&out, &[&auto[..], &to, &["--bits", "3"]].concat()).contains("4.5 to 16"));
    let other = ["quantize", "tests/fixtures/modelopt/llama/bf16", "--recipe", "nvfp4_fp8_auto"];
    let ids = folder.write("ids.json", "[[1, 2, 3]]");
    let error = fail(&out, &[&other[..], &to, &["--sensitivity", &stored_table, "--calibration", &ids]].concat());
    assert!(error.contains("another model"), "{error}");
    let mut retrained = stored.clone();
    retrained["weights"] = "0123".into();
    let retrained = folder.write("retrained.json", retrained.to_string());
    let error = fail(&out, &[&auto[..], &to, &["--sensitivity", &retrained]].concat());
    assert!(error.contains("other weights"), "{error}");
    let error = fail(&out, &[&["quantize", BF16, "--recipe", "fp8", "--bits", "6"][..], &to].concat());
    assert!(error.contains("nvfp4_fp8_auto"), "{error}");
}

#[test]
fn every_kind_of_calibration_file_is_read_and_bad_ones_are_refused() {
    let folder = Folder::new();
    let out = folder.at("out");
    let to = folder.name("out");
    let calibrated = ["quantize", BF16, "--recipe", "nvfp4", "-o", &to, "--calibration"];
    let accept = |file: &str| {
        let (_, said) = succeed(&[&calibrated[..], &[file]].concat());
        let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
        std::fs::remove_dir_all(&out).unwrap();
        (bytes, said)
    };
    let refuse = |file: &str| fail(&out, &[&calibrated[..], &[file]].concat());
    let story = "It was the best of times, it was the worst of times, it was the age of wisdom.";
    let (plain, _) = accept(&folder.write("a.txt", story));
    let (lines, _) = accept(&folder.write("a.jsonl", serde_json::json!({"text": story}).to_string()));
    // The same tokens, whose source is named in the header: all weights and scales are the same.
    assert!(tensor_data(&plain) == tensor_data(&lines));
    let header = String::from_utf8_lossy(&lines[8..2000]);
    assert!(header.contains("a.jsonl") && header.contains("sha256"), "{header}");
    // Whatever the file is called, and however it is written.
    let object = serde_json::json!({"text": story});
    for (name, content) in [
        ("list.json", format!("\u{feff}[{object}]\r\n")),
        ("lines.NDJSON", format!("\r\n{object}\r\n")),
        ("lines.txt", object.to_string()),
        ("wrapped", serde_json::json!({"data": [object]}).to_string()),
        ("table.csv", format!("text\n\"{story}\"\n")),
        ("marked.txt", format!("\u{feff}{story}")),
    ] {
        let (bytes, _) = accept(&folder.write(name, &content));
        assert!(tensor_data(&bytes) == tensor_data(&plain), "{name}");
    }
    let (_, said) = accept(&folder.write("more.jsonl", serde_json::json!({"text": story, "url": "x"}).to_string()));
    assert!(said.contains("fields that are not used, with the number of records: url (1)"), "{said}");
    let (_, said) = accept(&folder.write("long.jsonl", serde_json::json!({"text": story.repeat(90)}).to_string()));
    assert!(said.contains("1 of 1 texts are longer than"), "{said}");
    let (ids, _) = accept(&folder.write("ids.jsonl", "\u{feff}{\"input_ids\": [17]}\n"));
    let (one, _) = accept(&folder.write("one.json", "[[17]]"));
    assert!(tensor_data(&one) == tensor_data(&ids));
    assert!(tensor_data(&one) != tensor_data(&plain), "scales do not depend on the text");

    for (name, content, part) in [
        ("empty.txt", "", "empty"),
        ("empty.jsonl", "\n\n", "empty"),
        ("bad.jsonl", "{\"text\": \"a\"}\n{\"text\"", "line 2"),
        ("cut.txt", "[{\"text\": \"a\"},\n{\"text\"", "looks like JSON but is not"),
        ("twice.csv", "text,text\na,b\n", "names the column `text` twice"),
        ("field.jsonl", "{\"prompt\": \"a\"}", "`messages`"),
        // This model has no chat template.
        ("chat.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "template"),
    ] {
        let said = refuse(&folder.write(name, content));
        assert!(said.contains(part), "{name}: {said}");
    }
    assert!(refuse(&folder.name("missing.txt")).contains("missing.txt"));
}

#[test]
fn conversations_are_read_by_the_models_template() {
    let folder = Folder::new();
    let model = folder.name("model");
    altered(&folder.at("model"), |_, values| values);
    folder.write("model/chat_template.jinja", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
    let chat = folder.write(
        "chat.jsonl",
        r#"{"messages": [{"role": "user", "content": "Who was there?"}, {"role": "assistant", "content": "Nobody."}]}"#,
    );
    let text = folder.write("chat.txt", "user: Who was there?\nassistant: Nobody.\n");
    let bytes = |out: &str, calibration: &str| {
        succeed(&["quantize", &model, "-o", &folder.name(out), "--recipe", "nvfp4", "--calibration", calibration]);
        tensor_data(&std::fs::read(folder.at(out).join("model.safetensors")).unwrap()).to_vec()
    };
    assert!(bytes("chat", &chat) == bytes("text", &text));
}

#[test]
fn weight_only_recipes_need_neither_text_nor_tokenizer() {
    let folder = Folder::new();
    altered(&folder.at("model"), |_, values| values);
    std::fs::remove_file(folder.at("model/tokenizer.json")).unwrap();
    let model = folder.name("model");
    let (_, said) = succeed(&["quantize", &model, "--recipe", "w4a16_nvfp4", "-o", &folder.name("weights")]);
    assert!(said.contains("without calibration"), "{said}");
    let out = folder.at("out");
    let error = fail(&out, &["quantize", &model, "--recipe", "nvfp4", "-o", &folder.name("out")]);
    assert!(error.contains("tokenizer") && error.contains("--calibration"), "{error}");
}

#[test]
fn zeros_are_quantized_and_what_is_no_number_is_refused_by_place() {
    let folder = Folder::new();
    let down = "model.layers.1.mlp.down_proj.weight";
    altered(&folder.at("zero"), |name, values| if name == down { vec![0.0; values.len()] } else { values });
    for recipe in [
        "nvfp4_best",
        "nvfp4_best_channels",
        "nvfp4_awq",
        "nvfp4_mse",
        "nvfp4_four_over_six",
        "fp8",
        "fp8_block",
        "mxfp4",
        "mxfp8",
        "fp8_pc_pt",
    ] {
        let out = folder.name(recipe);
        succeed(&["quantize", &folder.name("zero"), "--recipe", recipe, "-o", &out, "--samples", "2"]);
        let source = Checkpoint::open(&folder.at(recipe)).unwrap();
        let config = recoup::model::ModelConfig::read(&source.config).unwrap();
        let m = config.modules().into_iter().find(|m| down.starts_with(&m.name)).unwrap();
        assert!(source.linear(&m.name, m.role).unwrap().decode().iter().all(|w| *w == 0.0), "{recipe}");
        succeed(&["run", &out, "-p", "It was", "-n", "2"]);
    }
    let out = folder.at("out");
    let to = ["-o", out.to_str().unwrap()];
    for (value, said) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let name = format!("bad{said}");
        altered(&folder.at(&name), |name, mut values| {
            if name == down {
                values[3] = value;
            }
            values
        });
        for recipe in ["nvfp4", "w4a16_nvfp4", "nvfp4_best"] {
            let error = fail(&out, &[&["quantize", &folder.name(&name), "--recipe", recipe][..], &to].concat());
            assert!(error.contains(said) && error.contains("layers.1.mlp.down_proj"), "{recipe}: {error}");
        }
    }
}

#[test]
fn a_width_that_no_block_divides_is_refused_by_blocks_and_taken_by_fp8() {
    let folder = Folder::new();
    let width = 200;
    let narrow = |name: &str, shape: &[usize], values: Vec<f32>| {
        if name.ends_with("gate_proj.weight") || name.ends_with("up_proj.weight") {
            (vec![width, shape[1]], values[..width * shape[1]].to_vec())
        } else if name.ends_with("down_proj.weight") {
            (vec![shape[0], width], values.chunks(shape[1]).flat_map(|row| &row[..width]).copied().collect())
        } else {
            (shape.to_vec(), values)
        }
    };
    reshaped(&folder.at("model"), narrow, |config| config["intermediate_size"] = width.into());
    let (model, out) = (folder.name("model"), folder.at("out"));
    for recipe in ["nvfp4", "nvfp4_best", "mxfp8", "w4a16_nvfp4"] {
        let error = fail(&out, &["quantize", &model, "--recipe", recipe, "-o", out.to_str().unwrap()]);
        assert!(error.contains("K = 200") && error.contains("down_proj"), "{recipe}: {error}");
    }
    for recipe in ["fp8", "fp8_pc_pt", "fp8_block"] {
        let out = folder.name(recipe);
        succeed(&["quantize", &model, "--recipe", recipe, "-o", &out]);
        succeed(&["run", &out, "-p", "It was", "-n", "2"]);
    }
}

#[test]
fn a_run_that_is_killed_leaves_nothing_under_the_final_name_and_the_next_one_succeeds() {
    let folder = Folder::new();
    let out = folder.name("out");
    let args = ["quantize", BF16, "-o", &out, "--recipe", "nvfp4_best"];
    let whole = folder.name("whole");
    succeed(&["quantize", BF16, "-o", &whole, "--recipe", "nvfp4_best"]);
    let left_over = || names(folder.path()).into_iter().filter(|n| n != "whole").collect::<Vec<_>>();
    // Killed when it has come that far, whatever the machine.
    let mut left = false;
    for moment in ["lock", ".smoothed.recoup/whole", "smoothed/config.json", "whole/model.safetensors"] {
        let there = folder.at(".out.recoup").join(moment);
        let mut child = recoup(&args).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        while !there.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // Whole, if it came to its end before the kill; nothing otherwise.
        if folder.at("out").exists() {
            let weights = |f: &str| std::fs::read(folder.at(f).join("model.safetensors")).unwrap();
            assert!(folder.at("out/config.json").is_file() && weights("out") == weights("whole"), "{moment}");
            std::fs::remove_dir_all(folder.at("out")).unwrap();
        }
        left = !left_over().is_empty();
        assert!(left_over().iter().all(|n| n == ".out.recoup"), "{moment}: {:?}", left_over());
    }
    let (_, told) = succeed(&args);
    assert_eq!(left, told.contains("had left when it was killed was removed"), "{told}");
    assert_eq!(left_over(), ["out"]);
    for file in ["model.safetensors", "config.json", "recoup_recipe.json"] {
        let read = |out: &str| std::fs::read(folder.at(out).join(file)).unwrap();
        assert!(read("out") == read("whole"), "{file}");
    }
    assert!(said(&run(&args)).contains("not empty"));
}

#[test]
fn what_processes_measure_in_shares_makes_the_model_of_one_run() {
    let folder = Folder::new();
    let (one, parts) = (folder.name("one"), folder.name("parts"));
    // Scales of inputs on five sequences, by more processes than that; then formats by measured KL.
    for (recipe, samples, of) in [("nvfp4_smooth", "5", 6), ("nvfp4_fp8_auto", "2", 3)] {
        let base = ["quantize", BF16, "--recipe", recipe, "--samples", samples, "--length", "64"];
        let (tables, _) = succeed(&[&base[..], &["-o", &one]].concat());
        for index in 0..of {
            let (index, of) = (index.to_string(), of.to_string());
            let mut part = recoup(&[&base[..], &["--shard", "auto", "-o", &parts]].concat());
            let out = part.env("PMI_RANK", &index).env("PMI_SIZE", &of).output().unwrap();
            assert!(out.status.success() && said(&out).contains("is complete"), "{}", said(&out));
        }
        let merged = folder.name("merged");
        let (again, _) = succeed(&[&base[..], &["--merge", &parts, "-o", &merged]].concat());
        assert_eq!(again, tables);
        assert_same_files(&folder.at("one"), &folder.at("merged"));
        if recipe == "nvfp4_fp8_auto" {
            // Another budget needs no other measurement, another text does.
            let eight = ["--merge", &parts, "--bits", "8", "-o", &folder.name("eight")];
            assert!(succeed(&[&base[..], &eight].concat()).0.contains("of 8 bits per weight"));
            let other = ["quantize", BF16, "--recipe", recipe, "--samples", "3", "--length", "64"];
            let refused = fail(&folder.at("x"), &[&other[..], &["--merge", &parts, "-o", &folder.name("x")]].concat());
            assert!(refused.contains("`text`"), "{refused}");
            // A share that is lost, and done again: what is there is not measured again.
            std::fs::remove_file(folder.at("parts/shard-1-of-3/found.json")).unwrap();
            let refused = fail(&folder.at("x"), &[&base[..], &["--merge", &parts, "-o", &folder.name("x")]].concat());
            assert!(refused.contains("shard-1-of-3/found.json: is not there"), "{refused}");
        }
        for made in ["one", "merged", "parts"] {
            std::fs::remove_dir_all(folder.at(made)).unwrap();
        }
    }
    let nothing = ["quantize", BF16, "--recipe", "w4a16_nvfp4", "--shard", "0/2", "-o", &one];
    assert!(fail(Path::new(&one), &nothing).contains("measures nothing that several processes could share out"));
    let bits = ["quantize", BF16, "--recipe", "nvfp4_fp8_auto", "--bits", "5", "--shard", "0/2", "-o", &one];
    assert!(fail(Path::new(&one), &bits).contains("give it with --merge"));
}
