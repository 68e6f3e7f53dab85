"""What a corpus calls its speakers and groups is shown as text: in Markdown, in tables for spreadsheets, in pages."""

import ast
import csv
import re
import shlex
from html.parser import HTMLParser

import pytest

from common.data.corpus import Utterance
from common.evaluation.breakdown import scored_row, write_table
from common.evaluation.wer import score
from common.export.readmes import peft_page, vllm_page
from common.markdown import code, escape
from tests.common.report.test_model_card import RATES, SUMMARY, card

NAMES = [
    "a\nb",
    "a\r\n\r\n## Heading",
    "a | b | c |",
    "|---|---|",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- hidden",
    "</td></table>",
    "&lt;b&gt;",
    "[link](https://example.org)",
    "![image](https://example.org/i.png)",
    "[ref]: https://example.org",
    "<https://example.org>",
    "https://example.org",
    "www.example.org",
    "WWW.example.org",
    "someone@example.org",
    "@everyone",
    "#123",
    "**bold** _it_ ~~no~~",
    "`code`",
    "``` \nfence\n```",
    "$$x$$",
    "\\",
    "a\\|b",
    "---\nlicense: mit\n---",
    "\x1b[31mred\x1b[0m",
    "\x00",
    "\u202eright to left",
    "\u2028line",
    "\ufeff",
    "{{ config }}{% raw %}",
    "=1+1",
    "",
    "   ",
    "\ud800",
    "x" * 5000,
]
LINK = re.compile(r"(?<!\\)://")
ACTIVE = re.compile(r"(?<!\\)(?:\\\\)*[`*_\[\]<>|~@&$!#]")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_changes_nothing_in_the_model_card_but_its_cell(name, tally):
    groups = {name: RATES | {"utterances": 30, "speakers": 1, "wer_after": 0.9}, "b": SUMMARY["by_etiology"]["slurred"]}
    plain = {("plain" if key == name else key): value for key, value in groups.items()}
    speech = [Utterance("1", "1.wav", 3600.0, "x", "train", name), Utterance("2", "2.wav", 1.0, "x", "test", "bob")]
    (_, text), (_, expected) = (
        card(summary=SUMMARY | {"by_etiology": rates}, speech=speech) for rates in (groups, plain)
    )
    lines, wanted = text.split("\n"), expected.split("\n")
    lost = len(lines) != len(wanted) or len(text.splitlines()) != len(expected.splitlines())
    for line, other in zip(lines, wanted, strict=False):
        before, mark, after = other.partition("plain")
        same = line == other if not mark else line.startswith(before) and line.endswith(after)
        lost = lost or not same
        if mark and same:
            shown = line[len(before) : len(line) - len(after)]
            lost = (
                lost or bool(ACTIVE.search(shown)) or not shown.isprintable() or bool(re.search(r"(?<!\\)://", shown))
            )
    tally(1, int(lost))


@pytest.mark.parametrize("name", NAMES)
def test_a_code_span_ends_where_we_end_it(name):
    made = code(name)
    fence = re.match("`*", made)[0]
    inside = made[len(fence) : len(made) - len(fence)]
    assert made == "(empty)" or (made.endswith(fence) and fence not in re.findall("`+", inside))
    assert made.isprintable() and escape(made) is made


@pytest.mark.parametrize(
    "base", ['x")\nimport os #', "```\n\n# Heading", "a b; rm -rf /", "$(id)", "`id`", "it's", "{base}"]
)
def test_a_bases_name_is_one_literal_and_one_word_in_the_pages_of_exports(base):
    audio, embedding = {"context": "30s", "margin": 64}, {"layer": -1, "pooling": "mean"}
    table = {"base": base, "adapters": ["expert-0"], "language": "en", "audio": audio, "embedding": embedding}
    table |= {"top_k": 1, "mixture": "blend", "encoder_adapted": False, "task": "transcribe", "multilingual": False}
    table |= {"added": {}}
    program = re.findall(r"^```python\n(.*?)^```", peft_page(table), re.DOTALL | re.MULTILINE)[0]
    values = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
    assert " ".join(base.split()) in values and len(ast.parse(program).body) == 5
    command = re.findall(r"^```sh\n(.*?)^```", vllm_page(table, 8), re.DOTALL | re.MULTILINE)[0]
    assert shlex.split(command)[:3] == ["vllm", "serve", " ".join(base.split())]


FORMULAS = [
    f"{start}{rest}" for start in ("=", "+", "-", "@", "\t=", "\r=", "\n=", "'=", "''=", "＝") for rest in ("1+1", "")
]
FORMULAS += [
    '=HYPERLINK("https://example.org","x")',
    "=cmd|' /C calc'!A0",
    "'tis fine",
    "'",
    "''",
    "a=b",
    "x, y",
    'say "x"',
]


def test_no_cell_is_a_formula_and_every_text_is_there(tmp_path, tally):
    rows = []
    for number, text in enumerate(FORMULAS):
        u = Utterance(f"{text}{number}", f"{text}.wav", 1.0, text, "test", text, text, text, text_alt=text)
        rows.append(scored_row(u, text, score(u.id, text, [text or "x"]), ((0, 1), (0.5, 0.5))))
    write_table(tmp_path / "utterances.csv", rows)
    with (tmp_path / "utterances.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    formulas = [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))]
    assert not formulas and all(text in cells or f"'{text}" in cells for text in FORMULAS)
    tally(len(cells), len(formulas))


class Tags(HTMLParser):
    """Counts the tags of a page, with their attributes' names."""

    def __init__(self, text):
        super().__init__()
        self.counts = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        key = (tag, tuple(name for name, _ in attrs))
        self.counts[key] = self.counts.get(key, 0) + 1


def test_the_report_has_the_same_tags_whatever_groups_are_called(tmp_path, tally):
    from common.report.page import render_page

    def page(name):
        line = RATES | {"name": name, "utterances": 3, "speakers": 1}
        values = {"lines": [line], "top": 1.0, "single": [name], "slices": [{"title": name, "rows": [line], "cut": 0}]}
        return render_page(
            "report.html", etiologies=values, contents=[(name, name, True)], left_out=[name], about=[name]
        )

    wanted = Tags(page("plain")).counts
    lost = [name for name in NAMES if name != "\ud800" and Tags(page(name)).counts != wanted]
    assert not lost
    tally(len(NAMES), len(lost))
