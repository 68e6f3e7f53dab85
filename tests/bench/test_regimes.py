"""The table of a sweep, with the peer by PEFT and Seq2SeqTrainer beside its runs."""

import json

import pytest

from bench import peft, regimes
from common.config import to_yaml
from common.errors import DataError
from stages.sweep import plan_sweep, run_sweep
from tests.stages.test_local_runner import micro_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the peer's own
]
STEPS = 3


@pytest.fixture(scope="module")
def benched(tmp_path_factory, micro_model, tones):
    """A store with a small sweep, the peer's folder, and what bench.regimes wrote of it."""
    folder = tmp_path_factory.mktemp("bench")
    config = micro_config(folder / "store", micro_model, tones, run="s", asr__pretrain="gate")
    (folder / "bench.yaml").write_text(to_yaml(config), encoding="utf-8")
    run_sweep(plan_sweep(config, ["mixture", "dense"], seeds=[0, 1], steps=STEPS))
    options = ["--config", str(folder / "bench.yaml"), "--steps", str(STEPS), "--lr", "1e-3", "--rank", "4"]
    for seed in ("0", "1"):
        peft.main([*options, "--seed", seed])
    written = folder / "regimes.json"
    command = ["--store", str(folder / "store"), "--sweep", "s", "--unseen", "high", "--results", str(written)]
    regimes.main(command)
    return folder / "store", options, json.loads(written.read_text(encoding="utf-8"))


def test_one_summary_row_for_each_regime_of_a_corpus_and_a_budget(benched):
    rows = {row["regime"]: row for row in benched[2]["summary"]}
    assert set(rows) == {"base", "mixture", "dense", "peft"}
    assert {(row["corpus"], row["steps"]) for row in rows.values()} == {("corpus", STEPS)}
    assert [name for name, row in rows.items() if row["default"]] == ["mixture"]
    assert {name: row["seeds"] for name, row in rows.items()} == {"base": 0, "mixture": 2, "dense": 2, "peft": 2}
    assert rows["dense"]["minus_dense"] is None and rows["peft"]["minus_peft"] is None
    for name, reference in (("mixture", "dense"), ("mixture", "peft"), ("peft", "dense"), ("dense", "peft")):
        delta = rows[name][f"minus_{reference}"]
        assert delta["delta"] == pytest.approx(rows[name]["wer"] - rows[reference]["wer"])
        assert delta["low"] is None or delta["low"] <= delta["delta"] <= delta["high"]
        assert rows[name]["worst_group_name"] in ("low", "typical")  # high is the unseen one
        assert rows[name]["worst_group"] >= rows[name]["wer"] and 0 <= rows[name]["wer_dev"] <= 1
        assert 0 <= rows[name]["wer_unseen"] <= 1


def test_seconds_are_of_training_and_what_precedes_it_without_scoring(benched):
    store, _, made = benched
    stages = json.loads((store / "s-mixture-s0" / "summary.json").read_text())["seconds"]
    seconds = made["runs"]["s-mixture-s0"]["seconds"]
    assert sum(stages.values()) - stages["asr"] < seconds < sum(stages.values())
    rows = {row["regime"]: row for row in made["summary"]}
    peers = [json.loads((store / f"s-peft-s{seed}" / "peft.json").read_text())["seconds"] for seed in (0, 1)]
    assert rows["peft"]["seconds"] == pytest.approx(sum(peers) / 2) and rows["base"]["seconds"] is None


def test_the_peer_is_scored_on_the_same_utterances_and_loads_as_an_adapter(benched, tmp_path):
    store, _, made = benched
    facts = json.loads((store / "s-peft-s0" / "peft.json").read_text())
    assert (facts["steps"], facts["rank"], facts["learning_rate"]) == (STEPS, 4, 1e-3)
    # q_proj (32 × 32) of two encoder and four decoder attentions, fc1 (32 × 64) of four blocks.
    assert facts["trained_parameters"] == 6 * 4 * (32 + 32) + 4 * 4 * (32 + 64)
    assert (store / "s-peft-s0" / "adapter" / "adapter_model.safetensors").is_file()
    (part,) = made["comparisons"]
    assert part["seen"]["utterances"] + part["unseen"]["utterances"] == 12
    assert made["runs"][str(store / "s-peft-s1")]["seed"] == 1


def test_the_peer_is_made_once_and_another_run_under_its_name_is_refused(benched, capsys):
    store, options, _ = benched
    before = (store / "s-peft-s0" / "peft.json").stat().st_mtime_ns
    peft.main([*options, "--seed", "0"])
    assert (store / "s-peft-s0" / "peft.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        peft.main([*options, "--seed", "0", "--rank", "8"])
    assert "holds another run" in capsys.readouterr().err


def test_a_comparison_of_different_test_sets_is_refused(benched, micro_model, tones):
    store, options, _ = benched
    peft.main([*options, "--seed", "2", "--set", "subsets.test_samples=9"])
    with pytest.raises(DataError, match="same utterances"):
        regimes.main(["--store", str(store), "--sweep", "s", "--results", str(store / "out.json")])
