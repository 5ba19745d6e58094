"""Ids and text of small tokenizers under the classes of transformers: writes tokenizers/*.json and tokenizer_golden.jsonl.

    python3 make_tokenizer_golden.py                      (transformers 5.24.0, tokenizers 0.23.3, no mistral-common)
    python3 make_tokenizer_golden.py --more OUT FOLDER... more texts, for the test to read by RECOUP_TOKENIZER_GOLDEN, and also the
                                                          tokenizer in each FOLDER, as it stands and under each class that fits it

A line of the golden file is a case: {tokenizer, config, model, map, added, class, tokens, around, rows, ids}. `tokenizer` names the file
("+100000": with that many more tokens in its vocabulary, `<0>` as id 1000 and so on), `config` and `model` are what stands in tokenizer_config.json and config.json beside it, `map` and `added` in special_tokens_map.json
and added_tokens.json; `tokens` are the named tokens;
`around` are the ids of "a b" with special tokens. A row is [ids, text, skipped]: the ids of one of the texts without added
special tokens, and their text with and without special tokens, null where it is the text itself. `ids` has lists of random ids
as [ids, text, skipped]. Both are a number where they are those of an earlier case: of the case with that many other pairs of them
before it.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers as tk
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).parent

CORPUS = """The quick brown fox jumps over the lazy dog. It isn't what they've said, is it? I'm here; we're there.
def main(args):\n    for i in range(10):\n        print(f"{i}: {args[i]}")\n\treturn 0\n\n
Numbers: 1 22 333 4444 1234567890 3.14159 1,000,000 2024-07-26.
Straße, naïve café, Ünïcödé; El niño comió piñas. Привет, мир! Как дела? 你好，世界。今天天气很好。 日本語のテキスト。한국어 텍스트입니다.
the and the and of to in a that is was he for it with as his on be at by I this had not are but from or have an they which one you
Hello world! Hello again, world. http://example.com/path?query=1&x=2 user@example.org C++ a->b x != y && z
"""

TEXTS = [
    "", " ", "  ", "a", " a", "  a", "a ", "a  b", "Hello world", " Hello  world ", "Hello\nworld\n\n", "\n\n a\n", "\t\tx = 1",
    "I'm sure they've said it isn't so, we're 'm.", "12345 1 22 333,444.5", "x1y22z 2024-07-26", "naïve café Straße ﬁ Å",
    "e\u0301 cafe\u0301 A\u030a", "你好，世界。今天 123", "Привет, мир!", "🎉👩‍👩‍👧 ok", "def f(x):\n    return x+1\n",
    "<s>a</s> b", "a<s> <s>b", "<|endoftext|>a <|endoftext|> b", "a<unk>b <pad>", "don't stop . now ! ok ? a , b 's", "a\u00a0b\u2003c\u200bd",
    "▁a ▁▁b", "the  the   the    the", "HTTPServer XMLHttpRequest camelCase", "क्षत्रिय ภาษาไทย",
]

MORE_TEXTS = TEXTS + [
    "a\r\nb\r\n\r\n  c", "\u0000\u0001\u007f", "''' \"\"\" ``` ~~~", "  leading", "trailing   ", " \n \n ", "\u3000全角　スペース", "[INST] hi [/INST] <<SYS>>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<bos>a<eos> <start_of_turn>user\n", "0x1F 1e-10 ½ ² ٣ Ⅷ", "ΑΒΓ αβγ ß ẞ İ ı", "\ufeffbom",
    "a" * 100, "ab " * 50, "1" * 50, "\U0001F1E9\U0001F1EA flag \U0001F468\U0001F3FD", "नमस्ते दुनिया", "שלום עולם", "مرحبا بالعالم", "\ufffd\ufffe", "𝒳𝓎 𠮷野家",
    "if (a<b && c>d) { return &x; } // ok\n/* no */", "SELECT * FROM t WHERE a='b';", "don't DON'T I'LL we'd y'all'd've", "_foo__bar -- --- — … “q” ‘q’",
    "<unused0><unused1> <mask>", "<PAD><CLS> <SEP>", "▁<PRE> x ▁<SUF> y", "\u2028line\u2029para\u0085nel", "a\u0300\u0301\u0302b", "㍿ ㌀ ﷺ", "  <s>  a  </s>  ",
]


def special(token_id, content):
    return {"id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def make_tokenizers(folder):
    """One small tokenizer of each kind."""
    lines = CORPUS.split("\n")
    # Byte-level with digits on their own, as SmolLM2's.
    byte = tk.Tokenizer(models.BPE())
    byte.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    byte.decoder = decoders.ByteLevel()
    byte.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<|endoftext|>", "<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    byte.save(str(folder / "byte.json"), pretty=False)
    byte.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0 </s>:0", pair="<s>:0 $A:0 $B:1", special_tokens=[("<s>", 1), ("</s>", 2)])
    byte.save(str(folder / "byte_around.json"), pretty=False)
    # Pieces with byte fallback, as Llama 2's.
    pieces = tk.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", pair="<s>:0 $A:0 $B:1", special_tokens=[("<s>", 1)])
    pieces.train_from_iterator([line for line in lines if line.isascii()], trainers.BpeTrainer(
        vocab_size=470, special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)], show_progress=False))
    raw = json.loads(pieces.to_str())
    raw["pre_tokenizer"] = None
    raw["added_tokens"] = [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")]
    (folder / "pieces.json").write_text(json.dumps(raw, ensure_ascii=False, separators=(",", ":")))
    raw |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
    (folder / "pieces_new.json").write_text(json.dumps(raw, ensure_ascii=False, separators=(",", ":")))
    unigram = tk.Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.train_from_iterator(lines, trainers.UnigramTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    unigram.save(str(folder / "unigram.json"), pretty=False)
    words = tk.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    words.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    words.save(str(folder / "words.json"), pretty=False)


def added(**tokens):
    """`added_tokens_decoder` of {id: (content, more flags)}."""
    out = {}
    for token_id, (content, flags) in tokens.items():
        out[token_id[1:]] = {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True, **flags}
    return out


def byte_level_cases():
    llama, qwen2 = {"model_type": "llama"}, {"model_type": "qwen2"}
    yield None, None
    yield None, llama
    yield {}, qwen2
    for name in ["PreTrainedTokenizerFast", "NoSuchTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "GPTNeoXTokenizerFast", "CohereTokenizer",
                 "Qwen2Tokenizer", "Qwen3_5Tokenizer"]:
        yield {"tokenizer_class": name}, llama
        yield {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "add_prefix_space": True, "add_bos_token": True, "pad_token": "<pad>"}, llama
    for name in ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"]:
        for model in ["qwen2", "qwen3", "mistral", "phi", "gpt_neox", "cohere2", "phi3", "gpt_oss", "qwen3_5", "no_such_model"]:
            yield {"tokenizer_class": name, "eos_token": "</s>"}, {"model_type": model}
    yield None, {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}
    yield {"add_prefix_space": True}, {"model_type": "starcoder2", "tokenizer_class": "GPT2TokenizerFast"}
    yield {"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}, llama
    yield {"tokenizer_class": "Foo", "auto_map": {"AutoTokenizer": ["a.B", None]}}, {"model_type": "internlm2"}
    yield {"tokenizer_class": "GPT2Tokenizer", "split_special_tokens": True}, llama
    yield {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": True}, llama
    yield {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": True, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}, llama
    yield {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None, "extra_special_tokens": ["the", "<|x|>"]}, {"model_type": "qwen3"}
    lstrip = added(_0=("<|endoftext|>", {}), _1=("<s>", {"lstrip": True}), _2=("</s>", {"rstrip": True, "special": False}), _480=("<|im_end|>", {}), _481=(" the", {"normalized": True, "special": False}))
    for name in ["GPT2Tokenizer", "Qwen2Tokenizer", "CohereTokenizer", "GPTNeoXTokenizer", "PreTrainedTokenizerFast"]:
        yield {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": lstrip}, llama
    yield {"tokenizer_class": "GPT2Tokenizer", "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True, "normalized": True, "rstrip": False, "single_word": False}}, llama


def piece_cases():
    llama = {"model_type": "llama"}
    yield None, None
    for model in ["llama", "mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "code_llama"]:
        yield {}, {"model_type": model}
        yield {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, {"model_type": model}
    for legacy in [None, True, False]:
        for space in [None, True, False]:
            yield {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": space, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, llama
    yield {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True, "pad_token": "</s>", "from_slow": True, "clean_up_tokenization_spaces": True}, llama
    yield {"tokenizer_class": "LlamaTokenizer", "unk_token": None, "bos_token": None}, llama
    more = added(_0=("<unk>", {}), _1=("<s>", {}), _2=("</s>", {"rstrip": True}), _470=("<|im_end|>", {}), _471=("wor", {"normalized": True, "special": False}), _472=("<pad>", {"lstrip": True}))
    for name in ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast"]:
        yield {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": more}, llama
        yield {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<|x|>", "Hello"], "add_prefix_space": False}, llama
    yield {"tokenizer_class": "GemmaTokenizer"}, llama
    yield {"tokenizer_class": "CodeLlamaTokenizer", "prefix_token": "<P>", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True, "clean_up_tokenization_spaces": True}, llama
    yield {"tokenizer_class": "GPT2Tokenizer"}, llama


def new_piece_cases():
    for model in ["llama", "mistral"]:
        for legacy in [True, False]:
            yield {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": True}, {"model_type": model}


def naming_cases(names, size):
    """Tokens named twice, by other files, with other flags."""
    llama, flags = {"model_type": "llama"}, {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    token = lambda content, **more: {"__type": "AddedToken", "content": content, **flags, **more}
    for name in names:
        yield {"tokenizer_class": name, "bos_token": token("the", lstrip=True), "pad_token": "the"}, llama
        yield {"tokenizer_class": name, "bos_token": "the", "pad_token": token("the", lstrip=True)}, llama
        yield {"tokenizer_class": name, "additional_special_tokens": ["Hello"], "extra_special_tokens": {"boi_token": " a"}}, llama
        yield {"tokenizer_class": name, "extra_special_tokens": ["<x>", token("<x>", rstrip=True)], "mask_token": token("world", normalized=True)}, llama
        yield {"tokenizer_class": name, "my_token": "Hello", "our_token": "<y>"}, llama, {"my_token": "<x>", "your_token": "<z>", "bos_token": None, "additional_special_tokens": [" a"]}
        yield {"tokenizer_class": name}, llama, {"extra_special_tokens": ["<x>", {"content": "<y>", **flags}], "eos_token": {"content": "<y>", **flags, "rstrip": True}}, {"<x>": size, "<z>": size + 1}


def other_cases():
    for clean in [None, False, True]:
        yield {"clean_up_tokenization_spaces": clean, "tokenizer_class": "PreTrainedTokenizerFast"}, {"model_type": "llama"}


def mistral_cases():
    """Old Mistral tokenizers, whose regular expression transformers replaces where it is asked to."""
    for fix, model_type, version in [(True, "mistral", "4.50.0"), (None, "mistral", "4.50.0"), (True, "mistral3", "5.0.0rc1"),
                                     (True, "ministral", "5.0.0"), (True, "llama", "4.50.0"), (True, "pixtral", None)]:
        model = {"model_type": model_type, "transformers_version": version}
        yield {"tokenizer_class": "LlamaTokenizerFast", "fix_mistral_regex": fix}, {k: v for k, v in model.items() if v}


def large(file, folder):
    """The tokenizer with a vocabulary so large that transformers looks for that expression."""
    raw = json.loads(file.read_text())
    raw["model"]["vocab"].update({f"<{i}>": 1000 + i for i in range(100_000)})
    path = folder / f"{file.stem}+100000.json"
    path.write_text(json.dumps(raw))
    return path


def fitting_cases(path):
    """Cases for a tokenizer from elsewhere: as its files stand, and under each class for its kind of vocabulary."""
    read = lambda name: json.loads((path / name).read_text()) if (path / name).exists() else None
    config, model = read("tokenizer_config.json"), read("config.json")
    if config is not None:
        config.pop("chat_template", None)
    if model is not None:
        model = {k: model[k] for k in ["model_type", "tokenizer_class", "transformers_version"] if k in model}
    yield config, model
    file = read("tokenizer.json")
    if file["model"]["type"] != "BPE":
        return
    if len(file["model"]["vocab"]) > 100000:
        # Large enough that transformers looks for the regular expression of old Mistral tokenizers.
        for c, m in mistral_cases():
            yield {**(config or {}), **c}, m
    byte = '"ByteLevel"' in (path / "tokenizer.json").read_text()
    names = ["GPT2Tokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer"] if byte else ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"]
    for name in ["PreTrainedTokenizerFast"] + names:
        for space in [False, True]:
            yield {**(config or {}), "tokenizer_class": name, "add_prefix_space": space}, {"model_type": "llama"}


def case(file, config, model, texts, seed, token_map=None, added_tokens=None):
    folder = Path(tempfile.mkdtemp())
    shutil.copy(file, folder / "tokenizer.json")
    files = {"tokenizer_config": config, "config": model, "special_tokens_map": token_map, "added_tokens": added_tokens}
    for name, value in files.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    try:
        t = AutoTokenizer.from_pretrained(str(folder))
    finally:
        shutil.rmtree(folder)
    row = {"tokenizer": Path(file).stem if Path(file).name != "tokenizer.json" else str(file)}
    row |= {k: v for k, v in [("config", config), ("model", model), ("map", token_map), ("added", added_tokens)] if v is not None}
    row["class"] = type(t).__name__
    row["tokens"] = {k: str(v) for k, v in t._special_tokens_map.items() if v is not None}
    row["around"] = t.encode("a b", add_special_tokens=True)

    def both(ids, text):
        out = [t.decode(ids), t.decode(ids, skip_special_tokens=True)]
        return [ids] + [None if o == text else o for o in out]

    row["rows"] = [both(t.encode(text, add_special_tokens=False), text) for text in texts]
    rng = random.Random(seed)
    top = max(t.get_vocab().values()) + 1
    lists = [[rng.randrange(top if rng.random() < 0.7 else min(top, 300)) for _ in range(12)] for _ in range(3)]
    row["ids"] = [both(ids, None) for ids in lists]
    return row


def main():
    if sys.argv[1:2] == ["--more"]:
        out, texts, folders = Path(sys.argv[2]), MORE_TEXTS, [Path(f) for f in sys.argv[3:]]
    else:
        out, texts, folders = HERE / "tokenizer_golden.jsonl", TEXTS, []
        # Training is not the same twice: to be made anew, they have to be removed.
        if not (HERE / "tokenizers").exists():
            (HERE / "tokenizers").mkdir()
            make_tokenizers(HERE / "tokenizers")
    kinds = [("byte", byte_level_cases), ("byte_around", byte_level_cases), ("pieces", piece_cases), ("pieces_new", new_piece_cases), ("byte", lambda: naming_cases(["PreTrainedTokenizerFast", "CohereTokenizer"], 480)),
             ("pieces", lambda: naming_cases(["CodeLlamaTokenizer"], 470)), ("unigram", other_cases), ("words", other_cases)]
    todo = [(HERE / "tokenizers" / f"{name}.json", *c) for name, cases in kinds for c in cases()]
    scratch = Path(tempfile.mkdtemp())
    todo += [(large(HERE / "tokenizers" / f"{name}.json", scratch), *c) for name in ["byte", "pieces_new"] for c in mistral_cases()]
    todo += [(folder / "tokenizer.json", *c) for folder in folders for c in fitting_cases(folder)]
    known = {}
    with open(out, "w") as file:
        file.write(json.dumps(texts, ensure_ascii=False) + "\n")
        for path, config, model, *more in todo:
            try:
                row = case(path, config, model, texts, path.name, *more)
            except Exception as error:
                print(f"left out: {path} {config} {model}: {error!r}"[:300], file=sys.stderr)
                continue
            rows = json.dumps([row["tokenizer"], row["rows"], row["ids"]])
            if rows in known:
                row["rows"] = row["ids"] = known[rows]
            else:
                known[rows] = len(known)
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    shutil.rmtree(scratch)


main()
