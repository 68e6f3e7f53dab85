"""Figures: the same bytes every time, no global state, legible without colour vision and on either background."""

import itertools
import random
import re
import shutil
import subprocess
import sys
from functools import partial

import matplotlib
import numpy as np
import pytest

from common.errors import DataError
from common.json_files import read_rows
from common.report import plots
from common.report.page import inline_svg
from tests.common.fake_run import metrics, write_fake_run, write_rows

# Viénot, Brettel and Mollon 1999, in linear RGB, as tabulated by Machado et al. 2009 (severity 1).
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return write_fake_run(tmp_path_factory.mktemp("run"))


def _draw_all(view, out):
    files = plots.plot_clusters(view.cluster, out) + plots.plot_gating(view.gate, out)
    return files + plots.plot_experts(view.experts, out) + plots.plot_asr(view.asr, out)


def test_every_plot_is_a_png_and_an_svg_with_the_same_bytes_twice(view, tmp_path):
    first, second = _draw_all(view, tmp_path / "a"), _draw_all(view, tmp_path / "b")
    assert {path.stem for path in first} == {
        "clusters_by_cluster", "clusters_by_etiology", "gate_confusion", "gate_reliability", "gate_training",
        "experts_training", "asr_training", "asr_expert_load", "asr_routing", "asr_wer_by_etiology",
    }  # fmt: skip
    assert len(first) == 20
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes() and a.stat().st_size > 1000
        assert a.read_bytes().startswith(b"\x89PNG" if a.suffix == ".png" else b"<?xml")


def test_plots_leave_matplotlib_as_it_was(view, tmp_path):
    before = dict(matplotlib.rcParams)
    plots.plot_gating(view.gate, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_plots_do_not_touch_pyplot(view, tmp_path):
    code = (
        "import sys; from pathlib import Path; from common.report.plots import plot_gating;"
        f"plot_gating(Path({str(view.gate)!r}), Path({str(tmp_path)!r}));"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "False"


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(DataError, match=r"report\.json.*run the stage"):
        plots.plot_gating(tmp_path, tmp_path)


def test_dense_run_and_run_without_experts_have_what_plots_they_can(view, tmp_path):
    asr = shutil.copytree(view.asr, tmp_path / "asr")
    (asr / "report.json").write_text('{"experts": 0}', encoding="utf-8")
    rows = [row | {"experts": [], "weights": []} for row in read_rows(asr / "predictions.jsonl")]
    write_rows(asr / "predictions.jsonl", rows)
    assert {path.stem for path in plots.plot_asr(asr, tmp_path / "out")} == {"asr_training", "asr_wer_by_etiology"}
    assert plots.plot_experts([], tmp_path) == []


def test_inline_figure_is_theme_neutral_and_unique_on_a_page(view):
    draw = partial(plots.draw_map, read_rows(view.cluster / "projection.jsonl"), "cluster")
    a, b = inline_svg(draw, "a", "One & <two>"), inline_svg(draw, "b", "x")
    assert 'aria-label="One &amp; &lt;two&gt;"' in a
    assert not any(colour in a for colour in (plots.INK, plots.PAPER, *(light for light, _ in plots.PALETTE)))
    assert "currentColor" in a and "var(--c0)" in a and "<style" not in a and "<!--" not in a and "xmlns" not in a
    ids = re.findall(r' id="([^"]*)"', a)
    assert len(ids) == len(set(ids)) and not set(ids) & set(re.findall(r' id="([^"]*)"', b))
    assert set(re.findall(r'href="#([^"]*)"', a)) | set(re.findall(r"url\(#([^)]*)\)", a)) == set(ids)
    assert "<text" in a


@pytest.mark.parametrize("name", ["_hidden", "$x_1^$", "日本語 🙂", "a & <b>", "a very long name " * 9, ""])
def test_any_name_can_be_a_category(name):
    rows = [{"id": i, "x": i, "y": -i, "cluster": 0, "etiology": name, "noise": False} for i in range(4)]
    svg = inline_svg(partial(plots.draw_map, rows, "etiology"), "m", "map")
    name = name[: plots.LABEL - 2] if len(name) > plots.LABEL else name
    assert (name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") or "unknown") in svg


@pytest.mark.parametrize("experts", [1, 5, 20])
def test_any_number_of_experts_can_be_drawn(experts, tmp_path):
    rng = random.Random(0)
    curves = [(f"expert {i}", metrics(rng, wer=False)) for i in range(experts)]
    shares = {"a": [1 / experts] * experts, "b": [1.0] + [0.0] * (experts - 1)}
    confusion = [[int(i == j) for j in range(experts)] for i in range(experts)]
    for draw in (
        partial(plots.draw_experts, curves),
        partial(plots.draw_load, shares["a"]),
        partial(plots.draw_routing, shares),
        partial(plots.draw_confusion, confusion, range(experts)),
    ):
        assert plots.render_svg(draw).endswith("</svg>\n")


def test_curves_with_gaps_are_drawn():
    rows = [{"step": i, "split": "train", "loss": loss} for i, loss in enumerate([1.0, float("nan"), None, 0.5])]
    assert "<svg" in plots.render_svg(partial(plots.draw_training, rows))
    assert "<svg" in plots.render_svg(partial(plots.draw_training, []))


def test_long_curves_are_thinned_to_their_means():
    thin = plots._thin([(x, 2.0 * x) for x in range(10_001)])
    assert len(thin) <= plots.CURVE_POINTS and all(y == pytest.approx(2 * x) for x, y in thin)


def test_rare_etiologies_share_one_entry_and_clusters_never_do():
    names = [f"e{i}" for i in range(12) for _ in range(20 - i)]
    categories = plots._categories(names, by_number=False)
    assert len(categories) == plots.LEGEND_ENTRIES and set().union(*categories.values()) == set(names)
    assert next(iter(categories)) == "e0" and list(categories)[-1] == "5 others"
    assert list(plots._categories(["10", "2", "1"], by_number=True)) == ["1", "2", "10"]


def test_routing_shares_sum_to_one():
    rows = [{"etiology": e, "experts": [2, 0], "weights": [0.75, 0.25]} for e in ("a", "a", "")] + [{"etiology": "b"}]
    assert plots.routing(rows) == {"a": [0.25, 0.0, 0.75], "unknown": [0.25, 0.0, 0.75]}
    assert plots.routing([{"etiology": "b", "experts": [], "weights": []}]) == {}


def _linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _oklab(linear):
    lms = [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
    lab = [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
    return np.array(lab) @ np.cbrt(np.array(lms) @ np.clip(linear, 0, 1))


def _contrast(a, b):
    low, high = sorted(float(_linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "page"), [(0, "#fdfcf9"), (1, "#15171a")])
def test_palette_stands_out_and_is_told_apart_without_full_colour_vision(theme, page):
    colours = [pair[theme] for pair in plots.PALETTE]
    assert all(_contrast(colour, page) >= 3 for colour in colours)
    for matrix in VISION.values():
        seen = [_oklab(np.array(matrix) @ _linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.05


def test_text_contrast_is_at_least_4_5_in_both_themes():
    from importlib.resources import files

    css = (files("common.report.templates") / "report.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in css.split("@media (prefers-color")[:2])
    for theme in (light, dark):
        assert all(_contrast(theme[name], theme["page"]) >= 4.5 for name in ("ink", "muted", "accent", "warn"))
