"""The table of a sweep, with the peer by PEFT and Seq2SeqTrainer beside its runs."""

import json

import pytest

from bench import peft, regimes
from common.config import to_yaml
from common.errors import DataError
from common.evaluation.results import read_result
from common.evaluation.wer import wer
from common.storage.local import LocalStore
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
    assert rows["mixture"]["minus_dense-plain"] is None  # which this sweep does not have
    for name, reference in (("mixture", "dense"), ("mixture", "peft"), ("peft", "dense"), ("dense", "peft")):
        delta = rows[name][f"minus_{reference}"]
        assert delta["delta"] == pytest.approx(rows[name]["wer"] - rows[reference]["wer"])
        assert delta["low"] is None or delta["low"] <= delta["delta"] <= delta["high"]
        assert rows[name]["worst_group_name"] in ("low", "typical")  # high is the unseen one
        assert rows[name]["worst_group"] >= rows[name]["wer"] and 0 <= rows[name]["wer_dev"] <= 1
        assert 0 <= rows[name]["wer_unseen"] <= 1
    assert rows["mixture"]["unseen_minus_dense"]["delta"] == pytest.approx(
        rows["mixture"]["wer_unseen"] - rows["dense"]["wer_unseen"]
    )


def test_the_dev_rate_is_that_of_the_weights_that_were_kept(tmp_path):
    rows = [("dev", 0.5), ("dev", 0.4), ("average", 0.3), ("test", 0.1)]
    lines = [json.dumps({"step": n, "split": split, "wer": wer}) for n, (split, wer) in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], json.dumps({"split": "dev", "loss": 0.1}), ""]))
    assert regimes.dev_wer(tmp_path) == 0.4
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert regimes.dev_wer(tmp_path) == 0.3


def test_rates_are_those_of_the_runs_and_can_be_computed_again_from_the_file(benched, tmp_path):
    store, _, made = benched
    (row,) = (row for row in made["summary"] if row["regime"] == "mixture")
    heard = [part == "high" for part in made["corpora"]["corpus"]["etiologies"]]
    for seed, rate in enumerate(row["wer_of_seeds"]):
        name = f"s-mixture-s{seed}"
        rows = read_result(name, store=LocalStore(store), cache=tmp_path).scores
        mine = [score for score, skipped in zip((rows[i] for i in sorted(rows)), heard, strict=True) if not skipped]
        assert rate == pytest.approx(wer(mine))
    (tmp_path / "again.json").write_text(json.dumps(made | {"summary": []}))
    regimes.main(["--results", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text()) == made


def test_a_run_without_word_errors_keeps_its_rates_and_another_label_is_another_regime(benched, tmp_path):
    store, _, made = benched
    of = {"corpus": "corpus", "steps": STEPS, "seed": 0, "regime": "hard, earlier recipe"}
    value = made | {"runs": [*made["runs"], of], "summary": [*made["summary"], of | {"wer": 0.5, "default": False}]}
    (tmp_path / "more.json").write_text(json.dumps(value))
    command = ["--store", str(store), "--sweep", "s-dense=again", "--unseen", "high"]
    regimes.main([*command, "--results", str(tmp_path / "more.json")])
    names = [row["regime"] for row in json.loads((tmp_path / "more.json").read_text())["summary"]]
    assert names == ["base", "mixture", "dense", "dense, again", "peft", "hard, earlier recipe"]


def test_the_committed_summary_is_what_its_runs_give():
    value = json.loads((regimes.RESULTS / "regimes.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(regimes.summarise(value))) == value["summary"]


@pytest.mark.parametrize(
    ("run", "sweep", "regime"),
    [
        ("s-dense-s0", "s", "dense"),
        ("s-dense-plain-s12", "s", "dense-plain"),
        ("s-dense-plain-s0", "s-dense-plain", "dense-plain"),
        ("s-dense-plain-s0", "s-dense", None),
        ("s-long-dense-s0", "s", None),
        ("s-dense", "s", None),
    ],
)
def test_which_runs_belong_to_a_sweep(run, sweep, regime):
    assert regimes.regime_of(run, sweep) == regime


def test_seconds_are_of_training_and_what_precedes_it_without_scoring(benched):
    store, _, made = benched
    stages = json.loads((store / "s-mixture-s0" / "summary.json").read_text())["seconds"]
    (seconds,) = (run["seconds"] for run in made["runs"] if run["run"] == "s-mixture-s0")
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
    assert len(made["corpora"]["corpus"]["ids"]) == 12
    assert {len(run["errors"]) for run in made["runs"]} == {12}
    assert [run["seed"] for run in made["runs"] if run["regime"] == "peft"] == [0, 1]


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
