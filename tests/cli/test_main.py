"""The command line: what a user types, what is refused and with which exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import click
import pytest
import yaml
from huggingface_hub import ModelCard

from common.console import run_command
from tests.stages.test_local_runner import micro_config

OPTIONS = """
--mode --seed --num-experts --resume --no-plot --gating-batch-size --expert-batch-size
--asr-batch-size --num-workers --fp16 --bf16 --gradient-accumulation-steps --eval-every-n-epochs
--save-every-n-epochs --clustering-algorithm --reduce --reduce-dim --plot-method --min-cluster-size
--no-reduce-experts --data-percent --log-file --skip-pretraining --gpu
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def moe_asr(*words, cwd, module="cli.main", variables=None):
    """Runs the command as a process; returns it finished."""
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path.cwd())} | (variables or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "--skip-pretraining"], 64, "num_experts must be specified"),
        (["run", "--mode", "fast"], 64, "fast"),
        (["run", "--set", "asr.epohcs=3"], 78, "asr.epohcs: no such setting; did you mean asr.epochs?"),
        (["run", "--set", "asr.epochs=-1"], 78, "asr.epochs: Input should be greater than 0; got -1"),
        (["run", "--set", "nonsense"], 64, "section.key=value"),
        (["run", "--data-percent", "0"], 64, "--data-percent 0.0"),
        (["run", "--config", "missing.yaml"], 78, "missing.yaml does not exist"),
        (["run", "--corpus", "nowhere"], 65, "nowhere"),
        (["run", "--config", "."], 78, "configuration file . cannot be read"),
        (["runs", "list", "--store", "s3://bucket", "--endpoint-url", "http://[x"], 78, "endpoint_url is malformed"),
        (["sweep", "--regimes", "dense", "--max-steps", "8", "--seeds", "²"], 64, "--seeds ²"),
        (["status", "nothing"], 65, "no run 'nothing'"),
        (["run", "--frobnicate"], 64, "No such option"),
        (["model", "import-ct2", "nowhere", "out"], 65, "nowhere"),
        (["corpus", "stats", "x" * 300], 65, "File name too long: give a folder with index.jsonl"),
        (["corpus", "import", "x" * 300, "out"], 64, "File name too long: check the path"),
        (["clusterings", "demo", "corpus", "--samples", "-5"], 64, "-5 is not in the range x>=1"),
        (["gc", "--older-than", "-5"], 64, "-5.0 is not in the range x>=0"),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(tmp_path, words, code, message):
    done = moe_asr(*words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_program_has_a_traceback_and_a_code_that_no_cluster_tries_again(capsys):
    for fault in (ZeroDivisionError("x"), OSError(5, "Input/output error")):

        @click.command()
        def broken(fault=fault):
            raise fault

        with patch.object(sys, "argv", ["broken"]), pytest.raises(SystemExit) as ended:
            run_command(broken)
        assert ended.value.code == 70 and "Traceback" in capsys.readouterr().err


class AcceleratorError(RuntimeError):
    """Named as torch's own."""


class OutOfMemoryError(RuntimeError):
    """The same."""


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (AcceleratorError("CUDA error: uncorrectable ECC error encountered"), 75),
        (AcceleratorError("CUDA error: device-side assert triggered"), 70),
        (OutOfMemoryError("CUDA out of memory"), 78),
    ],
)
def test_faults_of_a_gpu_are_told_from_faults_of_the_program(fault, code, capsys, caplog):
    @click.command()
    def broken():
        raise fault

    with patch.object(sys, "argv", ["broken"]), pytest.raises(SystemExit) as ended:
        run_command(broken)
    assert ended.value.code == code
    assert str(fault) in capsys.readouterr().err + caplog.text


@pytest.mark.parametrize("module", ["cli.main", "stages.__main__", "common.pipeline.plan", "common.pipeline.contract"])
def test_help_and_contracts_load_without_torch(module, tmp_path):
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_documented_option_exists_with_its_default():
    from click.testing import CliRunner

    from cli.main import cli
    from common.config import resolve
    from common.options import SHARED_OPTIONS

    text = CliRunner().invoke(cli, ["run", "--help"]).output
    for name in (*OPTIONS.split(), *(path for paths in SHARED_OPTIONS.values() for path in paths)):
        assert name in text, name
    config = resolve("full")
    assert (config.seed, config.num_experts, config.model.name) == (42, 8, "openai/whisper-large-v2")
    assert (config.gating.batch_size, config.experts.batch_size, config.asr.batch_size) == (256, 4, 4)
    assert (config.runtime.num_workers, config.asr.gradient_accumulation_steps) == (4, 1)
    assert (config.asr.eval_every_n_epochs, config.runtime.save_every_n_epochs) == (1, 5)
    cluster = config.cluster
    assert (cluster.algorithm, cluster.reduce, cluster.reduce_dim) == ("hdbscan", "pca", 50)
    assert (cluster.plot, cluster.min_cluster_size) == ("umap", 5)
    subsets = config.subsets
    assert (subsets.embeddings_percent, subsets.experts_percent, subsets.asr_percent) == (10, 15, 100)
    quick = resolve("quick").subsets
    assert (quick.embeddings_samples, quick.experts_samples, quick.asr_samples) == (10, 5, 5)


def test_a_run_its_plan_its_status_and_one_stage_alone(tmp_path, micro_model, tones):
    config = micro_config(tmp_path / "runs", micro_model, tones, asr__epochs=1)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run = moe_asr("run", "--config", "c.yaml", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["run"] == "micro"
    card = ModelCard.load(tmp_path / "runs" / "micro" / "README.md")
    assert card.data.eval_results[0].metric_value == round(100 * json.loads(run.stdout)["wer_after"], 2)

    plan = moe_asr("run", "--config", "c.yaml", "--dry-run", "--json", cwd=tmp_path)
    assert {row["status"] for row in json.loads(plan.stdout)} == {"done"}

    for words in (["status", "micro"], ["runs", "list"], ["verify", "micro"], ["logs", "micro", "asr"], ["gc"]):
        done = moe_asr(*words, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.strip(), (words, done.stderr)

    plots = moe_asr("plot", "asr", "runs/micro", "--out", "plots", cwd=tmp_path)
    assert plots.returncode == 0 and list((tmp_path / "plots").glob("*.png")), plots.stderr

    places = ("--corpus", tones, "--model", micro_model)
    own = "--algorithm spectral --pooling mean --reduce pca --reduce-dim 20 --plot pca"
    alone = moe_asr("cluster", *places, *own.split(), cwd=tmp_path, module="stages")
    assert alone.returncode == 0, alone.stderr
    assert "cluster: " in alone.stdout

    untold = moe_asr("cluster", cwd=tmp_path, module="stages")
    assert untold.returncode == 64 and "--corpus is missing" in untold.stderr

    early = moe_asr("asr", *places, "--seed", "9", cwd=tmp_path, module="stages")
    assert early.returncode == 65
    assert "moe-asr run --dry-run" in early.stderr


def test_no_write_permission_is_one_line(tmp_path, micro_model, tones):
    (tmp_path / "file").write_text("in the way")
    config = micro_config(tmp_path / "file" / "store", micro_model, tones)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = moe_asr("run", "--config", "c.yaml", cwd=tmp_path)
    assert done.returncode == 74, done.stderr
    assert "Traceback" not in done.stderr
