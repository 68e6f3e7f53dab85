"""Runs side by side: the same numbers as by hand, paired draws, several seeds, and sets that differ refused."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from common.data.corpus import Utterance
from common.errors import DataError, UsageError
from common.evaluation.breakdown import breakdown, loops, score_of, scored_row, speakers_of, write_table
from common.evaluation.compare import compare
from common.evaluation.results import Result, before_training, read_result
from common.evaluation.wer import bootstrap_interval, paired_bootstrap, score
from common.report.compare import table_rows, write_comparison
from tests.common.report.test_report import Page

WORDS = ["river", "lamp", "seven", "green", "open", "stone", "under", "paper", "voice", "moon"]


def utterance(number, text="river lamp seven green", **changes):
    values = {
        "id": f"u{number:02d}",
        "audio_filepath": f"audio/u{number:02d}.wav",
        "duration": 3.0,
        "text": text,
        "split": "test",
        "speaker": f"s{number % 4}",
        "etiology": ("low", "high")[number % 2],
        "severity": "mild",
    }
    return Utterance(**(values | changes))


def result(name, heard, facts=None, **changes):
    """A result in which utterance i of "river lamp seven green" was heard as `heard[i]`."""
    rows = []
    for number, text in enumerate(heard):
        u = utterance(number, **changes)
        rows.append(scored_row(u, text, score(u.id, text, [u.text])) | {"hypothesis_before": "river"})
    return Result(name, rows, {row["id"]: score_of(row) for row in rows}, {"language": "en", **(facts or {})})


def wrong(count, of=12, seed=0):
    """Texts of `of` utterances with `count` words wrong in all, at random places."""
    places = np.random.default_rng(seed).permutation(of * 4)[:count]
    said = [["river", "lamp", "seven", "green"] for _ in range(of)]
    for place in places:
        said[place // 4][place % 4] = "moon"
    return [" ".join(words) for words in said]


def test_rates_are_those_counted_by_hand():
    heard = ["river lamp seven green", "river lamp", "river lamp seven green " + "moon " * 9, "green"]
    system = compare({"a": [result("a", heard)]})["systems"][0]
    # 0 + 2 + 9 (counted as 4) + 3 errors in 4 × 4 words
    assert system["wer"] == pytest.approx(9 / 16) and system["wer_unclipped"] == pytest.approx(14 / 16)
    assert system["loops"] == 1 and system["insertions"] == 9
    assert system["by_etiology"]["low"]["wer"] == pytest.approx(4 / 8)
    assert system["by_etiology"]["high"]["wer"] == pytest.approx(5 / 8)
    assert (system["by_etiology"]["high"]["speakers"], system["by_etiology"]["high"]["utterances"]) == (2, 2)


def test_a_run_against_itself_differs_by_nothing():
    run = result("a", wrong(9))
    difference = compare({"a": [run], "again": [run]})["systems"][1]["difference"]
    for metric in ("wer", "cer"):
        assert difference[metric] == {"delta": 0, "low": 0, "high": 0, "p": 1, "better": 0.5}


def test_single_runs_have_the_intervals_of_the_plain_functions():
    a, b = result("a", wrong(20)), result("b", wrong(9, seed=1))
    speakers = speakers_of(a.rows)
    first, second = compare({"a": [a], "b": [b]}, seed=3)["systems"]
    plain = [list(run.scores.values()) for run in (a, b)]
    for metric in ("wer", "cer"):
        assert first[f"{metric}_interval"] == pytest.approx(
            bootstrap_interval(plain[0], speakers, metric=metric, seed=3)
        )
        expected = paired_bootstrap(*plain, speakers, metric=metric, seed=3)
        got = second["difference"][metric]
        assert {key: got[key] for key in expected} == pytest.approx(expected)
    assert second["difference"]["wer"]["better"] > 0.9 and first["difference"] is None


def test_a_gain_on_every_speaker_is_told_apart_and_has_the_right_sign():
    comparison = compare({"base": [result("b", wrong(24))], "better": [result("a", wrong(4))]}, reference="base")
    delta = comparison["systems"][1]["difference"]["wer"]
    assert delta["delta"] == pytest.approx(-20 / 48) and delta["high"] < 0 and delta["better"] == 1


def test_a_group_counts_by_its_mean_over_seeds_and_is_less_certain_than_its_runs_are_alike():
    alike = [result(f"a{i}", wrong(12, seed=7)) for i in range(3)]
    apart = [result(f"b{i}", wrong(count, seed=7)) for i, count in enumerate((2, 12, 22))]
    first, other = compare({"alike": alike, "apart": apart}, resamples=4000)["systems"]
    assert first["wer"] == pytest.approx(other["wer"]) == pytest.approx(12 / 48)
    assert first["wer_spread"] == 0 and other["wer_spread"] == pytest.approx(10 / 48)
    single = compare({"single": alike[:1]}, resamples=4000)["systems"][0]
    assert first["wer_interval"] == single["wer_interval"]
    width = [high - low for low, high in (first["wer_interval"], other["wer_interval"])]
    assert width[1] > 1.5 * width[0]
    assert [run["name"] for run in other["runs"]] == ["b0", "b1", "b2"]


def test_seeds_spread_the_draws_as_much_as_new_seeds_would():
    """Speakers err alike: what is left is the variance of a mean of three seeds, which 3 draws of 3 understate."""
    rates = (4, 12, 20)
    runs = [result(f"r{n}", ["river lamp seven green"] * (24 - n) + ["moon"] * n) for n in rates]
    low, high = compare({"g": runs}, resamples=20_000)["systems"][0]["wer_interval"]
    standard_error = np.std([n / 24 for n in rates], ddof=1) / np.sqrt(3)
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.25)


def test_no_interval_of_a_rate_reaches_below_zero():
    runs = [result(f"r{n}", wrong(n)) for n in (0, 0, 5)]
    low, high = compare({"g": runs})["systems"][0]["wer_interval"]
    assert low == 0 < high


def test_other_utterances_are_refused_and_counted_unless_the_shared_ones_are_wanted():
    long, short = result("long", wrong(9)), result("short", wrong(9)[:10])
    with pytest.raises(DataError, match=r"short lacks 2 of 12 and has 0 others .*'u10'.*--common compares the 10"):
        compare({"long": [long], "short": [short]})
    comparison = compare({"long": [long], "short": [short]}, shared_only=True)
    assert (comparison["utterances"], comparison["left_out"]) == (10, 2)
    assert comparison["systems"][1]["difference"]["wer"]["delta"] == 0


def test_the_same_id_with_another_reference_is_another_utterance():
    with pytest.raises(DataError, match="share no utterance"):
        compare({"a": [result("a", wrong(9))], "b": [result("b", wrong(9), text="open stone under paper")]},
                shared_only=True)  # fmt: skip


def test_an_unknown_reference_is_refused():
    with pytest.raises(UsageError, match="--reference c: not among a"):
        compare({"a": [result("a", wrong(1))]}, reference="c")


def test_different_decoding_and_collapse_are_noted():
    plain = {"decoding": {"num_beams": 1, "batch_size": 4, "seed": 1}}
    same = {"decoding": {"num_beams": 1, "batch_size": 8, "seed": 2}}
    beams = {"decoding": {"num_beams": 5, "batch_size": 4, "seed": 1}, "collapsed": True}
    first, second, third = (result(name, wrong(5), facts) for name, facts in (("a", plain), ("b", same), ("c", beams)))
    assert compare({"a": [first], "b": [second]})["notes"] == []
    notes = compare({"a": [first], "c": [third]})["notes"]
    assert "not all decoded in the same way" in notes[0] and "collapsed in c" in notes[1]


def test_training_facts_are_means_over_runs_and_loads_are_sorted_first():
    facts = ({"seconds": 10.0, "trained_parameters": 100, "load": [0.2, 0.8]},
             {"seconds": 20.0, "trained_parameters": 100, "load": [0.6, 0.4]})  # fmt: skip
    averaged = compare({"g": [result(str(i), wrong(3), own) for i, own in enumerate(facts)]})["systems"][0]["facts"]
    assert averaged["seconds"] == 15 and averaged["trained_parameters"] == 100
    assert averaged["load"] == pytest.approx([0.7, 0.3])


def test_the_base_is_what_was_heard_before_training():
    base = before_training(result("a", wrong(2)))
    assert compare({"base": [base]})["systems"][0]["wer"] == pytest.approx(3 / 4)


def test_the_page_needs_no_network_and_keeps_hostile_names_as_text(tmp_path):
    evil = "<script>alert(1)</script>"
    made = compare({evil: [result(evil, wrong(9))], "b": [result("b", wrong(3)), result("c", wrong(4))]})
    write_comparison(made, tmp_path / "out")
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert "http:" not in page.html and "https:" not in page.html
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert evil in page.words and len(page.all("caption")) == len(page.all("table")) > 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == made
    with pytest.raises(UsageError, match="already"):
        write_comparison(made, tmp_path / "out")


def test_of_one_speaker_no_difference_is_told_from_chance(tmp_path):
    systems = {"a": [result("a", wrong(9), speaker="s")], "b": [result("b", wrong(3), speaker="s")]}
    made = compare(systems)
    system = made["systems"][1]
    assert system["difference"]["wer"] == {"delta": -0.125, "low": None, "high": None, "p": None, "better": None}
    assert system["wer_interval"] is None and system["by_etiology"]["low"]["wer_interval"] is None
    header, rows = table_rows(made)
    assert rows[1][header.index("95% interval")] == "one speaker" and rows[1][header.index("p")] == ""
    write_comparison(made, tmp_path / "out")
    words = Page((tmp_path / "out" / "compare.html").read_text()).words
    assert "cannot be said: that takes two or more speakers" in words
    assert "WER is lower" not in words


def test_the_terminal_table_has_a_row_for_each_system():
    header, rows = table_rows(compare({"a": [result("a", wrong(9))], "b": [result("b", wrong(3))]}))
    assert [row[0] for row in rows] == ["a", "b"] and all(len(row) == len(header) for row in rows)
    assert rows[1][header.index("WER − a")] == "−12.5"


def test_a_table_of_utterances_is_one_for_a_spreadsheet(tmp_path):
    u = utterance(0, text='said "so", then\nleft', text_alt="so; then", speaker="")
    rows = [scored_row(u, "so, then", score(u.id, "so, then", [u.text, u.text_alt]), ([3, 0], [0.75, 0.25])),
            scored_row(utterance(1), "", score("u01", "", ["river"]))]  # fmt: skip
    write_table(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["hypothesis"] for row in cells] == ["so, then", ""]
    assert (cells[0]["reference"], cells[0]["experts"], cells[0]["loop"]) == (rows[0]["reference"], "3 0", "0")


def test_rows_of_older_runs_are_counted_from_their_texts():
    row = result("a", ["river moon"]).rows[0]
    old = {key: row[key] for key in ("id", "speaker", "reference", "hypothesis", "words", "errors", "loop")}
    assert score_of(old) == score_of(row)


def test_a_breakdown_covers_each_utterance_once_in_every_way_of_grouping():
    durations = (1.0, 3.0, 7.0, 40.0)
    us = [utterance(i, duration=durations[i % 4], severity="" if i < 3 else "severe") for i in range(12)]
    texts = wrong(13)
    scores = [score(u.id, text, [u.text]) for u, text in zip(us, texts, strict=True)]
    rows = [scored_row(u, text, score) for u, text, score in zip(us, texts, scores, strict=True)]
    report = breakdown(rows, scores)
    for name in ("by_etiology", "by_severity", "by_duration", "by_speaker"):
        groups = report[name].values()
        assert sum(group["utterances"] for group in groups) == 12
        weighted = sum(group["wer"] * group["words"] for group in groups) / report["overall"]["words"]
        assert weighted == pytest.approx(report["overall"]["wer"]) == pytest.approx(13 / 48)
    assert set(report["by_severity"]) == {"unknown", "severe"}
    assert list(report["by_duration"]) == ["00-02 s", "02-05 s", "05-10 s", "30 s and more"]
    assert sum(cell["utterances"] for cell in report["cells"]) == 12
    cell = next(
        c for c in report["cells"] if (c["etiology"], c["severity"], c["duration"]) == ("low", "severe", "00-02 s")
    )
    assert (cell["utterances"], cell["speakers"]) == (2, 1)


def test_loops_are_listed_with_most_insertions_first():
    rows = result("a", ["river", "lamp " * 8, "green " * 20]).rows
    assert [(row["id"], row["insertions"]) for row in loops(rows)] == [("u02", 16), ("u01", 4)]


def test_the_base_of_a_translating_run_is_scored_in_english(micro_run, tmp_path):
    """Whisper's normaliser for English alone spells out `it's`."""
    shutil.copytree(micro_run[0] / "micro", tmp_path / "store" / "micro")
    (tmp_path / "store" / "artifacts").symlink_to(micro_run[0] / "artifacts")
    record = tmp_path / "store" / "micro" / "run.json"
    tree = json.loads(record.read_text())
    tree["config"]["model"] |= {"language": "de", "task": "translate"}
    record.write_text(json.dumps(tree))
    read = read_result(str(record.parent), store=None, cache=tmp_path)
    assert read.facts["language"] == "en"
    told = [row | {"reference": "it's", "hypothesis_before": "it is"} for row in read.rows]
    assert {counted.word_errors for counted in before_training(replace(read, rows=told)).scores.values()} == {0}


def test_what_is_no_result_is_named(tmp_path):
    with pytest.raises(DataError, match=r"'nothing' is neither a run nor a folder with evaluation\.json"):
        read_result("nothing", store=None, cache=tmp_path)


def test_contexts_that_differ_and_speakers_of_train_are_noted():
    short = {"audio_context": "the utterance's own length and 1.3 s", "speakers_in_train": 6}
    long = {"audio_context": "30 s", "speakers_in_train": None}
    first, second = result("a", wrong(5), short), result("b", wrong(5), long)
    contexts, speakers = compare({"a": [first], "b": [second]})["notes"]
    assert "audio contexts differ" in contexts and "own length and 1.3 s (a); 30 s (b)" in contexts
    assert speakers.startswith("6 of the speakers are also in train")
    assert compare({"b": [second], "c": [result("c", wrong(5))]})["notes"] == []
