"""Checkpoints of another training, or with numbers that are none, are refused or passed over: none is half used."""

import math
import shutil

import pytest
import torch

from common.errors import DataError, Preempted
from common.storage import open_store
from common.storage.checkpoint import Checkpointer
from tests.common.training.test_train import Line, fit, weights


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The store of a training that was stopped by a signal at step 13."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Preempted):
        fit(Line(), folder=folder, stop_at=13)
    return folder


def open_points(folder):
    return Checkpointer(open_store(folder), "checkpoints/", scratch=folder)


def changed(tensors, state):
    """(tensors, state) of checkpoints that are whole, but not this training's."""
    for name in tensors:
        yield {other: value for other, value in tensors.items() if other != name}, state
        yield tensors | {name: tensors[name].new_zeros(7)}, state
    yield tensors | {"model.more": torch.zeros(2)}, state
    yield tensors | {"os.system": torch.zeros(2)}, state
    yield {}, state
    for name in state:
        yield tensors, {other: value for other, value in state.items() if other != name}
    for name in ("best_step", "epochs_evaluated", "split", "kept", "rows", "best_value"):
        yield tensors, state | {name: "many"}
    yield tensors, state | {"split": 10**9}
    yield tensors, state | {"throughput": {}}
    yield tensors, state | {"throughput": [1, 2]}
    yield tensors, state | {"kept": [[1, 0.5]]}
    yield tensors, {}


def test_a_checkpoint_of_another_training_is_refused(stopped, tmp_path, tally):
    step, tensors, state = open_points(stopped).latest()
    tried, lost = 0, []
    for other_tensors, other_state in changed(tensors, state):
        folder = shutil.copytree(stopped, tmp_path / str(tried))
        open_points(folder).save(step, other_tensors, other_state, wait=True)
        tried += 1
        try:
            fit(Line(), folder=folder)
            lost.append((tensors.keys() ^ other_tensors.keys(), {k for k in state if state[k] != other_state.get(k)}))
        except DataError as error:
            assert "checkpoint" in str(error) and "\n" not in str(error)
    assert not lost
    tally(tried, len(lost))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_that_is_not_finite_is_passed_over_and_the_end_is_the_same(
    stopped, tmp_path, value, caplog, tally
):
    whole, resumed = Line(), Line()
    fit(whole)
    step, tensors, state = open_points(stopped).latest()
    folder = shutil.copytree(stopped, tmp_path / "copy")
    tensors["model.linear.weight"][0, -1] = value
    open_points(folder).save(step + 1, tensors, state, wait=True)
    fit(resumed, folder=folder)
    assert torch.equal(weights(whole), weights(resumed))
    assert "model.linear.weight contains NaN or infinite numbers" in caplog.text
    tally(1, 0)
