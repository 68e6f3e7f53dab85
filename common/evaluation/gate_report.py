"""Accuracy of a gate, and calibration of its probabilities.

Calibration: Guo et al. 2017 (arXiv:1706.04599). Shape letters: N utterances, D embedding width, K groups, S speakers.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

BINS = 10
FOLDS = 5
MOST_UTTERANCES = 5000  # size of a sample of the utterances
SHRINKAGE = 0.1  # of the covariance, as the gate's own


def gate_report(
    probability_NK: npt.NDArray[np.float32], label_N: npt.NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, macro F1, confusion and calibration of predicted group probabilities.

    Args:
        names: names of the groups.

    Returns:
        accuracy, macro_f1, expected_calibration_error (fractions), labels, confusion (true × predicted counts),
        reliability (rows of confidence, accuracy, count), utterances.
    """
    predicted_N = probability_NK.argmax(1)
    labels = list(range(probability_NK.shape[1]))
    reliability = _reliability(probability_NK.max(1), predicted_N == label_N)
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in reliability]
    return {
        "accuracy": float(accuracy_score(label_N, predicted_N)),
        "macro_f1": float(f1_score(label_N, predicted_N, labels=labels, average="macro", zero_division=0.0)),
        "expected_calibration_error": float(sum(gaps) / len(label_N)),
        "labels": list(names),
        "confusion": confusion_matrix(label_N, predicted_N, labels=labels).tolist(),
        "reliability": reliability,
        "utterances": len(label_N),
    }


def new_speakers_report(
    vectors_ND: npt.NDArray[np.float32], label_N: npt.NDArray[np.int64], speakers: Sequence[str], *, seed: int
) -> dict[str, Any] | None:
    """Accuracy of predicting the groups of new speakers from embeddings, by one utterance and by all of a speaker's.

    A linear discriminant is fitted on the speakers outside of each fold. For the prediction by speaker, its
    log-probabilities are summed over the speaker's utterances, as with `asr.route_by: speaker`.

    Returns:
        utterance_accuracy, speaker_accuracy, chance (share of the largest group), speakers, utterances; None where
        fewer than two groups have two speakers.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    speaker_N = np.asarray(speakers)
    pairs = {(s, k) for s, k in zip(speakers, label_N.tolist(), strict=True) if s}
    of_group = Counter(k for _, k in pairs)  # number of speakers
    heard = sorted(k for k, count in of_group.items() if count > 1)
    row_N = np.flatnonzero(np.isin(label_N, heard) & (speaker_N != ""))
    if len(heard) < 2:
        return None
    if len(row_N) > MOST_UTTERANCES:
        row_N = np.sort(np.random.default_rng(seed).choice(row_N, MOST_UTTERANCES, replace=False))
    label_N, speaker_N, points_ND = label_N[row_N], speaker_N[row_N], vectors_ND[row_N].astype(np.float64)
    score_NK = np.zeros((len(row_N), len(heard)))
    folds = StratifiedGroupKFold(min(FOLDS, *(of_group[k] for k in heard)))
    for fit_N, held_N in folds.split(points_ND, label_N, speaker_N):
        score_NK[held_N] = _log_probabilities(points_ND, label_N, fit_N, held_N, heard)
    predicted_N = np.array(heard)[score_NK.argmax(1)]
    right_S = []
    for speaker in np.unique(speaker_N):
        own_N = speaker_N == speaker
        group = np.bincount(label_N[own_N]).argmax()
        right_S.append(heard[int(score_NK[own_N].sum(0).argmax())] == group)
    return {
        "utterance_accuracy": float((predicted_N == label_N).mean()),
        "speaker_accuracy": float(np.mean(right_S)),
        "chance": float(np.bincount(label_N).max() / len(label_N)),
        "speakers": len(right_S),
        "utterances": len(row_N),
    }


def _log_probabilities(
    points_ND: npt.NDArray[np.float64],
    label_N: npt.NDArray[np.int64],
    fit_N: npt.NDArray[np.int64],
    held_N: npt.NDArray[np.int64],
    groups: Sequence[int],
) -> npt.NDArray[np.float64]:
    """Log-probability of each group for held-out rows; very low for a group that the fitted rows lack."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    found_NK = np.full((len(held_N), len(groups)), -1e3)
    present, count = np.unique(label_N[fit_N], return_counts=True)
    present = present[count > 1]  # a single utterance has no spread
    fit_N = fit_N[np.isin(label_N[fit_N], present)]
    columns = [list(groups).index(k) for k in present]
    if len(present) < 2:
        found_NK[:, columns] = 0.0
        return found_NK
    equal = np.full(len(present), 1 / len(present))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE, priors=equal)
    scale_D = points_ND[fit_N].std(0) + 1e-6
    model.fit(points_ND[fit_N] / scale_D, label_N[fit_N])
    found_NK[:, columns] = np.maximum(model.predict_log_proba(points_ND[held_N] / scale_D), -1e3)
    return found_NK


def _reliability(confidence_N: npt.NDArray[Any], right_N: npt.NDArray[np.bool_]) -> list[dict[str, float]]:
    bin_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence_N[bin_N == b].mean()),
            "accuracy": float(right_N[bin_N == b].mean()),
            "count": int((bin_N == b).sum()),
        }
        for b in range(BINS)
        if (bin_N == b).any()
    ]
