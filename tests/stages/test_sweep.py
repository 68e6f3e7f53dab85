"""Sweeps: regimes with one budget of steps, on a micro model."""

import json

import pytest
from click.testing import CliRunner

from cli.main import cli
from common.config import to_yaml
from common.errors import ConfigError, UsageError
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from stages.sweep import REGIMES, finished_summary, plan_sweep, regime_settings, run_sweep
from tests.stages.test_local_runner import micro_config

STEPS = 9
NAMES = ("alone", "mixture", "regular", "dense")


def manifests(store, run):
    """(stage, manifest) of every task of a run."""
    record = json.loads((store / run / "run.json").read_text())
    states = [(t["stage"], inspect(open_store(store), Key(t["stage"], t["key"]))) for t in record["tasks"].values()]
    return [(stage, state.manifest) for stage, state in states]


def steps_of(store, run):
    """Optimiser steps on speech that a run made in all, by its manifests."""
    return sum(m.metrics["steps"] for stage, m in manifests(store, run) if stage in ("experts", "asr"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory, micro_model, tones):
    """A finished sweep: (store, base configuration, runs, summaries)."""
    store = tmp_path_factory.mktemp("sweep") / "store"
    config = micro_config(store, micro_model, tones, run="s")
    runs = plan_sweep(config, NAMES, seeds=[1], steps=STEPS)
    return store, config, runs, run_sweep(runs)


def test_every_regime_makes_the_same_number_of_steps_in_all(swept):
    store, _, runs, _ = swept
    assert {run.name: steps_of(store, run.name) for run in runs} == {f"s-{r}-s1": STEPS for r in NAMES}
    pretrained = [stage for stage, _ in manifests(store, "s-alone-s1")]
    assert pretrained.count("experts") == 2
    assert {stage for stage, _ in manifests(store, "s-mixture-s1")} == {"extract", "cluster", "gating", "asr"}
    assert not {"cluster", "gating", "experts"} & {stage for stage, _ in manifests(store, "s-regular-s1")}


def test_regimes_share_what_does_not_depend_on_them(swept):
    store, _, _, _ = swept
    assert len(list((store / "artifacts" / "extract").iterdir())) == 1
    assert len(list((store / "artifacts" / "asr").iterdir())) == len(NAMES)


def test_a_dense_adapter_has_as_many_ranks_as_an_utterance_uses(swept):
    store, _, _, _ = swept
    reports = {}
    for name in NAMES:
        (manifest,) = (m for stage, m in manifests(store, f"s-{name}-s1") if stage == "asr")
        folder = next((store / "artifacts" / "asr").glob(f"*/{manifest.attempt}"))
        reports[name] = json.loads((folder / "report.json").read_text())
    # Two experts, both chosen: the mixture's weights are those of the dense adapter. A random gate is trained too.
    assert reports["mixture"]["trained_parameters"] == reports["dense"]["trained_parameters"]
    gate = 32 * 256 + 256 + 256 * 2 + 2
    assert reports["regular"]["trained_parameters"] - reports["mixture"]["trained_parameters"] == gate


def test_running_again_makes_nothing_and_gives_the_same(swept):
    store, config, runs, summaries = swept
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    again = run_sweep(plan_sweep(config, NAMES, seeds=[1], steps=STEPS))
    assert again == summaries
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()} == before
    assert all(finished_summary(run) for run in runs)


def test_another_budget_under_the_same_name_is_refused(swept):
    _, config, _, _ = swept
    changed = plan_sweep(config, ["dense"], seeds=[1], steps=STEPS + 1)
    with pytest.raises(ConfigError, match=r"'s-dense-s1'.*asr.max_steps 9 → 10.*--run"):
        run_sweep(changed)


def test_a_run_that_did_not_end_is_run_again(swept):
    store, _config, runs, summaries = swept
    record = store / "s-dense-s1" / "run.json"
    kept = record.read_text()
    record.write_text(kept.replace('"status": "done"', '"status": "stopped"'))
    assert finished_summary(runs[-1]) is None
    (again,) = run_sweep(runs[-1:])
    assert again["wer_after"] == summaries[-1]["wer_after"]
    assert json.loads(record.read_text())["status"] == "done"


def test_the_command_ends_in_a_comparison_of_the_regimes(swept, tmp_path):
    _, config, _, summaries = swept
    (tmp_path / "base.yaml").write_text(to_yaml(config), encoding="utf-8")
    options = ["--config", str(tmp_path / "base.yaml"), "--max-steps", str(STEPS), "--seeds", "1"]
    options += ["--regimes", ",".join(NAMES), "--out", str(tmp_path / "page")]
    result = CliRunner().invoke(cli, ["sweep", *options], catch_exceptions=False)
    assert result.exit_code == 0
    made = json.loads((tmp_path / "page" / "comparison.json").read_text(encoding="utf-8"))
    assert [system["name"] for system in made["systems"]] == ["base", *NAMES]
    assert [system["wer"] for system in made["systems"][1:]] == pytest.approx([s["wer_after"] for s in summaries])
    assert (tmp_path / "page" / "compare.html").is_file()


@pytest.mark.parametrize("out", ["", "foreign"])
def test_a_dry_run_and_one_whose_folder_is_taken_run_nothing(tmp_path, micro_model, tones, out):
    config = micro_config(tmp_path / "store", micro_model, tones, run="s")
    (tmp_path / "base.yaml").write_text(to_yaml(config), encoding="utf-8")
    options = ["sweep", "--config", str(tmp_path / "base.yaml"), "--max-steps", str(STEPS), "--regimes", "alone"]
    options += ["--out", str(tmp_path)] if out else ["--dry-run"]
    result = CliRunner().invoke(cli, options)
    assert ("s-alone-s42" in result.output) == (not out)
    assert not out or "contains no comparison.json" in str(result.exception)
    assert not (tmp_path / "store").exists()


def test_steps_are_divided_to_the_last_one(swept):
    _, config, _, _ = swept
    for clusters in (2, 3, 5):
        for steps in (20, 31, 100):
            settings = regime_settings(config, "alone", clusters=clusters, steps=steps, pretrain_share=0.5)
            assert settings["experts.max_steps"] * clusters + settings["asr.max_steps"] == steps
            assert (
                regime_settings(config, "full", clusters=clusters, steps=steps, pretrain_share=0.5)["asr.max_steps"]
                == steps
            )


@pytest.mark.parametrize(
    ("regimes", "steps", "message"),
    [
        (["mixture", "sparse"], 9, "unknown regime 'sparse'; choose one of mixture, speaker"),
        (["dense", "dense"], 9, "each regime once"),
        (["alone"], 3, "leaves 0 steps for each of 2 experts"),
    ],
)
def test_what_cannot_be_compared_is_refused(swept, regimes, steps, message):
    with pytest.raises(UsageError, match=message):
        plan_sweep(swept[1], regimes, seeds=[1], steps=steps)


def test_a_setting_of_one_regime_reaches_it_alone(swept):
    runs = plan_sweep(
        swept[1], ["regular", "full"], seeds=[1, 2], steps=5, settings={"full": {"asr.learning_rate": 1e-5}}
    )
    assert [run.name for run in runs] == ["s-regular-s1", "s-full-s1", "s-regular-s2", "s-full-s2"]
    assert {run.config.asr.learning_rate for run in runs if run.regime == "full"} == {1e-5}
    assert {run.config.asr.learning_rate for run in runs if run.regime == "regular"} == {2e-4}


def test_a_setting_that_switches_clustering_off_is_heeded_when_clusters_are_counted(swept):
    own = {"alone": {"asr.pretrain": "none"}}
    (alone,) = plan_sweep(swept[1], ["alone"], seeds=[1], steps=STEPS, settings=own)
    assert (alone.config.asr.pretrain, alone.config.asr.max_steps) == ("none", STEPS)
    assert alone.config.experts.max_steps is None
    both = plan_sweep(swept[1], ["alone", "mixture"], seeds=[1], steps=STEPS, settings=own)
    assert [run.config.asr.max_steps for run in both] == [STEPS, STEPS]


def test_the_help_text_names_every_regime():
    text = " ".join(CliRunner().invoke(cli, ["sweep", "--help"]).output.split())
    assert f"Regimes: {', '.join(REGIMES)}. Runs" in text
