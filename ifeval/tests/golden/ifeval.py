"""Makes ifeval.jsonl: synthetic responses to IFEval's prompts and lm-evaluation-harness's verdicts on them.

    python ifeval.py --prompts ifeval.jsonl --texts BOOKS.txt ... --translations django/conf/locale [--all pairs.jsonl]

Needs lm-eval 0.4.13, nltk 3.10.4 with punkt_tab, langdetect 1.0.9. Prompts: IFEval's 541 (Apache-2.0). Texts: books in
the public domain, paragraphs parted by empty lines. Translations: Django's message catalogues (BSD-3-Clause). `--all`
writes every pair (42 responses for each prompt), the golden file holds 55 pairs of each instruction.

langdetect is seeded with 0 and 1; in the golden file its verdicts are those on which both agree. For the letters `#` and
`!`, for which lm-eval draws another letter at random, the reference is made to count the character itself.
"""

import argparse
import glob
import json
import logging
import random
import re

import langdetect
from lm_eval.tasks.ifeval import instructions, utils

RESPONSES = 42
PAIRS = 55
MAX_RESPONSE = 80  # characters, in the golden file
MAX_SECTIONS = 200  # sections take more
MAX_ARGUMENTS = 150
RANDOM = random.Random(20240607)

logging.disable(logging.CRITICAL)
arguments = argparse.ArgumentParser()
arguments.add_argument("--prompts", required=True)
arguments.add_argument("--texts", nargs="+", required=True)
arguments.add_argument("--translations", required=True)
arguments.add_argument("--all")
arguments.add_argument("--golden", default=__file__.replace(".py", ".jsonl"))
arguments = arguments.parse_args()


def paragraphs(path):
    found = [p.strip() for p in re.split(r"\n\s*\n", open(path, encoding="utf-8").read())]
    found = [p for p in found if len(p) > 20][:20000]
    RANDOM.shuffle(found)
    return found


def messages(language):
    found = []
    for path in sorted(glob.glob(f"{arguments.translations}/../../**/{language}/LC_MESSAGES/*.po", recursive=True)):
        for block in re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n)+)', open(path, encoding="utf-8").read(), re.M):
            text = "".join(re.findall(r'"(.*)"', block))
            if len(text) > 12 and "Project-Id" not in text:
                found.append(re.sub(r'%\(\w+\)s|%\w|\\n|\\"', " ", text))
    return found


docs = [json.loads(line) for line in open(arguments.prompts, encoding="utf-8")]
texts = [paragraphs(path) for path in arguments.texts]
books = texts[0]
by_language = {}
for path in sorted(glob.glob(f"{arguments.translations}/*/LC_MESSAGES")):
    language = path.split("/")[-2]
    found = messages(language)
    if len(found) >= 20:
        by_language[language] = [" ".join(RANDOM.sample(found, k)) for k in (1, 4, 15) for _ in range(12)]
foreign = [text for found in by_language.values() for text in found]

SENTENCES = [
    "Dr. Smith arrived at 5 p.m. and left.",
    "Wait... what?",
    "Well ... then it ended.",
    "He works for the U.S. government.",
    "In the U.S. The law is clear.",
    "See e.g. the list, i.e. all of it.",
    "Buy apples, pears, etc. Then go home.",
    "Is that so?! Yes!",
    '"Stop!" he said.',
    '"Go home." She left.',
    "(It was late.) We slept.",
    "J. R. R. Tolkien wrote it.",
    "It costs $3.50. That is cheap.",
    "No. 5 is alive.",
    "Version 2.0.1 is out.",
    "Prof. X and Mrs. Y vs. Mr. Z.",
    "He came at 10 a.m. Monday.",
    "1. First item",
    "2. second item",
    "The end",
    "Visit https://a.b/c.d?e=f. Thanks.",
    "mail me at joe@x.com.",
    "She is Ph.D. material.",
    "“Curly quotes.” He smiled.",
    "Oh . . . I see.",
    "I cannot; I can't, gonna, wanna go. 'Tis true!",
    "HELLO WORLD. THIS IS A TEST!",
    "NASA and FBI said NO.",
    "A.B.C. Company Inc. is big.",
    "Jan. 5 was cold.",
    "It was Dec. However, it was warm.",
    "What?He asked.",
    "Hmm...okay.",
    "…unicode ellipsis… yes.",
    " -- dash -- ",
    "Mr. and Mrs. Jones.",
    "St. Paul, Minn. is a city.",
    "C. Here we go.",
    "Plan B. It works.",
    "Number 7. It works.",
    "In 1999. and then.",
    "Ωmega ΣΟΦΟΣ straße İstanbul ıs.",
    "日本語の文です。そうですか？",
    "हिन्दी में उत्तर।",
    "\u200bzero\u00a0width\u3000space",
    "x\x1cy\x1fz",
    "ǅ Titlecase",
]
TOKENS = [
    "***",
    "******",
    "\n\n",
    "\n",
    "* item one",
    "- item two",
    "  - nested",
    "*bold*",
    "**bolder**",
    "***both***",
    "* *",
    "**",
    "****",
    "*\n",
    "[name]",
    "[a\nb]",
    "[]",
    "[",
    "] [x]",
    "<<Title>>",
    "<<>>",
    "<< >>",
    "<<a>> b >>",
    "P.S.",
    "p. s.",
    "P.P.S",
    "P. P. S",
    "p.p.s. later",
    '"',
    '""',
    "'",
    '{"a": 1}',
    "```json",
    "```",
    "[1, NaN, -Infinity]",
    "1e999",
    "SECTION 1",
    "Section 2",
    "Section3",
    "section 4",
    "PARAGRAPH 1",
    "Day 1",
    "My answer is yes.",
    "My answer is no.",
    "My answer is maybe.",
    ",",
    ".",
    "!",
    "?",
    "...",
    "..",
    ". . .",
    ". . . .",
    "--",
    "---",
    "é",
    "𝔘",
    "①",
    "२",
    "_",
    "ſ",
    "K",
    "İ",
    "ı",
    "\t",
    "\r\n",
    "\x0b",
    "\u2028",
    "\x85",
    "#",
    "@",
    "&",
    "$5",
    "100%",
    "can not",
    "CANNOT",
    "CAN'T",
    "U.S.A.",
    "WOW!",
    "A",
    "I",
    "OK",
    '"quoted."',
    "(parens)",
    "«guille»",
    "‘x’",
    "“Y.”",
    "--X",
    "“",
    "”",
]


def special(i, k):
    """strings that satisfy the instruction, or nearly"""
    n = lambda key: max(0, int(k[key]) + RANDOM.choice([0, 0, 0, -1, 1]))
    rel = lambda nk, rk: max(
        0, int(k[nk]) + (RANDOM.choice([-1, 0, 1, -1]) if k[rk] == "less than" else RANDOM.choice([0, 0, 1, -1]))
    )
    s = i.split(":")[1]
    P = lambda: RANDOM.choice(books)[: RANDOM.choice([12, 30, 80, 200])]
    case = lambda w: RANDOM.choice([w, w.upper(), w.capitalize(), w + "s", w + "ing", "x" + w])
    if s == "existence":
        ws = list(k["keywords"])
        if RANDOM.random() < 0.3:
            ws = ws[:-1]
        return " ".join(case(w) for w in ws)
    if s == "frequency":
        return RANDOM.choice([" ", ", ", "\n", "-"]).join(
            case(k["keyword"]) for _ in range(rel("frequency", "relation"))
        )
    if s == "forbidden_words":
        return " ".join(
            RANDOM.choice(["", "", w, w.upper(), w + "s", "_" + w, w + "-x", "é" + w, w + "\u0301"])
            for w in k["forbidden_words"]
        )
    if s == "letter_frequency":
        return " ".join(
            RANDOM.choice([k["letter"], k["letter"].upper()]) for _ in range(rel("let_frequency", "let_relation"))
        )
    if s == "response_language":
        return RANDOM.choice(by_language.get(k["language"], ["?"]))
    if s == "number_sentences":
        m = rel("num_sentences", "relation")
        return " ".join(
            (
                RANDOM.choice(SENTENCES)
                if RANDOM.random() < 0.6
                else re.sub(r"\s+", " ", RANDOM.choice(books).split(". ")[0])[:120] + RANDOM.choice(".!?")
            )
            for _ in range(m)
        )
    if s == "number_paragraphs":
        return RANDOM.choice(["\n***\n", "***", " *** ", "\n\n***\n\n"]).join(
            RANDOM.choice([P(), P(), P(), ""]) if RANDOM.random() < 0.3 else P() for _ in range(n("num_paragraphs"))
        )
    if s == "number_words":
        return RANDOM.choice([" ", "\n", ", ", "-"]).join(
            RANDOM.choice(["word", "two", "naïve", "x_y", "3", "हिन्दी", "don"]) if RANDOM.random() < 0.2 else "word"
            for _ in range(rel("num_words", "relation"))
        )
    if s == "nth_paragraph_first_word":
        m = n("num_paragraphs")
        ps = [P() for _ in range(m)]
        j = k["nth_paragraph"] - 1 + RANDOM.choice([0, 0, 0, 1])
        if j < len(ps):
            ps[j] = (
                RANDOM.choice(["", '"', "'", "'\"", "\n"])
                + case(k["first_word"])
                + RANDOM.choice(["", ",", ".", "!", "'s", "-x"])
                + " "
                + ps[j]
            )
        return RANDOM.choice(["\n\n", "\n\n", "\n\n", "\n\n\n", "\n\n\n\n"]).join(ps)
    if s == "number_placeholders":
        return " ".join(
            RANDOM.choice(["[name]", "[address 1]", "[x][y]", "[[z]]"]) if RANDOM.random() < 0.9 else "[a\nb]"
            for _ in range(n("num_placeholders"))
        )
    if s == "postscript":
        return RANDOM.choice(
            [k["postscript_marker"], k["postscript_marker"].lower(), "P. S. x", "P. P. S. y", "PPS", "P.P. S", "p.s"]
        )
    if s == "number_bullet_lists":
        return RANDOM.choice(["\n", "\n", "\n\n", "\n text\n"]).join(
            (
                RANDOM.choice(["* a", "- b", "  * c", "*d", "-e", "** f", "*\n", "\t- g", "* *h*", "---"])
                if RANDOM.random() < 0.4
                else RANDOM.choice(["* item", "- item"])
            )
            for _ in range(n("num_bullets"))
        )
    if s == "constrained_response":
        return RANDOM.choice(
            [
                "My answer is yes.",
                "My answer is no.",
                "My answer is maybe.",
                "my answer is yes.",
                "My answer is yes",
                "My answer is*no.",
            ]
        )
    if s == "number_highlighted_sections":
        return " ".join(
            RANDOM.choice(["*a*", "**b c**", "* *", "***d***", "*e\nf*", "****"]) if RANDOM.random() < 0.4 else "*hi*"
            for _ in range(n("num_highlights"))
        )
    if s == "multiple_sections":
        return "\n".join(
            RANDOM.choice([k["section_spliter"], k["section_spliter"], k["section_spliter"].upper()])
            + RANDOM.choice([" ", " ", "", "  ", " X"])
            + str(j + 1)
            + RANDOM.choice(["\n", ": ", "."])
            + P()
            for j in range(n("num_sections"))
        )
    if s == "json_format":
        return RANDOM.choice(
            [
                '{"a": [1, 2.5e3, null, true], "b": {"c": "d\\n"}}',
                "[]",
                "{}",
                '"x"',
                "[1,]",
                '{"a":1,}',
                "{'a': 1}",
                "NaN",
                "[Infinity,-Infinity]",
                "-",
                "01",
                "1.",
                "1e5",
                "-0.5E-3",
                '"\\ud800"',
                '"\\x"',
                '"a\tb"',
                '{"a" : 1 , "b":[ ]}',
                "nul",
                "[1 2]",
                '{"a":1} x',
                "1" * RANDOM.choice([20, 4300, 4301]),
                '"é"',
                "[[[[]]]]",
                '{"":{}}',
                "1e999",
                "1.5.2",
                "+1",
                ".5",
                '"',
            ]
        )
    if s == "title":
        return RANDOM.choice(
            ["<<poem of joy>>", "<<>>", "<< >>", "<<<a>>>", "<<a\nb>>", "<a>", "<<a>", "<<>>>", "<<<>>x>>", "**<<T>>**"]
        )
    if s == "two_responses":
        return RANDOM.choice(["******", "\n\n******\n\n", "*****", "*******", "******\n******", "************"]).join(
            P() if RANDOM.random() < 0.8 else RANDOM.choice(["same", "", "  "])
            for _ in range(RANDOM.choice([1, 2, 2, 2, 3]))
        )
    if s == "repeat_prompt":
        t = k["prompt_to_repeat"]
        return RANDOM.choice([t, t.upper(), t[:-1], t + "\n\nAnswer", "  " + t, "> " + t, t.replace(" ", "  ", 1)])
    if s == "end_checker":
        t = k["end_phrase"]
        return P() + " " + RANDOM.choice([t, t.upper(), t + '"', t + " ", t + ".", t[:-1], t + "\n", t + "*"])
    if s == "quotation":
        return RANDOM.choice(['"%s"', '"%s', '%s"', "“%s”", ' "%s" \n', '""%s""', "'%s'", '*"%s"*']) % P()
    if s == "capital_word_frequency":
        return RANDOM.choice([" ", ". ", ", ", "\n"]).join(
            (
                RANDOM.choice(
                    [
                        "NASA",
                        "WOW!",
                        "U.S.",
                        "CANNOT",
                        "DON'T",
                        "A-B",
                        "X1",
                        '"HI"',
                        "I",
                        "A.",
                        "(OK)",
                        "É",
                        "GONNA",
                        "'TIS",
                        "AND/OR",
                        "FOO.BAR",
                        "“NO.”",
                        "ǅ",
                        "lower",
                        "Mixed",
                    ]
                )
                if RANDOM.random() < 0.7
                else "CAPS"
            )
            for _ in range(rel("capital_frequency", "capital_relation"))
        )
    if s == "english_capital":
        return RANDOM.choice(
            [P().upper(), P().upper(), RANDOM.choice(books).upper(), P(), "123", "...", RANDOM.choice(foreign).upper()]
        )
    if s == "english_lowercase":
        return RANDOM.choice(
            [P().lower(), P().lower(), RANDOM.choice(books).lower(), P(), "123", "...", RANDOM.choice(foreign).lower()]
        )
    if s == "no_comma":
        return RANDOM.choice([P(), P().replace(",", "")])


def body():
    r = RANDOM.random()
    if r < 0.6:
        return "\n\n".join(RANDOM.choice(RANDOM.choice(texts)) for _ in range(RANDOM.choice([1, 1, 2, 3, 5])))
    if r < 0.7:
        return RANDOM.choice(foreign)
    if r < 0.85:
        return " ".join(RANDOM.choice(SENTENCES) for _ in range(RANDOM.choice([1, 3, 8])))
    return " ".join(RANDOM.choice(TOKENS) for _ in range(RANDOM.choice([3, 10, 25])))


def soup(d):
    own = [str(v) for k in d["kwargs"] for v in k.values() if isinstance(v, str) and len(v) < 30] + [
        w for k in d["kwargs"] for v in k.values() if isinstance(v, list) for w in v
    ]
    return RANDOM.choice([" ", "", "\n", " "]).join(
        RANDOM.choice(TOKENS + own * 4 + SENTENCES) for _ in range(RANDOM.choice([2, 6, 15, 40]))
    )


def shift(t):
    r = RANDOM.random()
    if r < 0.08:
        return t.upper()
    if r < 0.2:
        return t.lower()
    if r < 0.26:
        return '"' + t + '"'
    if r < 0.3:
        return t.replace(",", "")
    if r < 0.36:
        return "Sure, here it is:\n" + t
    if r < 0.4:
        return t + "\nI hope this helps."
    if r < 0.43:
        return "```json\n" + t + "\n```"
    if r < 0.46:
        return t.replace(" ", " *", 1) + "*"
    return t


def responses(d, n):
    out = ["", " \n"]
    while len(out) < n:
        r = RANDOM.random()
        if r < 0.5:
            parts = [special(i, k) for i, k in zip(d["instruction_id_list"], d["kwargs"])]
            if RANDOM.random() < 0.5:
                RANDOM.shuffle(parts)
            if RANDOM.random() < 0.3:
                parts.insert(RANDOM.randrange(len(parts) + 1), body()[:300])
            t = RANDOM.choice(["\n", "\n\n", " "]).join(parts)
            if len(d["kwargs"]) > 0 and RANDOM.random() < 0.3:
                t = special(*RANDOM.choice(list(zip(d["instruction_id_list"], d["kwargs"]))))
        elif r < 0.7:
            t = body()
        elif r < 0.73:
            t = d["prompt"]
        elif r < 0.95:
            t = soup(d)
        else:
            t = RANDOM.choice(SENTENCES + TOKENS)
        out.append(shift(t))
    return out


def count_the_character_itself():
    build = instructions.LetterFrequencyChecker.build_description

    def build_description(self, *, letter=None, **others):
        build(self, letter=letter, **others)
        self._letter = letter.lower()

    instructions.LetterFrequencyChecker.build_description = build_description


def verdict(doc, response, seed):
    langdetect.DetectorFactory.seed = seed
    example = utils.InputExample(doc["key"], doc["instruction_id_list"], doc["prompt"], doc["kwargs"])
    checks = utils.test_instruction_following_strict, utils.test_instruction_following_loose
    return [check(example, response).follow_instruction_list for check in checks]


count_the_character_itself()
pairs, singles = [], {}
for doc in docs:
    for response in responses(doc, RESPONSES):
        ids, kwargs = doc["instruction_id_list"], doc["kwargs"]
        strict, loose = verdict(doc, response, 0)
        judged_by_language = any("language" in i or "english" in i for i in ids)
        again = verdict(doc, response, 1) if judged_by_language else [strict, loose]
        pairs.append(
            {"ids": ids, "kwargs": kwargs, "response": response, "strict": strict, "loose": loose, "again": again}
        )
        for n, i in enumerate(ids):
            short = (
                len(response) <= (MAX_SECTIONS if i.endswith("multiple_sections") else MAX_RESPONSE)
                and len(json.dumps(kwargs[n])) <= MAX_ARGUMENTS
            )
            if response.strip() and short and again[0][n] == strict[n] and again[1][n] == loose[n]:
                # As tables of all instructions' arguments have it.
                nulls = {"num_words": None, "letter": None} if len(pairs) % 8 == 0 else {}
                pair = {"ids": [i], "kwargs": [nulls | kwargs[n]], "response": response}
                kind = singles.setdefault(i, {}).setdefault((strict[n], loose[n]), {})
                kind[response] = pair | {"strict": [strict[n]], "loose": [loose[n]]}

golden = []
for i in sorted(singles):
    kinds = [RANDOM.sample(list(kind.values()), len(kind)) for _, kind in sorted(singles[i].items())]
    chosen = []
    while len(chosen) < PAIRS and any(kinds):
        chosen += [kind.pop() for kind in kinds if kind]
    golden += chosen[:PAIRS]
for path, rows in ((arguments.golden, golden), (arguments.all, pairs)):
    if path:
        with open(path, "w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=path == arguments.all, separators=(",", ":")) + "\n")
