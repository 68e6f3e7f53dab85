"""`moe-asr submit`: what it would create, and what it refuses."""

import json

import pytest
from click.testing import CliRunner

from argo.workflow import build
from cli.main import cli
from common.errors import ConfigError, UsageError

PLACES = ("--store", "s3://bucket/runs", "--corpus", "s3://bucket/corpus", "--gpu", "h100-80")


def dry_run(*words):
    done = CliRunner().invoke(cli, ["submit", "--dry-run", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def parameters(workflow):
    return {parameter["name"]: parameter["value"] for parameter in workflow["spec"]["arguments"]["parameters"]}


def test_a_submission_names_the_template_and_leaves_none_of_its_defaults_to_the_configuration():
    made = dry_run("--mode", "full", *PLACES, "--seed", "7")
    assert made["spec"]["workflowTemplateRef"] == {"name": build().name}
    assert parameters(made) == {
        "mode": "full",
        "config": "",
        "gpu": "h100-80",
        "settings": 'seed=7\ncorpus.path="s3://bucket/corpus"',
        "run": "full",
        "store": "s3://bucket/runs",
        "endpoint-url": "",
        "gpus": "1",
    }


def test_a_file_goes_along_as_it_is(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("# mine\nrun: Mine_1.2\nmodel: {name: openai/whisper-tiny}\n")
    made = dry_run("--config", str(file), *PLACES)
    assert (parameters(made)["config"], parameters(made)["mode"]) == (file.read_text(), "")
    assert made["metadata"]["generateName"] == "moe-asr-mine-1-2-"


def test_processes_of_joint_training_are_gpus_of_its_pod():
    made = parameters(dry_run("--mode", "full", *PLACES, "--processes", "4"))
    assert made["gpus"] == "4"
    assert "runtime" not in made["settings"]


def test_workflow_parameters_pass_through():
    made = dry_run(*PLACES, "-p", "parallelism=8", "-p", "config=a=b", "--resume")
    assert {"parallelism": "8", "config": "a=b", "resume": "true"}.items() <= parameters(made).items()


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (("--gpu", "auto"), UsageError, "--gpu auto: choose the preset of the cluster's GPUs"),
        (("-p", "paralelism=8"), UsageError, "no such parameter"),
        (("-p", "parallelism"), UsageError, "name=value"),
        (("-p", "registry=evil.example.org"), UsageError, "no such parameter"),
        (("-p", "webhook-secret=other"), UsageError, "no such parameter"),
        (("-p", 'scratch-size=1Gi"}}], "hostPID": true'), UsageError, "Kubernetes quantity"),
        (("-p", "step-cpu=-1"), UsageError, "Kubernetes quantity"),
        (("-p", "gpus=two"), UsageError, "whole number"),
        (("-p", "resume=yes"), UsageError, "true or false"),
        (("--store", "runs"), UsageError, "place on this machine"),
        (("--set", "asr.epoch=3"), ConfigError, "did you mean asr.epochs"),
    ],
)
def test_mistakes_are_refused_before_anything_is_submitted(words, error, told):
    done = CliRunner().invoke(cli, ["submit", *PLACES, *words])
    assert isinstance(done.exception, error) and told in str(done.exception)
