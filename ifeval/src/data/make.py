"""Makes languages.tsv and english.txt, the statistics behind `language.rs` and `sentences.rs`.

    python make.py --profiles langdetect/profiles --punkt punkt_tab/english --text BOOKS.txt WIKI.txt

Sources: the language profiles of langdetect 1.0.9 (PyPI), by Nakatani Shuyo, Cybozu Labs, Inc., Apache-2.0; the English
model of NLTK's punkt_tab, by Tibor Kiss and Jan Strunk, Apache-2.0. The texts only say which words are worth keeping.
"""

import argparse
import collections
import json
import math
import os
import re
import string

ALPHA = 0.5 / 10000  # langdetect's smoothing: what an n-gram weighs in a language that lacks it
STEPS_PER_OCTAVE = 4
LEAST_LEVEL = 2  # below, the n-gram says too little
HAN = "\u4e00"
NAMES = string.ascii_uppercase + string.ascii_lowercase + string.digits
# Scripts that one language has to itself: single letters tell all.
OWN_SCRIPT = [
    (0x370, 0x3FF),
    (0x590, 0x5FF),
    (0x980, 0x9FF),
    (0xA00, 0xAFF),
    (0xB80, 0xBFF),
    (0xC00, 0xD7F),
    (0xE00, 0xE7F),
]


def normal(c):
    """The letter that langdetect counts for `c`, with all Han characters made one."""
    o = ord(c)
    if o < 0x80:
        return c if c.isalpha() else " "
    if c in "\u00a0\u00ab\u00b0\u00bb" or 0x2000 <= o < 0x2070:
        return " "
    if 0x1EA0 <= o < 0x1F00:
        return "\u1ec3"
    if 0x3040 <= o < 0x30A0:
        return "\u3042"
    if 0x30A0 <= o < 0x3100:
        return "\u30a2"
    if 0x3100 <= o < 0x3130 or 0x31A0 <= o < 0x31C0:
        return "\u3105"
    if 0x4E00 <= o < 0xA000:
        return HAN
    if 0xAC00 <= o < 0xD7B0:
        return "\uac00"
    return {"\u0219": "\u015f", "\u021b": "\u0163", "\u06cc": "\u064a"}.get(c, c)


def languages(folder, out):
    table = collections.defaultdict(lambda: collections.defaultdict(float))
    for name in sorted(os.listdir(folder)):
        profile = json.load(open(f"{folder}/{name}", encoding="utf-8"))
        shares = collections.defaultdict(float)
        for gram, count in profile["freq"].items():
            if len(gram) > 3 or gram == " ":
                continue
            folded = "".join(HAN if normal(c) == HAN else c for c in gram)
            if HAN in folded and len(folded) > 1 or any(normal(c) != c for c in folded):
                continue
            if len(gram) > 1 and any(lo <= ord(c) <= hi for c in gram for lo, hi in OWN_SCRIPT):
                continue
            shares[folded] += count / profile["n_words"][len(gram) - 1]
        for gram, share in shares.items():
            language = name.split("-")[0]  # zh-cn, zh-tw
            table[gram][language] = max(table[gram][language], share)
    names = sorted({language for shares in table.values() for language in shares})
    lines = collections.defaultdict(list)
    for gram in sorted(table):
        levels = {l: round(STEPS_PER_OCTAVE * math.log2(1 + s / ALPHA)) for l, s in table[gram].items()}
        cells = "".join(NAMES[names.index(l)] + chr(33 + v) for l, v in sorted(levels.items()) if v >= LEAST_LEVEL)
        if cells:
            lines[gram[:-1]].append(gram[-1] + cells)
    out.write("# Derived from langdetect 1.0.9's profiles, (c) 2010-2014 Cybozu Labs, Inc., Apache-2.0, by make.py.\n")
    out.write(
        "# Languages, lettered A-Z, a-z, 0-9. Then: first letters of n-grams; last letter, (language, level) pairs; ...\n"
    )
    out.write(" ".join(names) + "\n")
    for prefix, rows in lines.items():
        out.write(prefix + "\t" + "\t".join(rows) + "\n")


def english(folder, texts, out):
    def read(name):
        return open(f"{folder}/{name}", encoding="utf-8").read().split("\n")

    capitalised = collections.Counter()
    for path in texts:
        capitalised.update(w.lower() for w in re.findall(r"\b[A-Z][a-z']*\b", open(path, encoding="utf-8").read()))
    orthography = dict(line.rsplit("\t", 1) for line in read("ortho_context.tab") if line)
    lower = {w: int(f) for w, f in orthography.items() if int(f) & 0b1110000}
    kept = {w: f for w, f in lower.items() if capitalised[w] >= LEAST_CAPITALISED}
    out.write(
        "# Derived from the English model of NLTK's punkt_tab, by Tibor Kiss and Jan Strunk, Apache-2.0, by make.py.\n"
    )
    for title, words in [
        ("abbreviations", sorted(w.strip(" ") if w != ". . " else w for w in read("abbrev_types.txt") if w)),
        ("starters", sorted(w for w in read("sent_starters.txt") if w)),
        ("collocations", sorted(w.replace("\t", " ") for w in read("collocations.tab") if w)),
        ("capitalised only at starts", sorted(w for w, f in kept.items() if not f & 0b100)),
        ("capitalised anywhere", sorted(w for w, f in kept.items() if f & 0b100)),
    ]:
        out.write(f"{title}\t" + "\t".join(words) + "\n")


LEAST_CAPITALISED = 2  # times in the texts; rarer words hardly ever start a sentence

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--profiles", required=True)
    parser.add_argument("--punkt", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    arguments = parser.parse_args()
    here = os.path.dirname(os.path.abspath(__file__))
    with open(f"{here}/languages.tsv", "w", encoding="utf-8") as out:
        languages(arguments.profiles, out)
    with open(f"{here}/english.txt", "w", encoding="utf-8") as out:
        english(arguments.punkt, arguments.text, out)
