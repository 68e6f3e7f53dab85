"""Commands of README.md and docs/ are commands that exist, and those of a newcomer's way run in this order.

Every line of every ```sh block is looked at. `moe-asr` and `python -m stages` are parsed by the commands themselves,
`make` by the Makefile's targets, workflow parameters by their table. What RUN names is run too, on tones with
a model of two layers.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import warnings
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from argo.parameters import EXTEND_PARAMETERS, PARAMETERS
from cli.main import cli
from common.data.corpus import read_corpus
from recipes.text_to_sql.__main__ import cli as text_to_sql
from stages.__main__ import stages
from tests.common.report.test_report import Page

pytestmark = pytest.mark.timeout(900)  # some twenty commands, one after the other

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
MODULES = {"stages": stages, "recipes.text_to_sql": text_to_sql}
ELSEWHERE = ("kubectl", "helm", "argo", "docker", "podman", "git", "vllm", "curl", "ffmpeg")  # not ours to parse

# Pages whose `moe-asr` and `stages` lines are run, in this order, in one folder.
RUN = ("docs/tutorial.md", "docs/resume.md", "README.md", "docs/running.md")
# What a line's words become, so that it takes seconds here: a model of two layers, tones, one epoch.
SUBSTITUTIONS = {
    "openai/whisper-small": "{model}",
    "openai/whisper-large-v2": "{model}",
    "--mode full": "--config short.yaml",
    "--mode demo": "--config demo.yaml",
    "--gpu auto": "--config short.yaml --no-plot",
    "--mode quick": "--mode quick --no-plot --num-workers 0 --set precision=fp32",
    "--num-experts 4": "--num-experts 2",
    "data/demo": "data/mine",
}
# Lines of these pages that are parsed, not run: a bucket, a cluster, several processes, minutes.
PARSED = (
    r"s3://|--cluster|--kind bench|^moe-asr submit|fit-batch|--processes|--metrics-port"
    r"|^moe-asr (estimate|gc|sweep|merge)|--config mine"
)
SHORT = (
    "seed: 1\nnum_experts: 2\n"
    "subsets: {embeddings_percent: 100, experts_percent: 100, dev_samples: 6, test_samples: 6}\n"
    "cluster: {algorithm: spectral, reduce_dim: 4, plot: none}\ngating: {epochs: 1}\n"
    "experts: {epochs: 1, batch_size: 8}\n"
    "asr: {epochs: 1, batch_size: 8, select_samples: 4}\nlora: {rank: 2, shared_rank: 4}\ndecode: {max_new_tokens: 8}\n"
    "runtime: {num_workers: 0, plots: false}\nprecision: fp32\n"
)


def lines(page):
    """Command lines of a page's sh blocks, continuations joined, comments off."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line := re.sub(r"(^|\s)#.*$", "", line).strip():
                yield line


ALL = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in lines(page)]


def find_command(group, words):
    """The command that the words call, and the words after it."""
    command, rest = group, list(words)
    while isinstance(command, click.Group):
        assert rest and rest[0] in command.commands, f"no command {rest[:1]} in {command.name}"
        command = command.commands[rest.pop(0)]
    return command, rest


def parse(line):
    """Fails unless every word of a line means something today."""
    words = shlex.split(re.sub(r" (>|>>|\||&&) .*$", "", line))
    if words[0] == "moe-asr":
        command, rest = find_command(cli, words[1:])
        command.make_context("moe-asr", rest)
    elif words[:2] == ["python", "-m"] and words[2] in MODULES:
        command, rest = find_command(MODULES[words[2]], words[3:])
        command.make_context(words[2], rest)
    elif words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS, line
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), line
    else:
        assert words[0] in ELSEWHERE or "=" in words[0], f"nobody checks {line!r}"
        given = re.findall(r" -p ([a-z-]+)=", line) if words[0] == "argo" else ()
        assert set(given) <= PARAMETERS.keys() | EXTEND_PARAMETERS.keys(), line


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{page}: {line[:60]}" for page, line in ALL])
def test_every_word_of_a_documented_command_exists(page, line):
    parse(line)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_of_the_site_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "//" not in target]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_pages_show_enough_to_be_worth_checking():
    assert {page for page, _ in ALL} >= set(RUN)
    assert sum(line.startswith("moe-asr") for _, line in ALL) > 30


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, micro_model, tones):
    """A folder with what the tutorial takes as given: a table, recordings, a model."""
    place = tmp_path_factory.mktemp("newcomer")
    corpus = read_corpus(tones)
    shutil.copytree(tones / "audio", place / "recordings")
    with (place / "table.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("audio", "text", "speaker", "etiology"))
        few = [u for u in corpus.utterances if u.id.endswith(("00", "01", "02"))]
        rows.writerows((Path(u.audio_filepath).name, u.text, u.speaker, u.etiology) for u in few)
    shutil.copy(tones / corpus.utterances[0].audio_filepath, place / "recording.wav")
    (place / "short.yaml").write_text(SHORT, encoding="utf-8")
    own = f"run: demo\ncorpus: {{path: data/mine}}\nmodel: {{name: {micro_model}}}\n"
    (place / "demo.yaml").write_text(SHORT + own, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def newcomer(workplace, micro_model):
    """The folder after all commands of RUN; each command and what came of it."""
    ran = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many as a GPU server has cores
        patch.chdir(workplace)
        patch.setenv("MOE_ASR_CACHE", str(workplace / "cache"))
        for page in RUN:
            for line in lines(ROOT / page):
                ours = line.startswith(("moe-asr ", "python -m stages "))
                if not ours or re.search(PARSED, line) or line in ran:
                    continue
                words = line
                for old, new in SUBSTITUTIONS.items():
                    words = words.replace(old, new.format(model=micro_model))
                group, skipped = (cli, 1) if line.startswith("moe-asr") else (stages, 3)
                ran[line] = page, words, CliRunner().invoke(group, shlex.split(words)[skipped:])
    return workplace, ran


def test_a_newcomers_commands_run_in_the_order_of_the_pages(newcomer):
    place, ran = newcomer
    for page, words, done in ran.values():
        assert done.exit_code == 0, f"{page}: {words}\n{done.output}\n{done.exception!r}"
    assert len(ran) > 20
    for name in ("try", "mine", "regular", "one-adapter", "demo"):
        assert (place / "runs" / name / "report.html").is_file()


def test_every_key_of_a_summary_and_every_column_of_metrics_is_documented(newcomer):
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    for run in ("mine", "one-adapter"):
        summary = json.loads((newcomer[0] / "runs" / run / "summary.json").read_text(encoding="utf-8"))
        assert {key for key in summary if f"`{key}`" not in page} <= {"by_etiology"}
    columns = set()
    for file in (newcomer[0] / "runs" / "artifacts").rglob("metrics.jsonl"):
        columns |= {key for line in file.read_text(encoding="utf-8").splitlines() for key in json.loads(line)}
    assert {column for column in columns if f"`{column}`" not in page} == set()


def test_every_file_of_an_artifact_is_documented(newcomer):
    page = (ROOT / "docs" / "reference" / "artifacts.md").read_text(encoding="utf-8")
    told = page.partition("## Files")[2].partition("## manifest")[0]
    patterns = [re.sub("<n>|…", "*", pattern) for pattern in re.findall(r"`([^` ]+)`", told)]
    missing = set()
    for file in (newcomer[0] / "runs" / "artifacts").glob("*/*/manifest.json"):
        for name in json.loads(file.read_text(encoding="utf-8"))["files"]:
            if not any(fnmatch(name, pattern) for pattern in patterns):
                missing.add((file.parts[-3], name))
    assert missing == set()


PAGES_OF_RUNS = (
    "runs/mine/report.html",
    "out/comparison/compare.html",
    "out/evaluation/report.html",
)


@pytest.mark.parametrize("name", PAGES_OF_RUNS)
def test_a_page_can_be_read_by_ear_and_walked_by_keyboard(newcomer, name):
    page = Page((newcomer[0] / name).read_text(encoding="utf-8"))
    assert page.all("html")[0]["lang"] == "en"
    assert {len(page.all(tag)) for tag in ("main", "header", "h1", "title")} == {1}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels)), levels
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a") if a.get("href", "").startswith("#")} <= set(ids)
    assert all(th.get("scope") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg.get("aria-label")), svg
    assert all(
        element.get("tabindex") == "0" and element.get("aria-label")
        for element in page.all("div")
        if element.get("role") == "region"
    )
    assert ":focus-visible" in page.html
    assert "prefers-color-scheme: dark" in page.html


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(scheme):
    css = (ROOT / "common" / "report" / "templates" / "report.css").read_text(encoding="utf-8")
    light, _, dark = css.partition("@media (prefers-color-scheme: dark)")
    pairs = re.findall(r"--(\w+): (#[0-9a-f]{6})", light if scheme == "light" else dark.partition("\n}")[0])
    colours = {name: luminance(value) for name, value in pairs}
    for text in ("ink", "muted", "accent"):
        for ground in ("page", "raised"):
            bright, dim = sorted((colours[text], colours[ground]), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)  # WCAG 2.2, level AA


def luminance(colour):
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
