"""The gate's page: every section that is there, reasons for those that are not, names escaped."""

import json
import re

import pytest

from common.evaluation.gate_run import JOINT, PRETRAINED, headline
from common.report.gate import render_gate


def calibrated(gate, split, **more):
    reliability = [{"confidence": 0.65, "accuracy": 0.5, "count": 4}, {"confidence": 0.95, "accuracy": 1.0, "count": 8}]
    figures = {"accuracy": 0.8, "macro_f1": 0.7, "expected_calibration_error": 0.083, "entropy": 0.4, "utterances": 12}
    labels = {"labels": ["cluster 0", "cluster 1"], "confusion": [[5, 1], [2, 4]], "reliability": reliability}
    return {"gate": gate, "split": split, **figures, **labels, **more}


@pytest.fixture
def found():
    """What `examine_gate` returns, by hand."""
    routed = {"same_expert": 0.75, "speakers": 3, "load": [0.6, 0.4], "entropy": 0.4, "collapsed": False}
    rates = {"wer": 0.2, "interval": [0.1, 0.3], "cer": 0.1}
    way = {"layer": 2, "pooling": "mean", "reduce": "pca", "own": False}
    figures = {"clusters": 2, "noise_share": 0.1, "silhouette": None, "largest": 0.6, "etiology": 0.5, "speaker": 0.25}
    return {
        "run": "<b>demo</b>",
        "experts": 2,
        "top_k": 2,
        "mixture": "blend",
        "route_by": "utterance",
        "labels": {"clustered": 40, "agreement": 0.9},
        "calibration": [
            calibrated(PRETRAINED, "held-out tenth"),
            calibrated(PRETRAINED, "test"),
            calibrated(JOINT, "dev", accuracy=0.1),
            calibrated(JOINT, "test", accuracy=0.5),
        ],
        "consistency": [{"gate": JOINT, "split": "test", "route_by": by} | routed for by in ("utterance", "speaker")],
        "sensitivity": [
            {"top_k": k, "route_by": "utterance", "trained": k == 2, "changed": 0.3} | rates for k in (0, 1, 2)
        ],
        "choices": [
            way | {"algorithm": "hdbscan", "own": True, "stability": 0.8} | figures,
            way | {"algorithm": "etiology", "stability": None} | figures,
            way | {"algorithm": "spectral", "problem": "9 experts for 3 utterances: lower --num-experts"},
        ],
        "left_out": [],
    }


def test_all_sections_stand_on_one_page_without_network(found):
    page = render_gate(found)
    assert "&lt;b&gt;demo" in page and "<b>demo" not in page
    assert re.findall(r"<h2 id=\"(\w+)-title\"", page) == ["short", "calibration", "speakers", "experts", "choices"]
    assert not re.search(r"<script|<link|<img|https?://(?!www\.w3\.org)", page)
    assert page.count('role="img"') == 4  # three reliability diagrams (dev's is left out) and one confusion
    for text in ("block 2 (own)", "none", "2 (as trained)", "9 experts for 3 utterances", "90.0%", "50.0%"):
        assert text in page
    assert render_gate(json.loads(json.dumps(found))) == page


def test_what_is_left_out_is_said_and_leaves_no_section(found):
    reason = "Calibration: this run clustered nothing, so no utterance has a right expert."
    found |= {"labels": None, "calibration": None, "sensitivity": None, "choices": None, "left_out": [reason]}
    page = render_gate(found)
    assert reason in page
    assert re.findall(r"<h2 id=\"(\w+)-title\"", page) == ["short", "speakers"]


def test_the_headline_is_the_jointly_trained_gates_on_test(found):
    assert headline(found) == [
        ("accuracy", 0.5),
        ("expected calibration error", 0.083),
        ("a speaker's utterances at one expert", 0.75),
    ]
