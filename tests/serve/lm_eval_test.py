"""lm-evaluation-harness through `recoup serve` gives the scores that `recoup eval` gives on the same task files."""

import json
import os
import subprocess

import pytest

from conftest import MODEL, NAME, RECOUP, ROOT

END = "<|endoftext|>"
# The harness keeps tokens of the context for what it generates, `recoup eval` does not: texts are such that neither cuts any.
LONGEST = 200
DOCUMENTS = 16

TASKS = {
    "served_books": ("books_test.jsonl", """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""),
    "served_cloze": ("books_cloze_test.jsonl", """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""),
    "served_choice": ("arc_easy_test.jsonl", """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    made = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), bos_token=END, eos_token=END, pad_token=END)
    made.save_pretrained(folder)
    return made, folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, tokenizer):
    """A folder of tasks with data that fit."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (data, rest) in TASKS.items():
        rows = []
        for line in (ROOT / "eval/tasks/data" / data).read_text().splitlines():
            row = json.loads(line)
            # A paragraph of a book is enough, and as long as fits.
            if "text" in row:
                row["text"] = row["text"].split("\n\n")[0]
            if len(tokenizer[0](json.dumps(row, ensure_ascii=False))["input_ids"]) < LONGEST and len(rows) < DOCUMENTS:
                rows.append(row)
        assert len(rows) >= 8, (name, len(rows))
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\nmetadata:\n  version: 1.0\n{rest.strip()}\n")
    return folder


def scores(results):
    return {(task, name): value for task, found in results.items() for name, value in found.items()
            if "," in name and "stderr" not in name}


def test_scores_are_those_of_recoup_eval(server, tasks, tokenizer, tmp_path, monkeypatch):
    names = list(TASKS)
    command = [RECOUP, "eval", str(MODEL), "--tasks", ",".join(names), "--include-path", str(tasks), "--json"]
    ours = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ours.returncode == 0, ours.stderr
    expected = scores(json.loads(ours.stdout)["results"])
    assert len(expected) == 6

    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    arguments = {"model": NAME, "base_url": f"{server.url}/v1/completions", "tokenizer": str(tokenizer[1]), "tokenizer_backend": "huggingface",
                 "num_concurrent": 4, "max_length": 256, "max_retries": 1}
    found = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=names, bootstrap_iters=0,
                                    task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    theirs = scores(found["results"])
    assert theirs.keys() == expected.keys()
    for key, value in expected.items():
        assert theirs[key] == pytest.approx(value, rel=1e-6, abs=1e-6), (key, theirs[key], value)
