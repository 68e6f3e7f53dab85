"""The report: one file without network, legible to a screen reader, honest about chance, and safe with hostile text."""

import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib
import pytest
from rapidfuzz.distance import Levenshtein

from common.errors import DataError
from common.json_files import read_rows
from common.report.error_rates import (
    align_words,
    axis_end,
    difference_interval,
    etiology_section,
    scored_rows,
    worst_section,
)
from common.report.page import axis_of_time, clock, interval, lanes, number, percent, points
from common.report.report import render_report
from tests.common.fake_run import rate, write_fake_run, write_object, write_rows

VOID = {"meta", "br", "img", "link", "input", "line", "circle", "path", "use", "rect", "hr"}


class Page(HTMLParser):
    """Elements with attributes and text, and whether all of them are closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text, self.html = [], [], [], html
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return write_fake_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def bare(view):
    """The run without the stages before the joint training: quick to render."""
    return replace(view, cluster=None, gate=None, experts=[])


@pytest.fixture(scope="module")
def page(view):
    return Page(render_report(view))


def test_page_needs_no_network_and_runs_no_script(page):
    assert "http:" not in page.html and "https:" not in page.html and "@import" not in page.html
    assert not {"script", "img", "link", "iframe", "image", "object"} & {tag for tag, _ in page.elements}
    assert all(target == "#" for target in re.findall(r"url\((.)", page.html))
    assert all(attrs["href"].startswith("#") for attrs in page.all("a") + page.all("use"))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_page_has_every_section_of_the_design(page):
    ids = {attrs.get("id") for _, attrs in page.elements}
    assert {"result", "etiologies", "clusters", "gate", "experts", "joint", "worst", "timeline", "setup"} <= ids
    assert "Left out" not in page.words


def test_page_is_navigable_without_sight(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"][1:] for attrs in page.all("a") + page.all("use")]
    targets += [attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert set(targets) <= set(ids)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all("scope" in th for th in page.all("th"))
    scrolls = [attrs for attrs in page.all("div") if attrs.get("class") == "scroll"]
    assert scrolls and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolls)


def test_page_is_the_same_for_the_same_view_whatever_matplotlib_was_told(view, page):
    with matplotlib.rc_context({"text.color": "red", "font.size": 30, "svg.hashsalt": "other", "axes.grid": False}):
        assert render_report(view) == page.html


def test_hostile_text_stays_text(tmp_path):
    evil = '</svg></style><script>alert(1)</script><img src=x onerror="alert(2)">--> {{ 7 * 7 }} $x_1$'
    view = write_fake_run(tmp_path, etiologies=(evil, "_underscore", "日本語 🙂"), utterances=30, points=30)
    rows = read_rows(view.asr / "predictions.jsonl")
    for row in rows:
        row |= {"hypothesis": evil, "speaker": evil + row["speaker"], "id": evil + row["id"], "severity": evil}
    write_rows(view.asr / "predictions.jsonl", rows)
    texts = dict.fromkeys(("name", "config_yaml", "version", "audio_root"), evil)
    page = Page(render_report(replace(view, subject={"model": evil}, **texts)))
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not any("onerror" in attrs for _, attrs in page.elements)
    assert "alert(1)" in page.words and "49" not in page.all("svg")[0].get("aria-label", "")


@pytest.mark.parametrize(
    ("absent", "section", "reason"),
    [
        ({"cluster": None}, "clusters", "no cluster stage"),
        ({"gate": None}, "gate", "trained none before the joint training"),
        ({"experts": []}, "experts", "trained none before the joint training"),
        ({"timeline": []}, "timeline", "no stage has been recorded"),
        ({"summary": {}}, "result", "no error rate yet"),
        ({"summary": {"wer_after": 0.2, "by_etiology": {}}}, "etiologies", "names no etiology"),
    ],
)
def test_absent_stage_leaves_its_section_out_and_says_why(bare, absent, section, reason):
    page = Page(render_report(replace(bare, **absent)))
    assert section not in {attrs.get("id") for _, attrs in page.elements}
    assert f"#{section}" not in {attrs["href"] for attrs in page.all("a")}
    assert "Left out of this report" in page.words and reason in page.words


def test_dense_run_without_experts_or_names_is_reported(view, tmp_path):
    row = {"id": "a", "split": "test", "speaker": "", "etiology": "", "severity": "", "duration": 1.0, "loop": False,
           "reference": "x y", "hypothesis_before": "", "hypothesis": "x", "words": 2, "errors_before": 2, "errors": 1,
           "experts": [], "weights": []}  # fmt: skip
    asr = write_fake_run(tmp_path).asr
    write_rows(asr / "predictions.jsonl", [row | {"id": i} for i in ("a", "b")])
    write_object(asr / "report.json", {"mixture": "none", "experts": 0, "top_k": 1, "steps": 3})
    summary = {
        "wer_before": 1.0,
        "wer_after": 0.5,
        "speakers": 2,
        "utterances": 2,
        "by_etiology": {"unknown": {"wer_before": 1.0, "wer_after": 0.5}},
    }
    dense = replace(view, cluster=None, gate=None, experts=[], asr=asr, summary=summary)
    words = Page(render_report(dense)).words
    assert "names no speakers" in words and "names no etiology" in words and "50.0%" in words


def test_numbers_that_are_not_there_are_dashes(bare, tmp_path):
    cluster = write_fake_run(tmp_path).cluster
    write_object(cluster / "report.json", {"algorithm": "spectral", "silhouette": None, "noise_share": float("nan")})
    (cluster / "projection.jsonl").unlink()
    section = Page(render_report(replace(bare, cluster=cluster))).words.split("Clusters")[3]
    assert "Silhouette –" in section and "similar –" in section and "No map" in section


def test_poor_clusters_are_a_sentence_with_what_was_asked_for(bare, tmp_path):
    report = {"algorithm": "hdbscan", "clusters": 2, "clusters_wanted": 3, "warning": "Poor clustering: 2 of 3 groups."}
    cluster = write_fake_run(tmp_path).cluster
    write_object(cluster / "report.json", report)
    words = Page(render_report(replace(bare, cluster=cluster))).words
    assert "Poor clustering: 2 of 3 groups." in words and "found / asked for 2 / 3" in words


def test_broken_file_is_named_with_its_line(bare, tmp_path):
    cluster = write_fake_run(tmp_path).cluster
    (cluster / "projection.jsonl").write_text('{"id": "a", "x": 0, "y": 0, "cluster": 0}\n{"id": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"projection\.jsonl:2: not JSON"):
        render_report(replace(bare, cluster=cluster))


def _words_of(tmp_path, **options):
    view = write_fake_run(tmp_path, experts=2, points=10, **options)
    return Page(render_report(replace(view, cluster=None, gate=None, experts=[]))).words


@pytest.mark.parametrize(("gain", "verdict"), [(0.6, "WER fell ("), (-0.6, "WER rose ("), (0.0, "not distinguishable")])
def test_verdict_follows_the_interval_of_the_difference(tmp_path, gain, verdict):
    words = _words_of(tmp_path, utterances=240, speakers=24, gain=gain)
    assert verdict in words and "Only 24" not in words


def test_few_speakers_are_said(tmp_path):
    assert "Only 3 speakers were held out" in _words_of(tmp_path, speakers=3)


def test_speakers_of_train_are_not_called_held_out(tmp_path):
    view = write_fake_run(tmp_path, experts=2, points=10, speakers=3)
    view = replace(view, summary=view.summary | {"speakers_in_train": 3}, cluster=None, gate=None, experts=[])
    words = Page(render_report(view)).words
    assert "Word error rate, speakers also in train" in words and "Only 3 speakers were tested" in words
    assert "held-out speakers" not in words and "speakers were held out" not in words


def test_one_speaker_gives_no_interval_and_no_verdict(tmp_path):
    words = _words_of(tmp_path, speakers=1)
    assert "cannot be said: that takes two or more speakers" in words and "One speaker was held out" in words
    assert "WER fell" not in words and "one speaker" in words


def test_etiology_whose_rate_rose_is_named(bare):
    groups = {name: dict(row) for name, row in bare.summary["by_etiology"].items()}
    groups["croak"]["wer_before"] = groups["croak"]["wer_after"] / 2
    words = Page(render_report(replace(bare, summary=bare.summary | {"by_etiology": groups}))).words
    assert re.search(r"WER rose for [^.]*\bcroak\b", words)


def test_gain_that_clipping_hides_is_qualified(bare):
    summary = bare.summary | {"wer_before": 0.3, "wer_after": 0.2}
    loops = summary | {"wer_before_unclipped": 0.31, "wer_after_unclipped": 0.5}
    assert "Without clipping, WER rose from 31.0% to 50.0%" in Page(render_report(replace(bare, summary=loops))).words
    clean = summary | {"wer_before_unclipped": 0.31, "wer_after_unclipped": 0.21}
    assert "Without clipping, WER rose" not in Page(render_report(replace(bare, summary=clean))).words


def test_collapse_is_said_beside_the_result(bare, tmp_path):
    asr = write_fake_run(tmp_path).asr
    write_object(asr / "report.json", {"experts": 4, "load": [1.0, 0, 0, 0], "collapsed": True})
    assert Page(render_report(replace(bare, asr=asr))).words.count("Experts collapsed") == 2


def test_worst_utterances_are_at_most_25_most_errors_first(view, page):
    section = page.html.split('id="worst"')[1].split('id="timeline"')[0]
    shown = [int(n.replace("\u202f", "")) for n in re.findall(r"<b>([\d\u202f]+)</b> error", section)]
    errors = sorted((row["errors"] for row in read_rows(view.asr / "predictions.jsonl")), reverse=True)
    assert shown == errors[:25]


def test_worst_utterances_are_aligned_with_the_reference_that_counts(view):
    row = read_rows(view.asr / "predictions.jsonl")[0] | {
        "reference": "uh a lamp",
        "hypothesis": "a river",
        "errors": 1,
    }
    (line,) = worst_section([row | {"reference_alt": "a lamp", "reference_used": 1}])["lines"]
    assert line["steps"] == [("ok", "a", "a"), ("sub", "lamp", "river")]


def test_rows_of_other_splits_are_not_scored(view, tmp_path):
    rows = read_rows(view.asr / "predictions.jsonl")
    write_rows(tmp_path / "predictions.jsonl", [*rows, *(row | {"split": "dev"} for row in rows)])
    assert scored_rows(tmp_path) == rows


def test_breakdowns_add_up_to_the_whole(view):
    rows = read_rows(view.asr / "predictions.jsonl")
    for part in etiology_section(view.summary, rows)["slices"]:
        assert sum(row["utterances"] for row in part["rows"]) == len(rows)
    interval = difference_interval(rows)
    assert interval[0] <= rate(rows, "errors") - rate(rows, "errors_before") <= interval[1]
    assert difference_interval(rows[::-1]) == interval


def test_map_of_a_sample_says_so_and_the_table_counts_all_utterances(tmp_path):
    view = write_fake_run(tmp_path, experts=3, points=5200)
    page = Page(render_report(view))
    assert page.words.count("a random sample of 5 000 of 5 200.") == 2
    assert len(page.all("use")) < 2 * 5_000 + 500 and len(page.html) < 1_500_000
    cluster_of = {row["id"]: row["cluster"] for row in read_rows(view.cluster / "assignments.jsonl")}
    counts = Counter((cluster_of[name], etiology) for name, etiology in view.etiologies.items())
    table = page.html.split("Utterances by cluster and etiology; the tint")[1].split("</table>")[0]
    names = re.findall(r"<th[^>]*>([^<]+)</th>", table.split("</thead>")[0])[1:-1]
    for cluster, row in enumerate(re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)):
        *cells, total = (int(re.sub(r"\D", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row))
        assert cells == [counts[cluster, name] for name in names] and total == sum(cells)
    assert sum(counts.values()) == 5200


def test_expert_has_the_time_of_its_work(view, page):
    section = page.html.split('id="experts"')[1].split("</table>")[0]
    assert re.findall(r"<td>([^<]+ s)</td>", section) == [f"{20 + i} s" for i in range(len(view.experts))]


@pytest.mark.parametrize("seed", range(20))
def test_alignment_is_shortest_and_holds_both_texts(seed):
    rng = random.Random(seed)
    said, heard = ([rng.choice(("ab", "cd", "ef", "gh")) for _ in range(rng.randrange(9))] for _ in range(2))
    steps = align_words(" ".join(said), " ".join(heard))
    assert [w for kind, words, _ in steps if kind != "ins" for w in words.split()] == said
    assert [w for kind, _, words in steps if kind != "del" for w in words.split()] == heard
    edits = sum(max(len(a.split()), len(b.split())) for kind, a, b in steps if kind != "ok")
    assert edits == Levenshtein.distance(said, heard)


def test_alignment_forgives_case_and_punctuation_and_cuts_loops():
    assert align_words("Hello, world.", "hello WORLD") == [("ok", "Hello, world.", "hello WORLD")]
    kind, _, words = align_words("a", "a" + " b" * 100)[-1]
    assert kind == "ins" and words.endswith("… 84 more")


def test_long_pauses_are_cut_and_work_keeps_its_length():
    place, span, cuts = axis_of_time([(0, 10), (100_000, 100_030)])
    assert [cut["seconds"] for cut in cuts] == [99_990]
    assert place(10) - place(0) == 10 and place(100_030) - place(100_000) == 30 and span < 42
    assert place(10) / span < cuts[0]["left"] < place(100_000) / span


def test_bars_on_one_lane_do_not_overlap_and_stay_on_the_axis():
    rng = random.Random(0)
    events = [
        {"stage": "experts", "shard": i, "started": rng.uniform(0, 50), "seconds": rng.uniform(1, 20), "host": "h"}
        for i in range(40)
    ]
    events.sort(key=lambda event: event["started"])
    place, span, _ = axis_of_time([(e["started"], e["started"] + e["seconds"]) for e in events])
    bars = lanes(events, place, span)
    assert all(bar["left"] >= 0 and bar["left"] + bar["width"] <= 1 + 1e-9 for bar in bars)
    for a in bars:
        for b in bars:
            if a is not b and a["lane"] == b["lane"]:
                assert a["left"] + a["width"] <= b["left"] + 1e-9 or b["left"] + b["width"] <= a["left"] + 1e-9


def test_run_that_reused_everything_has_a_timeline(bare):
    reused = [event | {"status": "skipped"} for event in bare.timeline]
    words = Page(render_report(replace(bare, timeline=reused))).words
    assert "Nothing had to be done" in words and "4 reused" in words


def test_numbers_read_as_a_paper_prints_them():
    assert (percent(0.2436), percent(None), percent(float("nan"))) == ("24.4%", "–", "–")
    assert (points(-0.151), points(0.02), points(None)) == ("−15.1", "+2.0", "–")
    assert (number(1234567), number(0.5), number(-0.25), number(None)) == ("1\u202f234\u202f567", "0.50", "−0.25", "–")
    assert (interval([0.1, 0.2]), interval(None)) == ("10.0–20.0%", "–")
    assert [clock(s) for s in (0.42, 59.6, 552, 7260, 90_000, None)] == [
        "0.4 s", "1 min 0 s", "9 min 12 s", "2 h 1 min", "1 d 1 h", "–",
    ]  # fmt: skip
    assert (axis_end([0.55]), axis_end([0.6]), axis_end([]), axis_end([1.3])) == (
        pytest.approx(0.6),
        pytest.approx(0.6),
        0.2,
        2,
    )


def test_importing_the_report_imports_neither_torch_nor_matplotlib():
    code = "import sys, common.report.report; print({'torch', 'matplotlib', 'transformers'} & set(sys.modules))"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "set()"
