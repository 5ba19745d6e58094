use super::*;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Finished work of two files.
fn work(claim: &Claim) -> PathBuf {
    let work = claim.scratch("whole");
    fs::create_dir(&work).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::write(work.join(name), name).unwrap();
    }
    work
}

#[test]
fn a_new_folder_appears_whole_and_nothing_else_is_left() {
    let place = tempfile::tempdir().unwrap();
    let claim = folder(&place.path().join("a/out")).unwrap();
    assert_eq!(names(&place.path().join("a")), [".out.recoup"]);
    claim.finish(&work(&claim)).unwrap();
    drop(claim);
    assert_eq!(names(&place.path().join("a")), ["out"]);
    assert_eq!(names(&place.path().join("a/out")), ["config.json", "model.safetensors"]);
}

#[test]
fn an_empty_folder_is_filled_and_not_replaced() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    fs::create_dir_all(out.join("lost+found")).unwrap();
    #[cfg(unix)]
    let before = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&out).unwrap());
    let claim = folder(&out).unwrap();
    assert_eq!(names(place.path()), ["out"], "it may be all that can be written");
    claim.finish(&work(&claim)).unwrap();
    drop(claim);
    assert_eq!(names(&out), ["config.json", "lost+found", "model.safetensors"]);
    #[cfg(unix)]
    assert_eq!(before, std::os::unix::fs::MetadataExt::ino(&fs::metadata(&out).unwrap()));
}

#[cfg(unix)]
#[test]
fn a_symlink_to_an_empty_folder_stays_one_and_one_to_nothing_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let (real, link, dead) = (place.path().join("real"), place.path().join("link"), place.path().join("dead"));
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    std::os::unix::fs::symlink(place.path().join("nothing"), &dead).unwrap();
    let claim = folder(&link).unwrap();
    claim.finish(&work(&claim)).unwrap();
    drop(claim);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(names(&real), ["config.json", "model.safetensors"]);
    let error = folder(&dead).unwrap_err().to_string();
    assert!(error.contains("dead: is a symlink to nothing"), "{error}");
}

#[test]
fn what_is_in_the_way_is_named_before_any_work() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("file"), "x").unwrap();
    let error = |target: PathBuf| folder(&target).unwrap_err().to_string();
    assert!(error(place.path().into()).contains("exists and is not empty"));
    assert!(error(place.path().join("file")).contains("file: exists and is no folder"));
    assert!(error(place.path().join("file/out")).contains("file"));
    assert!(error(place.path().join("none/..")).contains("is no name"));
    assert!(error(PathBuf::new()).contains("is no name"));
    assert!(error(place.path().join("n".repeat(300))).contains("nnn"));
    assert!(super::file(place.path()).unwrap_err().to_string().contains("is a folder"));
    // A name of the longest kind leaves no room for more around it.
    let long = place.path().join("n".repeat(LONGEST_NAME));
    let claim = folder(&long).unwrap();
    claim.finish(&work(&claim)).unwrap();
    assert!(long.join("config.json").is_file());
}

#[test]
fn finished_work_that_cannot_have_its_name_is_kept_and_the_next_run_does_not_remove_it() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let claim = folder(&out).unwrap();
    let whole = work(&claim);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("config.json"), "another's").unwrap();
    let error = claim.finish(&whole).unwrap_err();
    let OutputError::NotNamed { finished, .. } = &error else { panic!("{error}") };
    assert!(error.to_string().contains("finished and whole") && error.to_string().contains("by hand"), "{error}");
    drop(claim);
    assert_eq!(names(finished), ["config.json", "model.safetensors"]);
    assert_eq!(fs::read_to_string(out.join("config.json")).unwrap(), "another's");
    fs::remove_dir_all(&out).unwrap();
    let error = folder(&out).unwrap_err().to_string();
    assert!(error.contains("finished result of an earlier run"), "{error}");
    assert_eq!(names(finished), ["config.json", "model.safetensors"]);
}

#[test]
fn nothing_in_a_folder_that_was_filled_meanwhile_is_overwritten() {
    let place = tempfile::tempdir().unwrap();
    let claim = folder(place.path()).unwrap();
    let whole = work(&claim);
    fs::write(place.path().join("config.json"), "another's").unwrap();
    let error = claim.finish(&whole).unwrap_err().to_string();
    assert!(error.contains("holds config.json by now"), "{error}");
    assert_eq!(fs::read_to_string(place.path().join("config.json")).unwrap(), "another's");
    assert!(!place.path().join("model.safetensors").exists());
}

#[test]
fn too_little_space_is_told_with_both_figures() {
    let place = tempfile::tempdir().unwrap();
    let claim = folder(&place.path().join("out")).unwrap();
    claim.room("the model", 1).unwrap();
    if cfg!(unix) {
        let error = claim.room("the model", 1 << 62).unwrap_err().to_string();
        assert!(
            error.contains("the model needs about 4194304.0 TiB of disk, and ") && error.contains("are free"),
            "{error}"
        );
    }
}

#[test]
fn the_parts_of_one_run_share_its_claim() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let first = folder(&out).unwrap();
    let second = folder(&place.path().join("./out/")).unwrap();
    drop(first);
    assert!(second.scratch("x").parent().unwrap().is_dir());
    drop(second);
    assert!(names(place.path()).is_empty());
}

#[test]
fn scratch_whose_owner_is_dead_is_taken_away_and_a_trainings_state_is_not() {
    let place = tempfile::tempdir().unwrap();
    let hidden = place.path().join(".out.recoup");
    for name in ["whole", "smoothed", "training"] {
        fs::create_dir_all(hidden.join(name)).unwrap();
    }
    fs::write(hidden.join("lock"), "process 1, recoup quantize\n").unwrap();
    let claim = folder(&place.path().join("out")).unwrap();
    assert!(claim.cleared());
    assert_eq!(names(&hidden), ["lock", "training"]);
    drop(claim);
    assert_eq!(names(&hidden), ["training"]);
}

#[test]
fn a_lock_that_another_holds_is_respected_and_its_owner_named() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let hidden = place.path().join(".out.recoup");
    fs::create_dir(&hidden).unwrap();
    fs::write(hidden.join("lock"), "process 4711, recoup quantize m -o out\n").unwrap();
    let other = fs::File::open(hidden.join("lock")).unwrap();
    other.lock().unwrap();
    let error = folder(&out).unwrap_err().to_string();
    assert!(error.contains("another run writes there: process 4711, recoup quantize m -o out"), "{error}");
    // A folder that came into being after the other began is the other's as well.
    fs::create_dir(&out).unwrap();
    assert!(matches!(folder(&out), Err(OutputError::InUse { .. })));
    drop(other);
    folder(&out).unwrap();
}

#[test]
fn files_that_a_kill_left_half_written_are_swept() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("model")).unwrap();
    for name in [".recoup-a1b2c3.tmp", "model/.recoup-d4e5f6.tmp", "responses.jsonl"] {
        fs::write(place.path().join(name), "").unwrap();
    }
    drop(growing(place.path()).unwrap());
    assert_eq!(names(place.path()), ["model", "responses.jsonl"]);
    assert!(names(&place.path().join("model")).is_empty());
}

#[cfg(unix)]
#[test]
fn a_name_that_is_no_text_is_a_name() {
    use std::os::unix::ffi::OsStrExt as _;
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join(OsStr::from_bytes(b"out\xff"));
    let claim = folder(&out).unwrap();
    assert!(claim.training().file_name().unwrap().as_bytes() == b"out\xff.training");
    claim.finish(&work(&claim)).unwrap();
    assert!(out.join("config.json").is_file());
}

#[cfg(unix)]
#[test]
fn files_have_the_rights_of_any_other() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("plain"), "").unwrap();
    partial_in(place.path()).unwrap().persist(place.path().join("ours")).unwrap();
    let mode = |name: &str| fs::metadata(place.path().join(name)).unwrap().permissions().mode();
    assert_eq!(mode("plain"), mode("ours"));
}
