"""What Jinja2 makes of many expressions, as transformers (chat) and lm-evaluation-harness (task) set it up.

python jinja.py          > jinja.jsonl      the rows that the tests read
python jinja.py --all    > FILE             every pair of value and filter, test, method, operator: tens of thousands

One JSON object a line: settings, template, then text, or null where Jinja2 raises an error. The variables of all rows are
in the first line. jinja2 3.1.6, transformers 5.24.0, lm_eval 0.4.13.
"""

import itertools
import json
import random
import sys
import warnings

warnings.filterwarnings("ignore")
import lm_eval.utils
from transformers.utils.chat_template_utils import _compile_jinja_template

CONTEXT = {
    "n": None, "yes": True, "no": False, "zero": 0, "one": 1, "five": 5, "neg": -7, "big": 12345678901234567890,
    "f": 2.5, "g": -0.75, "tiny": 1e-7, "huge": 1e22, "whole": 3.0, "s": "Hello World", "empty": "",
    "quote": "it's \"so\"", "accent": "Éa ß ﬁ İ", "lines": "one\ntwo\r\n\nthree", "spaces": "  a b\t c  ",
    "html": "<b>a & 'b'</b>", "digits": "42", "dec": " 3.75 ", "esc": "tab\there\\ \u200b\x07é\U0001f600",
    "l": [3, 1, 2], "e": [], "mixed": [1, "a", None, 2.5, True], "words": ["b", "A", "c", "a"], "nested": [[1, 2], [3]],
    "d": {"b": 1, "a": [1, "é"], "<k>": None}, "ed": {}, "people": [{"name": "Bo", "age": 3, "tags": ["x"]},
    {"name": "al", "age": 2, "tags": []}, {"name": "Cy", "age": 3}],
    "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "hi\r\nthere"},
                 {"role": "assistant", "content": "yo", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": [True, None]}}}]}],
    "schema": {"type": "object", "properties": {"items": {"type": "array", "items": {"type": "string"}}, "get": {"type": "integer"}}, "required": ["get"]},
}

# As templates write them: models', tasks', and what people report about other implementations.
TEMPLATES = r"""
{{ '%.2f' % f }}|{{ '%s and %d' % (s, five) }}|{{ '%5s|%-5s|%05d|%+d' % ('a', 'b', 42, 7) }}
{{ "%s" % n }}|{{ '%r' % quote }}|{{ '%%' % () }}|{{ '%x %X %o %#x' % (255, 255, 8, 255) }}|{{ '%e %g %G' % (f, tiny, huge) }}
{{ '%(b)s' % d }}|{{ '%s' % l }}|{{ '%c%c' % (65, 'z') }}|{{ '%.3s' % s }}|{{ '%*d' % (6, 42) }}
{{ '%d' % '3' }}
{{ '%s %s' % 'a' }}
{{ '%s' % ('a', 'b') }}
{{ 'abc' % [1] }}|{{ '%d' % 2.9 }}|{{ '%i' % yes }}|{{ '%5.1f|%-8.3f|%08.3f' % (f, f, g) }}
{{ "{} {}".format(1, 'a') }}|{{ "{0}{1}{0}".format('a', 'b') }}|{{ "{x:>5}|{x:<5}|{x:^5}|".format(x=3) }}|{{ "{:,}".format(1234567) }}|{{ "{:.3f} {:e} {:g}".format(f, f, tiny) }}
{{ "{:5}|{:5}|{:>5}|{:*^7}".format(1, 'a', 'b', 'c') }}|{{ "{:08.2f} {:+d} {:x} {:b} {:#o} {:%}".format(f, 5, 255, 5, 8, 0.25) }}|{{ "{!r} {!s}".format('a', 'b') }}
{{ "{a[name]} {a.name}".format(a=people[0]) }}|{{ "{{}} {}".format(1) }}|{{ "{:{w}}|".format('a', w=4) }}|{{ "{:.3}".format(s) }}|{{ "{:.3}|{:.3}".format(3.0, 1234.5) }}
{{ "{}".format() }}
{{ "{:d}".format('a') }}
{{ "{:_} {:,.2f} {:010,}".format(1234567, 1234567.891, 1234) }}|{{ "{:c}".format(65) }}|{{ "{:5}|{}".format(yes, yes) }}|{{ "{:n}".format(5) }}|{{ "{:<05}|{:=+6}".format(42, 42) }}
{{ 'ab'.center(5) }}|{{ 'ab'.ljust(5, '.') }}|{{ 'ab'.rjust(5) }}|{{ '-42'.zfill(6) }}|{{ '42'.zfill(1) }}|{{ 'a'.center(4,'*') }}
{{ s.swapcase() }}|{{ s.title() }}|{{ "they're bill's".title() }}|{{ "they're bill's"|title }}|{{ "a-b (c [d {e <f"|title }}|{{ s|capitalize }}
{{ accent.upper() }}|{{ accent.lower() }}|{{ accent.title() }}|{{ accent.swapcase() }}|{{ accent.casefold() }}|{{ accent|upper }}|{{ accent|capitalize }}|{{ 'ΑΣ'.lower() }}
{{ lines.splitlines() }}|{{ lines.splitlines(true) }}|{{ lines.split() }}|{{ lines.split('\n') }}|{{ spaces.split(' ') }}|{{ spaces.split(None, 1) }}|{{ spaces.rsplit(None, 1) }}|{{ spaces.rsplit(maxsplit=1) }}
{{ 'a,b,c'.split(',', 1) }}|{{ 'a,b,c'.rsplit(',', 1) }}|{{ 'a,b,c'.split(sep=',', maxsplit=-1) }}|{{ 'a--b'.partition('--') }}|{{ 'ab'.rpartition('x') }}|{{ ''.split() }}|{{ ''.split(',') }}
{{ 'a'.split('') }}
{{ 'aXbXc'.replace('X', '-') }}|{{ 'aXbXc'.replace('X', '-', 1) }}|{{ 'abc'.replace('', '-') }}|{{ 'aXb'|replace('X', '') }}|{{ 'aaa'|replace('a', 'b', 2) }}|{{ 12345|replace(3, 'x') }}
{{ 'abcabc'.find('c') }}|{{ 'abcabc'.rfind('c') }}|{{ 'abc'.find('x') }}|{{ 'abcabc'.index('c', 3) }}|{{ 'aaa'.count('a') }}|{{ 'aaa'.count('') }}|{{ 'aéa'.find('a', 1) }}|{{ 'abc'.find('a', -1) }}
{{ 'abc'.index('x') }}
{{ s.startswith('He') }}|{{ s.startswith(('x', 'H')) }}|{{ s.endswith('ld') }}|{{ s.startswith('ello', 1) }}|{{ s.endswith(('a','d')) }}|{{ s.startswith('') }}
{{ s.startswith(1) }}
{{ 'x1'.isalnum() }}|{{ '１２'.isdigit() }}|{{ '²'.isdigit() }}|{{ '²'.isdecimal() }}|{{ '½'.isnumeric() }}|{{ 'é'.isalpha() }}|{{ ''.isalpha() }}|{{ ' \t'.isspace() }}|{{ 'Ab'.istitle() }}|{{ 'a_1'.isidentifier() }}|{{ 'é'.isascii() }}|{{ '\x07'.isprintable() }}
{{ 'AB1'.isupper() }}|{{ 'ab1'.islower() }}|{{ '1'.islower() }}|{{ 'xxabxx'.strip('x') }}|{{ 'xxabxx'.lstrip('x') }}|{{ 'xxabxx'.rstrip('x') }}|{{ spaces.strip() }}|{{ 'abc'.removeprefix('a') }}|{{ 'abc'.removesuffix('x') }}|{{ 'a\tb'.expandtabs(4) }}
{{ ', '.join(['a', 'b']) }}|{{ ''.join(words) }}|{{ '-'.join('abc') }}|{{ '-'.join(d) }}|{{ ','.join(l|map('string')) }}
{{ ','.join(l) }}
{{ s|truncate(5) }}|{{ s|truncate(5, true) }}|{{ s|truncate(5, true, '') }}|{{ s|truncate(5, leeway=0) }}|{{ s|truncate(8, false, '…', 0) }}|{{ s|truncate }}|{{ 'a b c d e f'|truncate(7, leeway=0) }}
{{ s|wordcount }}|{{ "it's a-b c_d"|wordcount }}|{{ 'a'|center(5) }}|{{ s|center(20)|trim }}|{{ 'ab cd ef'|wordwrap(5) }}|{{ 'abcdefgh ij'|wordwrap(3) }}|{{ 'abcdefgh ij'|wordwrap(3, false) }}|{{ 'a b\nc d'|wordwrap(2, wrapstring='/') }}
{{ html|striptags }}|{{ html|e }}|{{ html|escape }}|{{ html|safe }}|{{ (html|e)|e }}|{{ html|forceescape }}|{{ 'a b/c?d=é&'|urlencode }}|{{ {'a b': 'c/d', 'e': 1}|urlencode }}|{{ {'class': 'x y', 'id': none}|xmlattr }}
{{ (html|safe) + '<x>' }}|{{ '<x>' + (html|safe) }}|{{ (html|safe) ~ '<x>' }}|{{ [html|safe] }}|{{ (html|safe)|upper }}|{{ (html|safe)|length }}|{{ (html|e)[:4] }}
{{ 13|filesizeformat }}|{{ 1000|filesizeformat }}|{{ 1500000|filesizeformat }}|{{ 1|filesizeformat }}|{{ 1048576|filesizeformat(true) }}|{{ '3000'|filesizeformat }}
{{ lines|indent }}|{{ lines|indent(2, true) }}|{{ lines|indent('> ', blank=true) }}|{{ lines|indent(first=true) }}|{{ ''|indent(2) }}|{{ 'a\n'|indent(2) }}
{{ 'a' is lower }}|{{ 'A1' is upper }}|{{ 5 is odd }}|{{ 4 is even }}|{{ 6 is divisibleby 3 }}|{{ 6 is divisibleby(4) }}|{{ n is none }}|{{ undefined_thing is undefined }}|{{ n is defined }}|{{ yes is boolean }}|{{ 1 is boolean }}|{{ yes is number }}|{{ yes is integer }}|{{ f is float }}|{{ 1 is float }}
{{ l is sequence }}|{{ d is sequence }}|{{ s is sequence }}|{{ n is sequence }}|{{ 5 is sequence }}|{{ l is iterable }}|{{ n is iterable }}|{{ 5 is iterable }}|{{ d is mapping }}|{{ l is mapping }}|{{ s is string }}|{{ range is callable }}|{{ s.upper is callable }}|{{ s is callable }}
{{ n is sameas none }}|{{ yes is sameas true }}|{{ 1 is sameas true }}|{{ 'x' is eq 'x' }}|{{ 1 is ne 2 }}|{{ 1 is lt 2 }}|{{ 2 is ge(2) }}|{{ 1 is in [1, 2] }}|{{ 'a' is in 'abc' }}|{{ 'upper' is filter }}|{{ 'nope' is filter }}|{{ 'odd' is test }}|{{ yes is true }}|{{ 1 is true }}|{{ no is false }}
{{ 5 is not odd }}|{{ not 5 is odd }}|{{ n is not none }}|{{ s is string and l is iterable }}|{{ s is defined }}|{{ s.x is defined }}|{{ d.zz is defined }}|{{ d['b'] is defined }}
{{ 7 // 2 }}|{{ -7 // 2 }}|{{ 7 // -2 }}|{{ 7 % 3 }}|{{ -7 % 3 }}|{{ 7 % -3 }}|{{ 7 / 2 }}|{{ 4 / 2 }}|{{ -7.5 // 2 }}|{{ -7.5 % 2 }}|{{ 2 ** 10 }}|{{ 2 ** -1 }}|{{ 2 ** 0.5 }}|{{ -2 ** 2 }}|{{ 2 ** 3 ** 2 }}|{{ 10 ** 20 }}
{{ 1 + 1.0 }}|{{ yes + yes }}|{{ 0.1 + 0.2 }}|{{ 1e3 }}|{{ 1_000 }}|{{ 0x1F }}|{{ 0b101 }}|{{ 0o17 }}|{{ 1.5e-7 }}|{{ 1e16 }}|{{ 123456789.0 * 10 }}|{{ 1.0 }}|{{ -0.0 }}|{{ big }}|{{ big + 1 }}|{{ 3.14159 }}|{{ huge }}|{{ tiny }}|{{ 2.50 }}
{{ 1 / 0 }}
{{ 1 // 0 }}
{{ 1.0 % 0 }}
{{ 'a' + 1 }}
{{ 'a' + none }}
{{ l + (1,) }}
{{ -'a' }}
{{ 'a' ~ 1 ~ none ~ 2.0 ~ true ~ [1] }}|{{ 'ab' * 3 }}|{{ 2 * 'ab' }}|{{ [1] * 2 }}|{{ 'a' * -1 }}|{{ [1] + [2] }}|{{ (1,) + (2,) }}|{{ 1 ~ 2 }}
{{ 1 < 2 < 3 }}|{{ 3 > 2 > 2 }}|{{ 1 == 1.0 }}|{{ 1 == true }}|{{ '1' == 1 }}|{{ [1, 2] == [1, 2] }}|{{ (1, 2) == [1, 2] }}|{{ {'a': 1} == {'a': 1.0} }}|{{ none == false }}|{{ 'a' < 'b' }}|{{ 'B' < 'a' }}|{{ [1, 2] < [1, 3] }}|{{ (1, 'a') < (2, 'b') }}|{{ 1 != 2 }}|{{ 1 < 2.5 }}
{{ 1 < 'a' }}
{{ none < 1 }}
{{ [1] < ['a'] }}
{{ {'a': 1} < {'b': 1} }}
{{ 1 in [1, 2] }}|{{ 'a' in d }}|{{ 'ell' in s }}|{{ 4 not in l }}|{{ '' in s }}|{{ none in mixed }}|{{ 1 in {1: 2} }}|{{ 2 in range(3) }}|{{ 'b' in d.keys() }}|{{ 1 in d.values() }}|{{ not 1 in [2] }}
{{ 1 in 'abc' }}
{{ 1 in 5 }}
{{ yes and 'x' }}|{{ no and 'x' }}|{{ '' or 'y' }}|{{ none or 0 or [] }}|{{ not none }}|{{ not 'a' or 1 }}|{{ 1 and 2 or 3 }}|{{ 0 or none }}
{{ 'a' if yes }}|{{ 'a' if no }}|{{ 'a' if no else 'b' }}|{{ ('a' if no) is defined }}|{{ 'a' if no else 'b' if no else 'c' }}|{{ ('x' if no) or 'y' }}|[{{ 'x' ~ ('y' if no) }}]
{{ none }}|{{ true }}|{{ false }}|{{ [] }}|{{ {} }}|{{ () }}|{{ (1,) }}|{{ (1, 2) }}|{{ 1, 2 }}|{{ [1, 'a', none, 2.0, true] }}|{{ {'a': 1, 2: 'b'} }}|{{ mixed }}|{{ d }}|{{ quote }}|{{ [quote] }}|{{ ["it's", 'say "x"', 'a\nb\t\\'] }}|{{ [esc] }}|{{ [accent] }}|{{ nested }}
{{ people }}|{{ people[0] }}|{{ ['\x7f\xa0\xad\u2028\ufeff'] }}|{{ 'a\
b' }}|{{ '\u00e9\x41\101\0' }}|{{ "\q" }}|{{ 'a' 'b' }}|{{ "a" "b" ~ 'c' }}
{{ l[0] }}|{{ l[-1] }}|{{ l[5] }}|{{ l[1:] }}|{{ l[:-1] }}|{{ l[::-1] }}|{{ l[::2] }}|{{ l[-2:] }}|{{ l[5:] }}|{{ l[2:0:-1] }}|{{ s[0] }}|{{ s[-1] }}|{{ s[1:4] }}|{{ s[::-1] }}|{{ 'é€x'[1:] }}|{{ s[:2] }}|{{ (1, 2, 3)[1:] }}|{{ range(10)[2:8:3] }}|{{ l[0:2][0] }}|{{ l.0 }}|{{ nested.0.1 }}|{{ l[yes] }}
{{ none[1:] }}
{{ d[1:] }}
{{ l['a':] }}
{{ l[::0] }}
{{ d.b }}|{{ d['b'] }}|{{ d.get('zz') }}|{{ d.get('zz', 5) }}|{{ d.keys() }}|{{ d.values() }}|{{ d.items() }}|{{ d.items()|list }}|{{ d.keys()|list }}|{{ d|length }}|{{ d|list }}|{{ d.items()|first }}|{{ d['<k>'] }}|{{ d.copy() }}|{{ d|items|list }}|{{ d|dictsort }}|{{ d|dictsort(reverse=true)|list }}|{{ ed|dictsort }}
{{ {'b': 2, 'a': 1, 'C': 3}|dictsort }}|{{ {'b': 2, 'a': 1, 'C': 3}|dictsort(true) }}|{{ {'b': 2, 'a': 1, 'C': 3}|dictsort(by='value') }}|{{ {'b': 2, 'a': 1}|dictsort(false, 'value', true) }}
{{ schema.properties.items is defined }}|{{ schema.properties.get is mapping }}|{{ schema.properties['items'].type }}|{{ schema.items is mapping }}|{{ schema['items'] is callable }}|{{ schema.properties['get']['type'] }}|{{ schema.properties.items is callable }}
{{ schema.properties.items.type }}|{{ schema.properties.items.type is defined }}
{{ s.upper is defined }}|{{ s.nope is defined }}|{{ d.append is defined }}|{{ l.append is defined }}|{{ (5).real }}|{{ f.is_integer() }}|{{ l.index(1) }}|{{ l.count(1) }}|{{ (1, 2).index(2) }}|{{ l.copy() }}
{{ l.index(9) }}
{{ undefined_thing }}
{{ undefined_thing.x }}
{{ undefined_thing['x'] }}
{{ undefined_thing() }}
{{ undefined_thing + 1 }}
{{ undefined_thing < 1 }}
{{ undefined_thing == 1 }}
{{ undefined_thing == other_thing }}
{{ undefined_thing|length }}
{{ undefined_thing|upper }}
{{ undefined_thing|default('x') }}|{{ n|default('x') }}|{{ n|default('x', true) }}|{{ ''|d('x', boolean=true) }}|{{ d.zz|default('q') }}|{{ 0|default(5) }}|{{ s|d }}
{{ undefined_thing|default }}|{{ undefined_thing is defined }}|{{ not undefined_thing is defined }}
{% for x in undefined_thing %}{{ x }}{% else %}none{% endfor %}
{% if undefined_thing %}a{% else %}b{% endif %}
{{ 'a' in undefined_thing }}
{{ undefined_thing in l }}
{{ [undefined_thing] }}
{{ undefined_thing ~ 'x' }}
{{ undefined_thing|int }}
{{ undefined_thing|list }}
{{ undefined_thing|join(',') }}
{{ undefined_thing|tojson }}
{{ undefined_thing is none }}|{{ undefined_thing is string }}|{{ undefined_thing is mapping }}|{{ undefined_thing is sequence }}
{{ undefined_thing is iterable }}
{{ undefined_thing or 'x' }}
{{ undefined_thing and 'x' }}
{{ d.zz.yy }}
{{ d.zz }}
{{ none.x }}
{{ none.x.y }}
{{ (5).x is defined }}|{{ l.foo is undefined }}
{{ s.foo }}
{{ s.foo() }}
{{ l|first }}|{{ l|last }}|{{ e|first is defined }}|{{ s|first }}|{{ s|last }}|{{ l|min }}|{{ l|max }}|{{ words|min }}|{{ words|max(case_sensitive=true) }}|{{ people|map(attribute='age')|max }}|{{ (people|max(attribute='age')).name }}|{{ l|sum }}|{{ people|sum(attribute='age') }}|{{ l|sum(start=10) }}|{{ [0.1, 0.2]|sum }}|{{ e|sum }}
{{ e|first }}
{{ e|max }}
{{ words|sum }}
{{ mixed|max }}
{{ l|sort }}|{{ l|sort(reverse=true) }}|{{ words|sort }}|{{ words|sort(case_sensitive=true) }}|{{ people|sort(attribute='age')|map(attribute='name')|list }}|{{ people|sort(attribute='age,name')|map(attribute='name')|list }}|{{ people|sort(attribute='name', reverse=true)|map(attribute='name')|join }}|{{ d|sort }}|{{ 'hello'|sort }}
{{ mixed|sort }}
{{ people|sort }}
{{ words|unique|list }}|{{ [1, 1.0, true, 2]|unique|list }}|{{ people|unique(attribute='age')|map(attribute='name')|list }}|{{ ['a', 'A']|unique(true)|list }}
{{ [[1], [1]]|unique|list }}
{{ l|reverse|list }}|{{ s|reverse }}|{{ (1, 2)|reverse|list }}|{{ d|reverse|list }}|{{ range(3)|reverse|list }}|{{ l|list }}|{{ s|list }}|{{ 'ab'|list }}|{{ l|join(', ') }}|{{ l|join }}|{{ mixed|join('-') }}|{{ people|join(', ', attribute='name') }}|{{ 'abc'|join('.') }}|{{ e|join(',') }}|{{ [none, true]|join }}
{{ l|map('string')|list }}|{{ words|map('upper')|join }}|{{ people|map(attribute='name')|list }}|{{ people|map(attribute='tags', default='none')|list }}|{{ people|map(attribute='tags.0', default='-')|list }}|{{ ['1', '2']|map('int')|sum }}|{{ words|map('replace', 'a', 'x')|list }}|{{ nested|map('first')|list }}|{{ nested|map('length')|list }}|{{ n|map('upper')|list }}
{{ l|map|list }}
{{ l|map('nope')|list }}
{{ l|select('odd')|list }}|{{ l|reject('odd')|list }}|{{ mixed|select|list }}|{{ mixed|reject|list }}|{{ l|select('greaterthan', 1)|list }}|{{ l|select('>', 1)|list }}|{{ l|select('in', [1, 2])|list }}|{{ mixed|select('string')|list }}|{{ people|selectattr('tags')|map(attribute='name')|list }}|{{ people|rejectattr('tags')|map(attribute='name')|list }}|{{ people|selectattr('age', 'equalto', 3)|map(attribute='name')|list }}|{{ people|selectattr('age', 'lt', 3)|list }}|{{ people|selectattr('tags', 'defined')|list|length }}|{{ messages|selectattr('role', 'eq', 'user')|list|length }}|{{ messages|rejectattr('role', 'in', ['system'])|map(attribute='content')|list }}
{{ l|select('nope')|list }}
{{ (l|select('odd'))|length }}
{% set g = l|select('odd') %}{{ g|list }}{{ g|list }}|{% if l|select('even') %}true{% endif %}|{{ (l|map('string'))|first }}
{% for a in people|groupby('age') %}{{ a.grouper }}:{{ a.list|map(attribute='name')|join(',') }};{% endfor %}|{% for a, b in people|groupby('age') %}{{ a }}={{ b|length }} {% endfor %}|{{ people|groupby('tags', default=[])|length }}|{{ (people|groupby('age'))[0][0] }}|{% for g, i in ['b', 'A', 'a']|groupby(0) %}{{ g }}{{ i }}{% endfor %}
{{ [1, 2, 3, 4, 5]|batch(2)|list }}|{{ [1, 2, 3]|batch(2, 'x')|list }}|{{ [1, 2, 3, 4, 5]|slice(2)|list }}|{{ [1, 2, 3, 4, 5]|slice(3, 'x')|list }}|{{ e|batch(2)|list }}
{{ 42.7|int }}|{{ '42'|int }}|{{ '42.9'|int }}|{{ 'x'|int }}|{{ 'x'|int(5) }}|{{ '0x1A'|int(base=16) }}|{{ '1A'|int(0, 16) }}|{{ '0b11'|int(0, 2) }}|{{ ' 7 '|int }}|{{ none|int }}|{{ yes|int }}|{{ '1_000'|int }}|{{ '1e3'|int }}|{{ '-5'|int }}|{{ '+5'|int }}|{{ [1]|int }}|{{ 'inf'|int }}
{{ '3.5'|float }}|{{ 'x'|float }}|{{ 'x'|float(1.5) }}|{{ 3|float }}|{{ none|float }}|{{ ' 1e3 '|float }}|{{ 'inf'|float }}|{{ '-inf'|float }}|{{ 'nan'|float }}|{{ '1_0.5'|float }}|{{ '.5'|float }}|{{ '5.'|float }}|{{ 'infinity'|float }}|{{ dec|float }}
{{ 42.55|round }}|{{ 42.55|round(1) }}|{{ 2.5|round }}|{{ 3.5|round }}|{{ 42|round }}|{{ 42.55|round(1, 'floor') }}|{{ 42.51|round(0, 'ceil') }}|{{ 1234.5|round(-2) }}|{{ 1234|round(-2) }}|{{ -2.5|round }}|{{ 42.7|round|int }}|{{ 2.675|round(2) }}|{{ 7|round(2, 'ceil') }}|{{ 0.5|round }}|{{ 1e20|round(2) }}
{{ -5|abs }}|{{ -2.5|abs }}|{{ neg|abs }}|{{ yes|abs }}|{{ (-5)|abs }}|{{ 1 - 5|abs }}
{{ 'a'|abs }}
{{ 5|string + 'a' }}|{{ none|string }}|{{ l|string }}|{{ 5|string|length }}|{{ 2.0|string }}|{{ 5|upper }}|{{ none|upper }}|{{ true|lower }}|{{ 5|capitalize }}|{{ l|trim }}|{{ 'xax'|trim('x') }}|{{ '  a '|trim }}|{{ 5|trim }}|{{ '\x1c a \x85'|trim }}|{{ '\u3000a\u200b'|trim }}
{{ d|tojson }}|{{ l|tojson }}|{{ s|tojson }}|{{ n|tojson }}|{{ 1.0|tojson }}|{{ yes|tojson }}|{{ quote|tojson }}|{{ esc|tojson }}|{{ html|tojson }}|{{ (1, 2)|tojson }}|{{ big|tojson }}|{{ tiny|tojson }}|{{ {1: 2, none: 3, true: 4, 1.5: 5}|tojson if no else '' }}|{{ e|tojson }}|{{ ed|tojson }}
{{ d|tojson(indent=2) }}|{{ people|tojson(indent=4) }}|{{ nested|tojson(2) if no else 'x' }}|{{ ed|tojson(indent=2) }}|{{ {'a': {}}|tojson(indent=1) }}
{{ d|tojson(ensure_ascii=true) }}
{{ d|tojson(separators=(',', ':')) }}
{{ d|tojson(sort_keys=true) }}
{{ d|tojson(indent='\t') }}
{{ range|tojson }}
{{ {1: 2, 'a': 3}|tojson }}
{{ {(1, 2): 3}|tojson }}
{{ l|map('string')|tojson }}
{{ d.items()|tojson }}
{{ (d|tojson) ~ "'<" }}|{{ (d|tojson) + "'<" }}|{{ d|tojson|replace('b', 'x') }}|{{ d|tojson|length }}|{{ d|tojson|upper }}
{% set x = 1 %}{{ x }}|{% set a, b = 1, 2 %}{{ a }}{{ b }}|{% set c = (1, 2) %}{{ c }}|{% set x %}a{{ x }}{% endset %}{{ x }}|{% set x | upper %}abc{% endset %}{{ x }}|{% set x | replace('a', 'b') | upper %}abc{% endset %}{{ x }}|{% set x = 1, %}{{ x }}
{% set x = 1 %}{% for i in l %}{% set x = i %}{{ x }}{% endfor %}{{ x }}|{% set x = 1 %}{% if yes %}{% set x = 2 %}{% endif %}{{ x }}|{% for i in [1, 2] %}{{ y is defined }}{% set y = i %}{{ y }}{% endfor %}|{% with x = 5 %}{{ x }}{% endwith %}{{ x }}|{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}
{% set a = 1 %}{% with a = 2, b = a %}{{ a }}{{ b }}{% endwith %}|{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q is defined }}
{% set ns = namespace(x=1, y='a') %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}|{{ ns.zz is defined }}|{% set ns.n = namespace(q=1) %}{{ ns.n.q }}|{% set ns.a, ns.b = 1, 2 %}{{ ns.a }}{{ ns.b }}|{{ namespace({'k': 1}).k }}|{{ ns['x'] }}|{% set ns.t %}block{% endset %}{{ ns.t }}
{% set d.x = 1 %}
{% set q.x = 1 %}
{{ namespace(a=1) }}
{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }} {% endfor %}
{% for x in l %}{{ loop.previtem|default('-') }}{{ x }}{{ loop.nextitem|default('-') }},{% endfor %}|{% for x in l %}{{ loop.cycle('a', 'b') }}{% endfor %}|{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %}|{% for x in l %}{{ ', ' if not loop.first }}{{ x }}{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}|{% for k in d %}{{ k }}{% endfor %}|{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}|{% for x in e %}a{% else %}empty{% endfor %}|{% for x in l if x > 1 %}{{ loop.index }}{{ x }}{{ loop.last }}{% endfor %}|{% for x in l if x > 9 %}{% else %}no{% endfor %}|{% for c in 'abc' %}{{ c }}{% endfor %}|{% for x in 1, 2 %}{{ x }}{% endfor %}
{% for a, b in [1] %}{% endfor %}
{% for a, b in [(1, 2, 3)] %}{% endfor %}
{% for x in 5 %}{% endfor %}
{% for x in none %}{% endfor %}
{% for x in nested recursive %}{% if x is iterable %}[{{ loop(x) }}]{% else %}{{ x }}{{ loop.depth }}{% endif %}{% endfor %}|{% for x in nested %}{% for y in x %}{{ loop.index }}{% endfor %}{{ loop.index }}{% endfor %}
{% for x in l %}{{ loop(x) }}{% endfor %}
{% for x in range(3) %}{{ x }}{% endfor %}|{{ range(5)|list }}|{{ range(1, 10, 3)|list }}|{{ range(5, 0, -2)|list }}|{{ range(3) }}|{{ range(1, 5)[1] }}|{{ range(3)|length }}|{{ range(0) is iterable }}|{{ range(2, 3) }}{{ range(1, 9, 2) }}
{{ range('a') }}
{{ range(1, 2, 0) }}
{% set c = cycler('a', 'b', 'c') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.next() }}{{ c.next() }}{{ c.reset() }}{{ c.next() }}|{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b{{ j() }}|{% set j = joiner() %}{{ j() }}{{ j() }}
{{ dict(a=1, b=2) }}|{{ dict([('a', 1)]) }}|{{ dict(d, z=1)|length }}|{{ dict() }}|{{ {'a': 1, 'a': 2} }}|{{ {1: 'x', true: 'y'} }}|{{ dict(**{'a': 1}) }}
{{ {[1]: 2} }}
{% macro m(a, b=2, c=a) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }}|{{ m(1, 5) }}|{{ m(1, c=7) }}|{{ m(b=1, a=2) }}|{{ m() }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, z=2) }}
{% macro m(a) %}[{{ a is defined }}]{% endmacro %}{{ m() }}|{% macro v() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ v(1, 2, x=3) }}|{{ v() }}|{{ v.name }}{{ m.arguments }}{{ v.catch_varargs }}{{ m.catch_kwargs }}|{{ m(1)|upper }}|{{ m(*[5]) }}|{{ m(**{'a': 6}) }}
{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}x{% endcall %}|{% macro p(x) %}{{ caller(x) }}{{ caller(x + 1) }}{% endmacro %}{% call(i) p(1) %}({{ i }}){% endcall %}|{% macro o() %}{% if caller %}c{% else %}n{% endif %}{% endmacro %}{{ o() }}{% call o() %}{% endcall %}
{% macro a() %}x{{ q }}{% endmacro %}{% set q = 1 %}{{ a() }}{% set q = 2 %}{{ a() }}|{% macro r(n) %}{{ n }}{% if n > 0 %}{{ r(n - 1) }}{% endif %}{% endmacro %}{{ r(3) }}|{% for x in l %}{% macro lm() %}{{ x }}{% endmacro %}{{ lm() }}{% endfor %}
{% macro m() %}{% set z = 1 %}{% endmacro %}{{ m() }}{{ z is defined }}|{% macro m() %}{{ s }}{% endmacro %}{{ m() }}|{% call undefined_macro() %}{% endcall %}
{% filter upper %}abc{{ s }}{% endfilter %}|{% filter replace('a', 'b')|upper %}aa{% endfilter %}|{% print s, 1 %}|{% block x %}b{{ s }}{% endblock %}|{% block y %}{% endblock y %}|{% raw %}{{ x }}{% endraw %}|{# c #}a{#- c -#} b
{% if no %}a{% elif yes %}b{% else %}c{% endif %}|{% if l and d %}x{% endif %}|{% if 'a' %}1{% endif %}{% if '' %}2{% endif %}{% if 0.0 %}3{% endif %}{% if e %}4{% endif %}{% if n %}5{% endif %}{% if () %}6{% endif %}{% if 'False' %}7{% endif %}|{% if yes: %}colon{% endif %}
{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}
{% for x in l %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% include 'x' %}
{% import 'x' as y %}
{% extends 'x' %}
{% nope %}
{{ s|nope }}
{{ s is nope }}
{{ 1 + }}
{{ (1 }}
{% if yes %}
{% endif %}
{{ 'abc }}
{{ a b }}
{# open
{% raw %} x
{{ s | upper | lower | title }}|{{ s|upper|length + 1 }}|{{ -l|length }}|{{ 1 + 2 * 3 - 4 / 2 }}|{{ (1 + 2) * 3 }}|{{ 'a' ~ 1 + 2 }}|{{ 1 ~ 2 * 3 }}|{{ not no and yes }}|{{ 5 - 3 - 1 }}|{{ 2 * -3 }}|{{ - 3 }}|{{ +3 }}|{{ --3 }}|{{ 10 % 3 * 2 }}
{{ yes if yes else no }}|{{ [x for x in l] }}
{{ l[0] if l else 'none' }}|{{ (l|first) + 1 }}|{{ 'x'.join(['a', 'b'])|upper }}|{{ messages[-1].tool_calls[0].function.arguments|tojson }}|{{ messages[1]['content'] }}|{{ messages[0].role == 'system' }}|{{ messages[1:]|length }}|{{ messages|length - 1 }}|{{ messages[-1].tool_calls[0].function.arguments.items()|list }}
{{ '' is none }}|{{ messages[0].tool_calls is defined }}|{{ messages[-1].get('tool_calls', []) | length }}|{{ messages[0].get('tool_calls') is none }}|{{ 'content' in messages[0] }}|{{ messages[-1]['tool_calls'][0]['function']['name'] }}|{{ 'role' not in messages[0] }}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    <u>{{ m.content }}</u>
  {%- else %}
    <o>{{- m.content -}}</o>
  {% endif %}
{%- endfor -%}
{% set x = l.append(4) %}{{ l }}
{% set _ = d.update({'q': 1}) %}{{ d }}
{% set m = messages[0].pop('role') %}{{ m }}
{% set x = [1] %}{% set _ = x.append(2) %}{{ x }}{{ x.pop() }}{{ x }}{% set _ = x.insert(0, 9) %}{{ x }}{% set _ = x.extend([7, 8]) %}{{ x }}{% set _ = x.reverse() %}{{ x }}{% set _ = x.sort() %}{{ x }}{% set _ = x.remove(9) %}{{ x }}
{{ s.__class__ }}
{{ s.__class__.__mro__ }}
{{ ''.__len__ is defined }}
{{ d._x is defined }}|{{ d['__class__'] is defined }}
{{ (1, 2) }}|{{ (1) }}|{{ ((1, 2), 3) }}|{{ [(1, 'a')] }}|{{ d.items()|list|length }}|{{ (1, 2)[0] }}|{{ 'a,b'.partition(',') }}|{{ (1, 2)|length }}|{{ (1, 2)|list }}|{{ (3, 1)|sort }}|{{ ()|length }}
{{ l.x.y is defined }}
{{ l.x is defined and l.x.y }}|{{ people[0].tags[0] }}|{{ people[2].tags is defined }}|{{ people[2].tags|default([])|length }}|{{ (people|first).name }}|{{ people|map(attribute='name')|sort|join(',') }}
{{ lines|replace('\n', '|') }}|{{ lines|replace('\r\n', '|') }}|{{ lines.split('\n')|length }}|{{ '\r\n'|length }}|{{ "a
b"|length }}
{{ '\\n' }}|{{ '\\' }}|{{ "\"" }}|{{ '\'' }}|{{ '{{' }}|{{ '}}' }}|{{ "%}" }}|{{ '#}' }}|{{ {'a': {'b': 1}}.a.b }}|{{ {'a': {'b': 1}}['a']['b'] }}
{{ True }}{{ False }}{{ None }}|{{ True and None }}|{{ [True, None] }}|{{ true == True }}
{{ 1 if 1 is odd else 2 }}|{{ 1 is odd and 2 is even }}|{{ (1 is odd) ~ 'x' }}|{{ 3 is divisibleby 3 and yes }}|{{ 'a' is in ['a'] or no }}|{{ l|length > 2 }}|{{ l|length == 3 and 'y' or 'n' }}|{{ not l|length }}|{{ s|length // 2 }}
{{ s.replace("o", "0").upper()[::-1] }}|{{ (s|upper).lower() }}|{{ [s, s|upper]|join(' ')|length }}|{{ '%s-%s' % (s, s|upper) }}|{{ s.split()[0][0] }}|{{ s.split(' ')|last }}|{{ (s ~ '!')[-1] }}|{{ s.count('l') }}|{{ s.lower().count('l') }}
{{ 10000000000000000000000 }}|{{ 9223372036854775807 + 1 }}|{{ -9223372036854775808 - 1 }}|{{ 3 * 1.5 }}|{{ 7.0 // 2 }}|{{ 1e400 }}|{{ 1e308 * 10 }}|{{ 5 // 2.0 }}|{{ 0.1 * 3 }}|{{ 100.0 / 3 }}|{{ 1 / 3 }}|{{ 2 / 3 * 3 }}
{{ loop is defined }}|{{ self is defined }}
{{ caller is defined }}|{{ varargs is defined }}
{{ l | pprint }}|{{ {'b': 1, 'a': 2} | pprint }}|{{ s | pprint }}
{{ l | attr('append') is defined }}|{{ s | attr('upper') is callable }}|{{ d | attr('b') is defined }}|{{ d | attr('items') is defined }}
{{ '<%s>' | format('a') }}|{{ '%s %s' | format('a', 1) }}|{{ '%(x)s' | format(x=3) }}|{{ '%d%%' | format(50) }}|{{ '%.1f' | format(2.25) }}
{{ '%s' | format(1, 2) }}
{{ "a" "b" }}|{{ ["a" "b", "c"] }}|{{ ('a' 'b') }}
{{ 1.e5 }}
{{ 1.5.x is defined }}
{{ [1, 2,] }}|{{ {'a': 1,} }}|{{ (1,) }}|{{ dict(a=1,) }}|{{ [] == [] }}|{{ [1,2][-1] }}
{{ l[0:1] + l[2:] }}|{{ s[0:5] ~ s[5:] }}|{{ 'abcdef'[1:-1:2] }}|{{ 'abcdef'[-3:-1] }}|{{ 'abc'[10:] }}|{{ 'abc'[-10:2] }}|{{ 'abc'[:-10] }}|{{ [1,2,3,4][-1:0:-2] }}
{% set x = 5 %}{% macro m(x) %}{{ x }}{% endmacro %}{{ m(1) }}{{ x }}|{% for x in [1] %}{{ x }}{% endfor %}{{ x }}|{% for x in x and [x] %}{{ x }}{% endfor %}
{% for i in range(3) %}{% for j in range(2) %}{{ i }}{{ j }}{{ loop.parent is defined }} {% endfor %}{% endfor %}
{% set outer = loop %}{% for i in [1] %}{% set o = loop %}{% for j in [1, 2] %}{{ o.index }}{{ loop.index }}{% endfor %}{% endfor %}
{{ raise_exception('boom') }}
{{ raise_exception('bad ' ~ s) if yes }}
{{ lipsum is defined }}|{{ range is defined }}|{{ namespace is defined }}|{{ joiner is callable }}|{{ raise_exception is defined }}|{{ strftime_now is defined }}
{% generation %}{{ s }}{% endgeneration %}
{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% set z = 1 %}{% endgeneration %}{{ z is defined }}{% endif %}{% endfor %}
{{ 'a'|regex_replace('a', 'b') }}|{{ 'aXbX'|regex_replace('X', '', 1) }}|{{ 'John Smith'|regex_replace('(\w+) (\w+)', '\\2 \\1') }}
{% autoescape true %}{{ html }}{% endautoescape %}
{% do 1 %}
{% trans %}a{% endtrans %}
{{ d.items()[0] is defined }}|{{ d.keys()[0] is defined }}|{{ (d|items)[0] is defined }}
{{ d.items()|length }}|{{ d.values()|list }}|{{ d.keys()|join(',') }}|{{ d.items()|sort(attribute='0')|map('first')|join }}|{{ d.values()|select('number')|list }}|{{ d.keys()|sort }}|{{ d.keys() == {'b': 0, 'a': 0, '<k>': 0}.keys() }}
""".strip("\n")

# White space around tags, line ends and comments: written with \n and \r\n.
WHITESPACE = [
    "a\n{% if yes %}\nb\n{% endif %}\nc\n", "  {% if yes %}  x  {% endif %}  \n  y", "a {%- if yes -%} b {%- endif -%} c",
    "a\n  {%+ if yes %}\n  b\n  {%- endif +%}\n\nc", "{{ s }}\n", "{{ s }}\n\n", "\n\n{{ s }}\r\n", "a\r\nb\r{{ s }}\r\n{% if yes %}\r\nx\r\n{% endif %}\r\n",
    "  {# c #}\n  x", "a\n  {#- c -#}\n  x", "a {#+ c +#}\n x", "{# c #}\nx\n{# d #}", "x {# a #} y\n", "{#-#}x", "{##}x",
    "{% raw %}\n  {{ x }}\n{% endraw %}\nz", "a\n  {%- raw -%}\n {{ x }} \n {%- endraw -%}\n b", "  {% raw %}a{% endraw %}", "{% raw -%}  a  {%- endraw %}",
    "{% for x in l %}\n  {{ x }}\n{% endfor %}\n", "{% for x in l -%}\n  {{ x }},\n{%- endfor %}", "  {{ s }}  \n  {{- s -}}  \n  z", "{{- s }}", "a\n\n{{- s }}", "{{ s -}}\n\n b",
    "\t{% set x = 1 %}\n{{ x }}", "x\t{% set x = 1 %}\ny", "\u00a0{% set x = 1 %}y", "{% set x = 1 %}\n\n{{ x }}", "{% set x = 'a\nb' %}{{ x }}", "{% set x = 'a\r\nb\rc' %}{{ x|length }}",
    "{% if yes %}a{% endif %}\n{% if yes %}b{% endif %}\n", "{% if yes -%}\n\n a\n{% endif %}", "<|im_start|>{{ s }}\r\n{% if yes %}<|im_end|>\r\n{% endif %}", "{{ 1 }}{{ 2 }}\n{{ 3 }}", "{%if yes%}a{%endif%}",
    "{%- set x -%}\n a \n{%- endset -%}\n[{{ x }}]", "{% macro m() %}\n a\n{% endmacro %}\n[{{ m() }}]", "  {% macro m() -%}\n a\n  {%- endmacro %}  [{{ m() }}]", "a{% if yes %}\n\n{% endif %}b", "{{ '\n' }}\n", "\n", "", " ", "{", "{ {", "a}}b", "%}", "{{ '{%' }}{{ \"}}\" }}",
    "a\n {%+ set x=1 +%}\n b", "a\x0b{%- set x=1 -%}\x0cb", "a\u2028{%- set x=1 -%}\u2028b", "line\n    {% if yes %}    \n    b\n    {% endif %}    \nend", "\ufeff{{ s }}", "{{\n  s\n  | upper\n}}", "{%\n set x = 1\n%}{{ x }}",
]

VALUES = ["n", "yes", "zero", "neg", "f", "g", "whole", "s", "empty", "digits", "accent", "lines", "html", "l", "e", "mixed", "words", "nested", "d", "ed", "people", "(1, 'a')", "range(3)", "(l|map('string'))", "undefined_thing", "d.items()", "(html|e)", "'a\\tb'"]
FILTERS = ["abs", "batch(2)|list", "capitalize", "center(9)", "count", "default('D')", "default('D', true)", "dictsort", "escape", "filesizeformat", "first", "float", "format", "indent", "indent(2, true, true)", "int", "items|list", "join('-')", "last", "length", "list", "lower", "map('string')|list", "map(attribute='0')|list", "max", "min", "reject|list", "replace('a', 'b')", "reverse", "reverse|list", "round", "round(1)", "safe", "select|list", "select('string')|list", "selectattr('name')|list", "slice(2)|list", "sort", "string", "striptags", "sum", "title", "tojson", "tojson(indent=2)", "trim", "truncate(4, true)", "unique|list", "upper", "urlencode", "wordcount", "wordwrap(4)", "groupby('age')|list", "forceescape", "xmlattr", "pprint", "attr('x')"]
TESTS = ["boolean", "callable", "defined", "divisibleby(2)", "eq(1)", "escaped", "even", "false", "float", "ge(1)", "gt(1)", "in([1, 'a'])", "in('abc')", "integer", "iterable", "le(1)", "lower", "lt('b')", "mapping", "ne(1)", "none", "number", "odd", "sameas(none)", "sequence", "string", "true", "undefined", "upper"]
METHODS = ["upper()", "strip()", "split()", "get('a')", "items()", "keys()|list", "count(1)", "index(1)", "copy()", "title()", "swapcase()", "isdigit()", "startswith('a')", "splitlines()", "x", "name", "items", "0", "zfill(5)", "center(7, '*')", "join(['a', 'b'])", "format(1)", "is_integer()"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"]
OPERANDS = ["n", "yes", "zero", "five", "neg", "f", "s", "empty", "'%s'", "l", "e", "(1, 'a')", "d", "undefined_thing", "nested", "(html|e)", "range(3)", "'a'", "3.0"]
SUBSCRIPTS = ["[0]", "[-1]", "['a']", "['name']", "[1:]", "[::-1]", "[:-1]", "[none]", "[f]", "[yes]", "[undefined_thing]", "[l]", ".items", ".real"]


def systematic():
    for value in VALUES:
        for name in FILTERS:
            yield "{{ %s|%s }}" % (value, name)
        for name in TESTS:
            yield "{{ %s is %s }}" % (value, name)
        for name in METHODS:
            yield "{{ (%s).%s }}" % (value, name)
        for name in SUBSCRIPTS:
            yield "{{ (%s)%s }}" % (value, name)
        for name in ["-", "+", "not "]:
            yield "{{ %s(%s) }}" % (name, value)
        yield "{%% for x in %s %%}{{ loop.index }}{{ x }};{%% else %%}E{%% endfor %%}" % value
        yield "{%% if %s %%}T{%% else %%}F{%% endif %%}" % value
        yield "{{ [%s] }}|{{ (%s,) }}" % (value, value)
        yield "{{ {'k': %s} }}" % value
        yield "{{ {%s: 1} }}" % value
        yield "{{ '%%s' %% %s }}" % value
        yield "{{ '%%d|%%5.1f' %% (%s, %s) }}" % (value, value)
        yield "{{ '{:>8}|{!r}'.format(%s, %s) }}" % (value, value)
        yield "{{ %s ~ '' }}" % value
    for a, o, b in itertools.product(OPERANDS, OPERATORS, OPERANDS):
        yield "{{ %s %s %s }}" % (a, o, b)


def rendered(settings, template):
    context = json.loads(json.dumps(CONTEXT))
    try:
        if settings == "chat":
            compiled = _compile_jinja_template(template)
        else:
            compiled = lm_eval.utils.env.from_string(template)
        text = compiled.render(**context)
    except RecursionError:
        raise
    except Exception:
        return {"text": None}
    # A place in memory is nothing to compare.
    return None if " at 0x" in text or "object object" in text else {"text": text}


def main():
    rows = []
    hand = []
    for line in TEMPLATES.split("\n"):
        if line and not line.startswith((" ", "b'", "b\"")) and not hand or (hand and not line.startswith((" ", "{%- endfor", "b'", 'b"', "  "))):
            hand.append(line)
        else:
            hand[-1] += "\n" + line
    # A row of several is one for each, so that a difference has a name; text with no variable of its own stays whole.
    single = []
    for row in hand:
        parts = row.split("|{{ ") if "{%" not in row else [row]
        single += [parts[0]] + ["{{ " + part for part in parts[1:]]
        if len(parts) == 1 and "}}|" in row:
            single.append(row)
    templates = [(s, t) for t in single + WHITESPACE for s in ("chat", "task")]
    crlf = [(s, t.replace("\n", "\r\n")) for t in WHITESPACE if "\n" in t and "\r" not in t for s in ("chat", "task")]
    pairs = [(s, t) for t in systematic() for s in ("chat", "task")]
    if "--all" not in sys.argv:
        pairs = random.Random(20).sample(pairs, 700)
    seen = set()
    print(json.dumps({"variables": CONTEXT}, ensure_ascii=False))
    for settings, template in templates + crlf + pairs:
        if (settings, template) in seen:
            continue
        seen.add((settings, template))
        result = rendered(settings, template)
        if result:
            print(json.dumps({"settings": settings, "template": template, **result}, ensure_ascii=False))


main()
