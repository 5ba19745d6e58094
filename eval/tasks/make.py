"""Cuts the data that ships with the tasks from full data sets, and writes the YAML files of MMLU's and BLiMP's parts.

    python make.py SOURCE      # a folder with evals/*.jsonl and corpus/*.txt; NOTICE.md says where each comes from

The rule is the same everywhere: the first n rows, in the order of the source.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = Path(sys.argv[1])


def rows(name):
    return [json.loads(line) for line in open(SOURCE / "evals" / name, encoding="utf-8")]


def write(name, documents):
    path = HERE / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        for document in documents:
            f.write(json.dumps(document, ensure_ascii=False) + "\n")


def hellaswag(row):
    """The source joins the two parts of a context as they are; lm-eval capitalizes the second, which is what follows the
    last sentence and begins in lower case."""
    head, mark, tail = row["query"].rpartition(". ")
    if mark and tail[:1].islower():
        row["query"] = head + mark + tail.capitalize()
    return {"query": row["query"], "choices": row["choices"], "gold": row["gold"]}


def openbookqa(row):
    parts = re.split(r"\(([A-D])\) ", row["Choices"])[1:]
    texts = [t.strip() for t in parts[1::2]]
    choices = {"text": texts, "label": parts[::2]}
    return {"id": row["ID"], "question_stem": row["Question Stem"], "choices": choices, "answerKey": row["Answer Key"]}


def articles(text):
    """As the data set `wikitext_document_level` cuts them: at headings of the first level."""
    page = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "\n".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def up_to(documents, size, key):
    total, kept = 0, []
    for document in documents:
        total += len(document[key].encode())
        if total > size:
            break
        kept.append(document)
    return kept


def pieces(text, size=8000):
    """Whole paragraphs, up to `size` characters each."""
    for document in text.split("<|endoftext|>"):
        piece = ""
        for paragraph in document.strip().split("\n\n"):
            if piece and len(piece) + len(paragraph) > size:
                yield piece
                piece = ""
            piece += ("\n\n" if piece else "") + paragraph
        if piece:
            yield piece


write("lambada_openai_test.jsonl", rows("lambada_openai_test.jsonl")[:500])
write("hellaswag_validation.jsonl", [hellaswag(r) for r in rows("hellaswag_val_2000.jsonl")[:400]])
write("piqa_validation.jsonl", rows("piqa_valid.jsonl")[:500])
write("arc_easy_test.jsonl", rows("arc_easy_test.jsonl")[:500])
write("openbookqa_test.jsonl", [openbookqa(r) for r in rows("openbookqa_test.jsonl")[:500]])
write("gsm8k_test.jsonl", rows("gsm8k_test.jsonl")[:250])
write("gsm8k_train.jsonl", rows("gsm8k_train.jsonl")[:8])
write("ifeval.jsonl", rows("ifeval.jsonl"))
cloze = [{"context": r["context"], "target": r["target"]} for r in rows("books_cloze_test.jsonl")]
write("books_cloze_test.jsonl", cloze[:250])
wikitext = [{"page": a} for a in articles((SOURCE / "corpus/wikitext-2-raw.test.txt").read_text(encoding="utf-8"))]
print(len(wikitext), "articles in WikiText-2's test set")
write("wikitext_test.jsonl", up_to(wikitext, 500_000, "page"))
books = [{"text": p} for p in pieces((SOURCE / "corpus/test.txt").read_text(encoding="utf-8"))]
write("books_test.jsonl", up_to(books, 200_000, "text"))

subjects = {}
for row in rows("mmlu_test.jsonl"):
    subjects.setdefault(row.pop("subject"), []).append(row)
shots = {}
for row in rows("mmlu_dev.jsonl"):
    shots.setdefault(row.pop("subject"), []).append(row)
CATEGORIES = {
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
category = {subject: c for c, names in CATEGORIES.items() for subject in names.split()}
assert set(category) < set(subjects) and len(subjects) == 57
(HERE / "mmlu").mkdir(exist_ok=True)
for subject, documents in sorted(subjects.items()):
    write(f"mmlu/{subject}.test.jsonl", documents[:10])
    write(f"mmlu/{subject}.dev.jsonl", shots[subject])
    spaced = subject.replace("_", " ")
    (HERE / "mmlu" / f"mmlu_{subject}.yaml").write_text(
        f"""include: _default_template_yaml
task: mmlu_{subject}
task_alias: {spaced}
tag: mmlu_{category.get(subject, "stem")}_tasks
dataset_name: {subject}
dataset_kwargs:
  data_files:
    test: data/mmlu/{subject}.test.jsonl
    dev: data/mmlu/{subject}.dev.jsonl
description: "The following are multiple choice questions (with answers) about {spaced}.\\n\\n"
"""
    )
for name in ["stem", "other", "social_sciences", "humanities"]:
    (HERE / "mmlu" / f"_mmlu_{name}.yaml").write_text(
        f"""group: mmlu_{name}
group_alias: {name.replace("_", " ")}
task:
  - mmlu_{name}_tasks
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 2
"""
    )

paradigms = {}
for row in rows("blimp_100.jsonl"):
    paradigms.setdefault(row["uid"], []).append({k: row[k] for k in ("sentence_good", "sentence_bad", "linguistics_term")})
assert len(paradigms) == 67
(HERE / "blimp").mkdir(exist_ok=True)
for uid, documents in sorted(paradigms.items()):
    write(f"blimp/{uid}.jsonl", documents[:20])
    (HERE / "blimp" / f"{uid}.yaml").write_text(
        f"""include: _template_yaml
task: blimp_{uid}
dataset_name: {uid}
dataset_kwargs:
  data_files:
    train: data/blimp/{uid}.jsonl
"""
    )
members = "\n".join(f"  - blimp_{uid}" for uid in sorted(paradigms))
(HERE / "blimp" / "_blimp.yaml").write_text(
    f"""group: blimp
task:
{members}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: false
metadata:
  version: 2.0
"""
)
