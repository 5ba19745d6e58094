"""Writes python_golden.jsonl: what Jinja2 and CPython make of the templates here with tools, and of single constructs.

    pip install jinja2==3.1.6 && python3 make_python_golden.py

The environment is built as transformers does it (utils/chat_template_utils.py, _compile_jinja_template)."""

import datetime
import glob
import json
import os

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

here = os.path.dirname(os.path.abspath(__file__))


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


env = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
env.filters["tojson"] = tojson
env.globals["raise_exception"] = raise_exception
env.globals["strftime_now"] = lambda f: datetime.datetime(2024, 7, 26, 12).strftime(f)

TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>", "unk_token": "<UNK>", "pad_token": "<PAD>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in <city> & \"around\" — naïve",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "days": {"type": "integer", "minimum": 1},
                "loose": {"type": "number", "default": 1.5},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich \"ZH\"", "days": 2, "loose": 1e16, "x": None, "b": True}},
}
USER = {"role": "user", "content": "Weather in Zürich?"}
ASSISTANT = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "{\"t\": 20.5}"}
SYSTEM = {"role": "system", "content": "Be brief."}
CASES = {
    "tools": {"messages": [USER], "tools": [TOOL]},
    "tools_system": {"messages": [SYSTEM, USER], "tools": [TOOL, TOOL]},
    "no_tools_list": {"messages": [USER], "tools": []},
    "call": {"messages": [USER, ASSISTANT, RESULT], "tools": [TOOL]},
    "call_answered": {
        "messages": [USER, ASSISTANT, RESULT, {"role": "assistant", "content": "20.5 °C"}, {"role": "user", "content": "Thanks"}],
        "tools": [TOOL],
    },
    "no_thinking": {"messages": [USER], "extra": {"enable_thinking": False}},
    "thinking": {"messages": [USER], "extra": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}},
    "reasoning": {
        "messages": [USER, {"role": "assistant", "content": "Cold.", "reasoning_content": "Alps?", "thinking": "Alps?"}, USER]
    },
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]},
    "bad_role": {"messages": [{"role": "wizard", "content": "hm"}]},
    "two_users": {"messages": [USER, USER]},
    "empty": {"messages": []},
}

VALUES = {
    "s": "  a,b,,c  ",
    "z": "Zürich\n\"q\" \\ \t\u007f\u0001 你好 🙂 </script>'&",
    "n": 3,
    "f": 0.00001,
    "none": None,
    "t": True,
    "l": ["a", "b", None, True, 1.0, "it's"],
    "d": {"z": 1, "a": [1, 2, {"k": []}], "m": {}, "e": 1e16, "big": 12345678901234567890, "neg": -0.5},
}
SNIPPETS = [
    "{{ d | tojson }}", "{{ d | tojson(indent=2) }}", "{{ d | tojson(indent=4, sort_keys=true) }}",
    "{{ z | tojson }}", "{{ z | tojson(ensure_ascii=true) }}", "{{ d | tojson(separators=(',', ':')) }}",
    "{{ f | tojson }} {{ [1.0, 0.1, 100000.0, none, false] | tojson }} {{ [] | tojson(indent=2) }}",
    "{{ nope | tojson }}", "{{ l[1:] | tojson }}", "{{ {1: 2, true: 3, none: 4} | tojson }}", "{{ d | tojson(false, 2) }}",
    "{{ l }}|{{ d.a }}|{{ none }}|{{ t }}|{{ 1.0 }}|{{ n / 2 }}|{{ 7 // 2 }}|{{ 2 ** 3 }}|{{ -7 % 3 }}",
    "{{ 'a' ~ none ~ t ~ 1 ~ 1.5 }}|{{ l | join('-') }}|{{ t | string }}|{{ l | string }}",
    "{{ nope.x is defined }}", "[{{ nope }}][{{ nope | default('d') }}][{{ none | default('d', true) }}]",
    "{{ nope.x }}", "{{ nope + 'x' }}", "{{ nope ~ 'x' }}", "{% for x in nope %}x{% else %}none{% endfor %}",
    "{{ d.missing }}|{{ d['missing'] is undefined }}|{{ d.get('missing') }}|{{ d.get('missing', 5) }}", "{{ d.missing.deep }}",
    "{{ 'x' in nope }}", "{{ 'z' in d }}|{{ 'a' in l }}|{{ 'ab' in 'cabd' }}|{{ none in l }}",
    "{% if nope %}y{% else %}n{% endif %}{{ 'y' if nope }}|{{ 'y' if nope else 'n' }}",
    "{{ s.strip() }}|{{ s.split(',') }}|{{ s.split() }}|{{ s.strip().split(',', 1) }}|{{ s.rsplit(',', 1)[0] }}",
    "{{ 'a b  c'.split(none, 1) }}|{{ 'a b  c'.split(' ') }}|{{ 'a b  c '.rsplit(none, 1) }}|{{ 'a.b.c'.split('.', maxsplit=1) }}",
    "{{ 'a.b.c'.partition('.') | list }}|{{ 'a.b.c'.rpartition('.')[0] }}|{{ 'abc'.removeprefix('a') }}|{{ 'abc'.removesuffix('c') }}",
    "{{ 'abc'.startswith('a') }}|{{ 'abc'.endswith(('x', 'c')) }}|{{ 'aXbX'.replace('X', 'y', 1) }}|{{ 'abc'.find('c') }}|{{ 'abc'.index('c') }}",
    "{{ 'hello wORLD'.title() }}|{{ 'hello wORLD'.capitalize() }}|{{ 'x'.upper() }}|{{ '12'.isdigit() }}|{{ ' '.isspace() }}",
    "{{ 'a{}b{}'.format(1, 'x') }}|{{ '%s-%d' | format('a', 3) }}|{{ 'ab' * 2 }}|{{ 'a' 'b' }}",
    "{{ ','.join(['a', 'b']) }}|{{ 'a\\nb\\r\\nc'.splitlines() }}|{{ 'xxabcx'.strip('x') }}|{{ 'xxa'.lstrip('x') }}|{{ 'axx'.rstrip('x') }}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}|{{ d.keys() | list }}|{{ d.values() | list | length }}|{{ d | length }}",
    "{% for k, v in d | dictsort %}{{ k }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}",
    "{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.previtem }}{{ loop.nextitem }};{% endfor %}",
    "{% for x in range(10) %}{% if x == 3 %}{% continue %}{% endif %}{% if x > 5 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% set ns = namespace(i=0, found=false) %}{% for x in l %}{% set ns.i = ns.i + 1 %}{% if x == 'b' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.i }}{{ ns.found }}",
    "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}",
    "{% macro m(a, b='q') %}<{{ a }}{{ b }}{{ caller() if caller else '' }}>{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}{% call m(3) %}in{% endcall %}",
    "{% set v %}block {{ n }}{% endset %}[{{ v }}]{% filter upper %}abc{% endfilter %}{% raw %}{{ x }}{% endraw %}{# c #}",
    "{{ s is string }}{{ l is string }}{{ s is sequence }}{{ l is sequence }}{{ d is sequence }}{{ n is sequence }}{{ none is sequence }}{{ l[1:] is sequence }}{{ nope is sequence }}",
    "{{ s is iterable }}{{ l is iterable }}{{ d is iterable }}{{ n is iterable }}{{ nope is iterable }}{{ none is iterable }}",
    "{{ d is mapping }}{{ l is mapping }}{{ n is number }}{{ t is number }}{{ t is boolean }}{{ t is integer }}{{ 1.0 is float }}{{ none is none }}{{ n is odd }}{{ nope is none }}",
    "{{ t is true }}{{ t is false }}{{ n is eq 3 }}{{ n is divisibleby 3 }}{{ 'x' is in ['x'] }}{{ n is not string }}",
    "{{ l[::-1] }}|{{ l[-1] }}|{{ l[1:3] }}|{{ l[:-1] | length }}|{{ s[2:5] }}|{{ 'abc'[::-1] }}|{{ l[99] is defined }}",
    "{{ [{'a': 1, 'r': 'x'}, {'a': 2, 'r': 'y'}] | map(attribute='a') | list }}|{{ [{'r': 'x', 'i': 1}, {'r': 'y', 'i': 2}] | selectattr('r', 'equalto', 'y') | list }}|{{ [{'r': 1}, {'r': 0}] | rejectattr('r') | list }}",
    "{{ [3, 1, 2] | sort }}|{{ [3, 1, 2] | sort(reverse=true) }}|{{ [1, 2] | sum }}|{{ [1, 2, 3] | first }}|{{ [1, 2, 3] | last }}|{{ ['a', 'a', 'b'] | unique | list }}|{{ [1, 2] | reverse | list }}",
    "{{ 'a  b' | trim }}|{{ '\\n a \\n' | trim | length }}|{{ 'x' | upper }}|{{ 'a\\nb' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}|{{ 'aXb' | replace('X', '') }}|{{ '3' | int + 1 }}|{{ '1.5' | float }}|{{ 2.567 | round(1) }}|{{ -2 | abs }}",
    "{{ [1, 2] + [3] }}|{{ (1, 2) }}|{{ [1, 2] | tojson }}|{{ {'a': 1, 'b': [none]} }}",
    "{{ {'a': 1} == {'a': 1} }}|{{ 1 == 1.0 }}|{{ 'a' < 'b' }}|{{ 1 < 2 < 3 }}|{{ not nope }}|{{ none == nope }}|{{ true and 'x' }}|{{ '' or 'y' }}",
    "{{ '<a> & \"b\"' }}|{{ '<a>' | safe }}|{{ '<a>' | e }}|{{ '<a>' | escape | upper }}",
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n  {%- if true -%}  \n d {%+ if true %}\n e{% endif %}{% endif %}\n\n",
    "x {%- generation -%} y {% endgeneration %}\nz", "  {% generation %}\n  a\n  {%+ endgeneration +%}\n b{%generation%}c{%endgeneration-%}  \n d",
    "{% for i in [1, 2] %}{% generation %}{{ i }}{{ loop.last }}{{ n }}{% set q = 5 %}{% endgeneration %}{{ q }}{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d') }}|{{ strftime_now('%A, %B %d, %Y %H:%M:%S %I %p %j %y %%') }}|{{ strftime_now('%-d %f %a %c %x %X %w %U') }}|{{ strftime_now('[%Z]') }}",
    "{{ raise_exception('no: ' ~ n) }}", "{% if n == 3 %}{{ raise_exception('Deep \"quote\"') }}{% endif %}",
    "{{ l.append(1) }}", "{{ d.update({'q': 1}) }}", "{{ d.pop('z') }}", "{{ l.copy() | length }}|{{ l.index('b') }}|{{ l.count('a') }}",
    "{{ d.a[2] | items | list }}|{{ d.a[2].k | length }}|{{ d['a'][0] }}|{{ dict(a=1) }}|{{ dict(a=1).a }}",
    "{{ '\\u00e9\\x41\\101\\n\\t\\'\\\\\\d' }}", "{{ \"it's\" ~ 'a\"b' }}|{{ [\"it's\", 'a\"b', 'n\\nl'] }}",
    "{{ l | length }} {{- '  x' }} {{ 'y  ' -}}  z", "{{ namespace(a=1).a }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}|{% for a, b in [[1, 2], [3, 4]] if a > 1 %}{{ a }}{{ b }}{% endfor %}|{% for x in [] %}{% else %}empty{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{% if x is sequence %}{{ loop(x) }}{% else %}{{ x }}{% endif %}{% endfor %}",
    "{{ 'abc' | list }}|{{ d | list }}|{{ 'a,b' | replace(',', ';') | upper }}|{{ 'Hello World' | lower }}",
    "{{ [1, 2, 3, 4] | batch(2) | list }}|{{ [1, 2, 3] | select('odd') | list }}|{{ [1, 2] | map('string') | list }}|{{ ['a'] | map('upper') | join }}|{{ [[1, 'a'], [2, 'b']] | map('last') | list }}",
    "{{ 'x' if n is defined and n is not none and n > 2 else 'y' }}|{{ (n | string) + 'q' }}", "{{ 'a' + 1 }}",
    "{{ none.x }}", "{{ none['x'] }}", "{{ missing_function() }}", "{{ s | missing_filter }}", "{% include 'x' %}", "{% bad %}", "{{ 1 + }}", "{{ 1 / 0 }}",
]


def row(source, context):
    try:
        return {"rendered": env.from_string(source).render(**context)}
    except Exception as error:  # whatever Python raises, the template must not render here either
        return {"error": str(error), "raised": type(error) is jinja2.exceptions.TemplateError}


with open(os.path.join(here, "python_golden.jsonl"), "w") as out:
    paths = sorted(glob.glob(os.path.join(here, "chat_templates", "*.jinja")) + glob.glob(os.path.join(here, "chat_templates", "*.tokenizer_config.json")))
    for path in paths:
        source = open(path).read()
        if path.endswith(".json"):
            source = json.loads(source)["chat_template"]
        for case, given in CASES.items():
            for prompt in (False, True):
                given_all = {"tools": None, "documents": None, **given}
                extra = given_all.pop("extra", {})
                result = row(source, {**TOKENS, **given_all, "add_generation_prompt": prompt, **extra})
                record = {"template": os.path.basename(path), "case": case, "add_generation_prompt": prompt, **result}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
    for snippet in SNIPPETS:
        out.write(json.dumps({"snippet": snippet, **row(snippet, VALUES)}, ensure_ascii=False) + "\n")

with open(os.path.join(here, "python_cases.json"), "w") as out:
    json.dump({"tokens": TOKENS, "cases": CASES, "values": VALUES}, out, ensure_ascii=False, indent=1)
