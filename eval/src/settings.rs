//! How tasks are put, in words and for results.json: how answers are generated, and which settings change nothing.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::GenerationDefaults;
use crate::tasks::{Error, Generation, Options, OutputType, Task};

/// How tasks are put to the model.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    pub options: Options,
    /// Through the model's chat template.
    pub chat: bool,
    pub fewshot_as_multiturn: bool,
    /// How often sampled answers are drawn, each time with the next seed; 0 counts as 1. Greedy ones are the same every
    /// time and are asked for once.
    pub seeds: usize,
}

/// How each task that generates has its answers generated, by its name.
pub(crate) type Generations = BTreeMap<String, Generation>;

/// Reads how the tasks generate; the options hold what the model's maker set.
pub(crate) fn generations(tasks: &[Task], options: &Options) -> Result<Generations, Error> {
    tasks.iter().filter_map(|t| Some(t.generation(options).transpose()?.map(|g| (t.name().to_owned(), g)))).collect()
}

/// For results.json: what counted, and what was asked for and did not.
pub(crate) fn record(generations: &Generations) -> Map<String, Value> {
    let one = |g: &Generation| json!({"settings": g.options, "not_used": g.unused});
    generations.iter().map(|(task, g)| (task.clone(), one(g))).collect()
}

/// Settings that change nothing, each with the reason.
pub(crate) fn without_effect(
    tasks: &[Task],
    setup: &Setup,
    generations: &Generations,
    of_model: &GenerationDefaults,
) -> Vec<String> {
    let mut notes = Vec::new();
    let mut by_text: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (task, g) in generations.iter().filter(|(_, g)| !g.unused.is_empty()) {
        by_text.entry(g.unused.join(", ")).or_default().push(task);
    }
    notes.extend(by_text.iter().map(|(unused, tasks)| format!("{}: without effect: {unused}", tasks.join(", "))));

    let sampled: Vec<&Generation> = generations.values().filter(|g| g.options.temperature > 0.0).collect();
    if !generations.is_empty() {
        let mut unused = of_model.unused.clone();
        if sampled.is_empty() {
            let greedy =
                of_model.settings.iter().filter(|(key, _)| ["top_p", "top_k", "min_p"].contains(&key.as_str()));
            unused.extend(greedy.map(|(key, value)| format!("{key} {value} (answers are greedy)")));
        }
        if !unused.is_empty() {
            notes.push(format!("of the model's generation_config.json not used: {}", unused.join(", ")));
        }
    }
    if let Some(top_k) = of_model.top_k
        && sampled.iter().any(|g| g.top_k_by_default)
    {
        notes.push(format!(
            "answers are sampled from the {top_k} most probable tokens: top_k is transformers' default where nobody sets it, \
             as in lm-evaluation-harness (--gen-kwargs top_k=0: from all)"
        ));
    }
    let options = &setup.options;
    if !options.generation.is_empty() && generations.is_empty() && !tasks.is_empty() {
        notes.push("--gen-kwargs is without effect: none of the tasks generates".into());
    }
    if setup.seeds > 1 && sampled.is_empty() && !tasks.is_empty() {
        notes.push(format!(
            "--seeds {} is without effect: no answer is sampled (--gen-kwargs temperature=…)",
            setup.seeds
        ));
    }
    let names = |which: &dyn Fn(&Task) -> bool| {
        let names: Vec<&str> = tasks.iter().filter(|t| which(t)).map(Task::name).collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    if let Some(names) = names(&Task::has_idle_generation_kwargs) {
        notes.push(format!("{names}: without effect: `generation_kwargs` of the task, which generates nothing"));
    }
    let rolling = |t: &Task| t.output_type() == OutputType::Rolling;
    if let (Some(wanted), Some(names)) =
        (options.num_fewshot.filter(|n| *n > 0), names(&|t| !rolling(t) && t.num_fewshot(options) == 0))
    {
        notes.push(format!(
            "{names}: --num-fewshot {wanted} is without effect: the task sets 0 (lm-evaluation-harness's rule)"
        ));
    }
    let asked = [
        ("--num-fewshot", options.num_fewshot.is_some_and(|n| n > 0)),
        ("--apply-chat-template", setup.chat),
        ("--system-instruction", options.system.is_some()),
    ];
    let asked: Vec<&str> = asked.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    if let (false, Some(names)) = (asked.is_empty(), names(&rolling)) {
        notes.push(format!("{names}: without effect: {} (texts are scored as they are)", asked.join(", ")));
    }
    let no_examples = !tasks.is_empty() && tasks.iter().all(|t| rolling(t) || t.num_fewshot(options) == 0);
    if no_examples && options.seed != Options::default().seed {
        notes.push(format!("--fewshot-seed {} is without effect: no prompt has worked examples", options.seed));
    }
    notes
}
