"""How well a gate tells clusters apart, and whether its probabilities can be believed.

Calibration: Guo et al. 2017 (arXiv:1706.04599). Shape letters: N utterances, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

BINS = 10


def gate_report(probability_NK: npt.NDArray[np.float32], label_N: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Accuracy, macro F1, confusion and calibration of predicted cluster probabilities.

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
        "labels": [f"cluster {k}" for k in labels],
        "confusion": confusion_matrix(label_N, predicted_N, labels=labels).tolist(),
        "reliability": reliability,
        "utterances": len(label_N),
    }


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
