"""Accuracy for speakers that were not fitted on, by one utterance and by all of a speaker's."""

import numpy as np

from common.evaluation.gate_report import new_speakers_report


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
