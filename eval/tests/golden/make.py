"""Writes golden.json: what lm-evaluation-harness 0.4.13 makes of the shipped tasks and of those in tasks/ beside this file.

    pip install lm-eval==0.4.13 langdetect immutabledict nltk && python make.py

A model that answers by a formula stands in for a real one (see `Formula`), so prompts, filters, metrics, aggregation and
logged samples all are lm-eval's own.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["DISABLE_MULTIPROC"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent
TASKS = HERE.parent.parent / "tasks"

import lm_eval  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.loggers import EvaluationTracker  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

DOCUMENTS = 10
RESAMPLES = 2000
ANSWERS = json.load(open(HERE / "answers.json", encoding="utf-8"))


class Formula(LM):
    def __init__(self):
        super().__init__()
        self.asked = {}

    def loglikelihood(self, requests):
        def answer(r):
            return -((r.doc_id * 31 + r.idx * 17 + 7) % 101) / 7.0, (r.doc_id * 7 + r.idx) % 3 == 0

        return [answer(r) for r in requests]

    def loglikelihood_rolling(self, requests):
        return [-(len(r.args[0]) * 0.7 + r.doc_id / 3.0) for r in requests]

    def generate_until(self, requests):
        out = []
        for r in requests:
            key = (r.task_name, r.doc_id)
            repeat = self.asked[key] = self.asked.get(key, -1) + 1
            answers = ANSWERS.get(r.task_name, ANSWERS["default"])
            answer = answers[(r.doc_id + repeat) % len(answers)]
            gold = str(r.doc.get("answer", "")).rpartition("#### ")[2]
            out.append(answer.replace("GOLD", gold))
        return out

    @property
    def tokenizer_name(self):
        return "chatml"

    def chat_template(self, chat_template=False):
        return "chatml"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat_history)
        if add_generation_prompt:
            return text + "<|im_start|>assistant\n"
        return text.removesuffix("<|im_end|>\n")


MODES = {
    "zero": dict(num_fewshot=0),
    "three": dict(num_fewshot=3),
    "own": dict(num_fewshot=None, system_instruction="Be brief."),
    "chat": dict(num_fewshot=3, apply_chat_template=True, fewshot_as_multiturn=True),
    "chat_single": dict(
        num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=False, system_instruction="You are exact."
    ),
}
SHIPPED = (
    "lambada_openai hellaswag piqa arc_easy openbookqa gsm8k ifeval wikitext books books_cloze mmlu_anatomy "
    "mmlu_high_school_us_history mmlu_moral_disputes blimp_adjunct_island blimp_wh_island"
).split()
OWN = "winogrande_form prefixed several_targets lines letters".split()
GROUPS = ["mmlu", "blimp"]


def run(tasks, manager, limit, **mode):
    return lm_eval.simple_evaluate(
        model=Formula(), tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=RESAMPLES, log_samples=True, **mode
    )


def numbers(results):
    return {k: v for k, v in results.items() if "," in k}


def log_line(task, sample):
    """The line that --log_samples writes."""
    folder = tempfile.mkdtemp()
    tracker = EvaluationTracker(output_path=folder)
    tracker.general_config_tracker.model_name_sanitized = "m"
    tracker.date_id = "d"
    tracker.save_results_samples(task, [sample])
    line = open(Path(folder) / "m" / f"samples_{task}_d.jsonl", encoding="utf-8").read()
    shutil.rmtree(folder)
    return json.loads(line)


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def arguments(sample):
    """Every request as one text: context and continuation."""
    return ["\x1f".join(a if isinstance(a, str) else "" for a in args) for args in sample["arguments"]]


golden = {"tasks": {}, "groups": {}, "resamples": RESAMPLES, "documents": DOCUMENTS}
for folder, tasks in ((HERE / "tasks", OWN), (TASKS, SHIPPED)):
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for task in tasks:
        entry = golden["tasks"][task] = {"modes": {}}
        for name, mode in MODES.items():
            if task in ("wikitext", "books", "lines") and name != "zero":
                continue
            if task == "several_targets" and mode["num_fewshot"] == 3:  # it has two examples
                continue
            result = run([task], manager, 20 if task == "gsm8k" else DOCUMENTS, **mode)
            samples = result["samples"][task]
            first = samples[0]["filter"]
            prompts = [arguments(s) for s in samples if s["filter"] == first]
            entry["modes"][name] = {"hashes": [sha("\x1e".join(p)) for p in prompts[:DOCUMENTS]]}
            if sum(map(len, prompts[1])) < 1500:
                entry["modes"][name]["second"] = prompts[1]
            if name == "zero":
                entry["results"] = numbers(result["results"][task])
                entry["values"] = [
                    [s["doc_id"], s["filter"], {m: s[m] for m in s["metrics"]}] for s in samples if s["doc_id"] < 20
                ]
                entry["hashes"] = [[s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in samples]
                size = len(json.dumps(samples[0], default=str))
                if size < 4000:
                    entry["log"] = log_line(task, samples[0])
    if folder == TASKS:
        for group in GROUPS:
            result = run([group], manager, 3)
            golden["groups"][group] = {
                "groups": {k: numbers(v) for k, v in result["groups"].items()},
                "tasks": sorted(result["samples"]),
            }
golden = json.loads(json.dumps(golden, default=float))
with open(HERE / "golden.json", "w", encoding="utf-8") as f:
    json.dump(golden, f, ensure_ascii=False, indent=None, separators=(",", ":"))
    f.write("\n")
print((HERE / "golden.json").stat().st_size, "bytes")
