"""The gate's report: hand-computed calibration, votes of neighbours."""

import numpy as np
import pytest
import torch

from common.evaluation.gate_report import gate_report
from common.model.gate import Gate
from stages.gate_study import neighbours_vote, probabilities


def test_calibration_error_is_the_hand_computed_one():
    probability_NK = np.array([[0.95, 0.05], [0.15, 0.85], [0.85, 0.15], [0.45, 0.55]], np.float32)
    report = gate_report(probability_NK, np.array([0, 0, 0, 1]))
    # Bins of a tenth: 0.95 is right; of the two at 0.85 one is; 0.55 is right.
    assert report["expected_calibration_error"] == pytest.approx((0.05 + 2 * 0.35 + 0.45) / 4, abs=1e-6)
    assert [(row["count"], row["accuracy"]) for row in report["reliability"]] == [(1, 1.0), (2, 0.5), (1, 1.0)]
    assert report["accuracy"] == 0.75


def test_a_gate_that_is_sure_and_right_is_calibrated():
    gate = Gate(2, 4, 2)
    with torch.no_grad():  # logits are 50 times the embedding
        gate.net[0] = torch.nn.Linear(2, 2)
        gate.net[1], gate.net[3] = torch.nn.Identity(), torch.nn.Identity()
        gate.net[0].weight.copy_(50 * torch.eye(2))
        gate.net[0].bias.zero_()
    probability_NE = probabilities(gate, np.array([[1, 0], [0, 1], [1, 0]], np.float32))
    right = gate_report(probability_NE, np.array([0, 1, 0]))
    assert right["accuracy"] == 1.0
    assert right["expected_calibration_error"] < 1e-6
    assert gate_report(probability_NE, np.array([1, 0, 1]))["expected_calibration_error"] > 0.99


def test_others_get_the_commonest_cluster_of_their_neighbours():
    generator = np.random.default_rng(0)
    vectors_ND = np.concatenate([generator.normal(place, 0.1, (40, 6)) for place in (0, 3)]).astype(np.float32)
    neighbours, agreement = neighbours_vote(vectors_ND, np.repeat([0, 1], 40), seed=1)
    assert neighbours.predict(np.array([[0.3] * 6, [2.7] * 6], np.float32)).tolist() == [0, 1]
    assert agreement == 1.0
    assert 0.2 < neighbours_vote(vectors_ND, generator.integers(0, 2, 80), seed=1)[1] < 0.8


def test_few_clustered_utterances_are_enough_to_ask():
    neighbours, agreement = neighbours_vote(np.array([[0.0], [1.0]], np.float32), np.array([0, 1]), seed=1)
    assert neighbours.predict(np.array([[0.1]], np.float32)).tolist() == [0]
    assert agreement == 0.0  # the only other one is of the other cluster
