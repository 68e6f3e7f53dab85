"""Hand-computed calibration; accuracy for speakers not fitted on, by one utterance and by all of a speaker's."""

import numpy as np
import pytest

from common.evaluation.gate_report import gate_report, new_speakers_report


def voices(shift, *, per_speaker=12, speakers=8, groups=2, seed=0):
    """Embeddings whose groups lie `shift` apart, beside a voice for each speaker."""
    generator = np.random.default_rng(seed)
    rows, labels, names = [], [], []
    for speaker in range(speakers):
        group = speaker % groups
        voice_D = generator.normal(size=8) * np.array([0, 0, 1, 1, 1, 1, 1, 1])
        for _ in range(per_speaker):
            vector_D = generator.normal(size=8) + voice_D
            vector_D[0] += shift * group
            rows.append(vector_D)
            labels.append(group)
            names.append(f"s{speaker}")
    return np.array(rows, np.float32), np.array(labels), names


def test_calibration_error_is_the_hand_computed_one():
    probability_NK = np.array([[0.95, 0.05], [0.15, 0.85], [0.85, 0.15], [0.45, 0.55]], np.float32)
    report = gate_report(probability_NK, np.array([0, 0, 0, 1]), "ab")
    # Bins of a tenth: 0.95 is right; of the two at 0.85 one is; 0.55 is right.
    assert report["expected_calibration_error"] == pytest.approx((0.05 + 2 * 0.35 + 0.45) / 4, abs=1e-6)
    assert [(row["count"], row["accuracy"]) for row in report["reliability"]] == [(1, 1.0), (2, 0.5), (1, 1.0)]
    assert report["accuracy"] == 0.75


def test_a_gate_that_is_sure_is_calibrated_where_it_is_right():
    probability_NK = np.eye(2, dtype=np.float32)[[0, 1, 0]]
    assert gate_report(probability_NK, np.array([0, 1, 0]), "ab")["expected_calibration_error"] < 1e-6
    assert gate_report(probability_NK, np.array([1, 0, 1]), "ab")["expected_calibration_error"] > 0.99


def test_audible_groups_are_told_from_one_utterance():
    report = new_speakers_report(*voices(8.0), seed=0)
    assert report["utterance_accuracy"] > 0.95 and report["speaker_accuracy"] == 1.0
    assert (report["speakers"], report["utterances"], report["chance"]) == (8, 96, 0.5)


def test_alike_groups_are_told_from_all_of_a_speakers_utterances():
    report = new_speakers_report(*voices(1.5, per_speaker=40, speakers=16), seed=0)
    assert report["utterance_accuracy"] < 0.85 < report["speaker_accuracy"]


def test_groups_that_are_voices_are_not_told_for_new_speakers():
    vectors_ND, _, names = voices(0.0)
    assert new_speakers_report(vectors_ND, np.array([int(name[1:]) for name in names]), names, seed=0) is None
    report = new_speakers_report(*voices(0.0, per_speaker=40, speakers=16), seed=0)
    assert report["utterance_accuracy"] < 0.65


def test_utterances_without_a_speaker_do_not_count():
    vectors_ND, labels_N, names = voices(8.0)
    assert new_speakers_report(vectors_ND, labels_N, [""] * len(names), seed=0) is None
