"""What a corpus has, what it costs, and the batch that fits: three questions before a training."""

import json
import re

import pytest

from common.progress import clock
from tests.cli.test_evaluate import call
from tests.cli.test_main import moe_asr


def test_twice_the_hours_cost_twice_the_training_at_the_pace_of_a_run(micro_run, micro_model, tones, capsys):
    def hours_of_asr(hours):
        place = ("--store", micro_run[0], "--model", micro_model, "--corpus", tones)
        call("estimate", "--hours", hours, "--from", "micro", *place, "--json")
        costs = json.loads(capsys.readouterr().out)
        assert "micro" in costs["basis"] and costs["device"] == "cpu" and costs["stages"]["scoring"]["hours"] > 0
        return costs["stages"]["asr"]["hours"]

    assert hours_of_asr(20) == pytest.approx(2 * hours_of_asr(10)) and hours_of_asr(10) > 0


@pytest.mark.parametrize("regime", ["num_experts=1", "asr.adapt=full"])
def test_stages_that_will_not_run_cost_nothing(micro_run, micro_model, tones, capsys, regime):
    place = ("--store", micro_run[0], "--model", micro_model, "--corpus", tones)
    call("estimate", "--hours", 9, "--from", "micro", *place, "--set", "asr.pretrain=alone", "--set", regime, "--json")
    assert set(json.loads(capsys.readouterr().out)["stages"]) == {"asr", "scoring"}


def test_the_price_is_of_all_gpu_hours(micro_run, micro_model, tones, capsys):
    place = ("--store", micro_run[0], "--model", micro_model, "--corpus", tones)
    words = ("estimate", "--hours", 1000, "--from", "micro", *place)
    call(*words, "--json", "--price", 2)
    figures = json.loads(capsys.readouterr().out)
    hours = figures["hours"]
    assert (figures["price"], figures["cost"]) == (2, 2 * hours)
    call(*words, "--price", 2, "--gpus", 4)
    printed = capsys.readouterr().out
    total = float(re.search(r"^total +([\d,.]+)", printed, re.MULTILINE)[1].replace(",", ""))
    spent, price = re.search(r"on 4 CPUs: (.+), ([\d,.]+) at 2 per CPU hour", printed).groups()
    assert float(price.replace(",", "")) == pytest.approx(2 * total, abs=0.02)
    assert spent == clock(3600 * hours / 4)


def test_the_batch_that_fits_grows_with_memory(micro_model, tones, tmp_path):
    def rows(gigabytes):
        words = ("--model", micro_model, "--corpus", tones, "--device", "cpu", "--tokens", 8, "--memory", gigabytes)
        done = moe_asr("fit-batch", *words, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["rows"]

    assert 1 <= rows(1) < rows(1.4)


def test_a_corpus_is_counted_by_etiology(tones, capsys):
    call("corpus", "stats", tones, "--json")
    groups = json.loads(capsys.readouterr().out)["by_etiology"]
    assert sum(group["utterances"] for group in groups.values()) == 108
