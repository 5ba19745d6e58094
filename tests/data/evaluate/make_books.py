"""Answers books.jsonl's requests anew by lm-evaluation-harness, for when models/books-bf16 is made anew.

Run at the top of the repository, with lm-eval 0.4.13, torch and transformers installed:
    python tests/data/evaluate/make_books.py
"""

import json

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

FILE = "tests/data/evaluate/books.jsonl"

END = "<|endoftext|>"
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file="models/books-bf16/tokenizer.json", bos_token=END, eos_token=END, pad_token=END
)
model = HFLM(pretrained="models/books-bf16", tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=1)
rows = [json.loads(line) for line in open(FILE)]
requests = [Instance("loglikelihood", {}, (row["context"], row["continuation"]), i) for i, row in enumerate(rows)]
for row, (log_likelihood, is_greedy) in zip(rows, model.loglikelihood(requests)):
    row["log_likelihood"], row["is_greedy"] = log_likelihood, is_greedy
with open(FILE, "w") as f:
    f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
