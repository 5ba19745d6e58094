//! What the reports say about comparisons as they are and at the edges.

use super::sample::{context, extremes, many_tasks, only, sample};
use super::*;

/// Files to look at, where someone wants to: `RECOUP_REPORT_SAMPLES` names a folder.
#[test]
fn samples_can_be_looked_at() {
    let Some(folder) = std::env::var_os("RECOUP_REPORT_SAMPLES").map(std::path::PathBuf::from) else { return };
    let mut no_tasks = sample();
    no_tasks.tasks.clear();
    no_tasks.overall = vec![None; 5];
    let empty = ReportContext::default();
    for (name, c, context) in [
        ("sample", sample(), context()),
        ("two", only(&[0, 4]), context()),
        ("three", only(&[0, 1, 4]), empty.clone()),
        ("one", only(&[0]), empty.clone()),
        ("many", many_tasks(), empty.clone()),
        ("extremes", extremes(), empty.clone()),
        ("no_tasks", no_tasks, empty),
    ] {
        std::fs::write(folder.join(format!("{name}.html")), html(&c, &context)).unwrap();
        std::fs::write(folder.join(format!("{name}.md")), markdown(&c, &context)).unwrap();
        std::fs::write(folder.join(format!("{name}.txt")), terminal(&c, &context, 100)).unwrap();
    }
}
