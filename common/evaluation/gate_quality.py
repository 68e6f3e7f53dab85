"""Whether a run's gate can be believed, and what its choices are worth.

Three questions. Does it know the clusters of utterances that nobody clustered, and is it as sure as it is right? Does
it give one speaker's utterances the same experts? What does the word error rate become with other numbers of experts?

Shape letters: N utterances, M clustered utterances, D embedding width, E experts, K neighbours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from common.clustering.embeddings import EmbeddingTable
from common.data.batches import BatchLoader, Example
from common.data.corpus import Utterance
from common.data.tokens import TextCodec
from common.decoding.decode import Decoding
from common.evaluation.gate_report import gate_report
from common.evaluation.score import decode_set, score_set, speakers_of_set
from common.evaluation.wer import bootstrap_interval, cer, wer
from common.model.gate import Gate
from common.model.recogniser import Recogniser
from common.model.routing import router_entropy, routing_report

NEIGHBOURS = 5
CHECKED = 2000  # clustered utterances on which the rule for others is tried out

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NearestClusters:
    """Clustered utterances, which tell the cluster of others.

    Attributes:
        vectors_MD: their embeddings.
        label_M: their clusters, noise having joined the nearest.
    """

    vectors_MD: Vectors
    label_M: Labels

    def label(self, vectors_ND: Vectors) -> Labels:
        """The commonest cluster among the nearest clustered utterances; of equally common ones the nearest's."""
        return self._vote(self._index().kneighbors(vectors_ND, return_distance=False))

    def agreement(self, seed: int) -> float:
        """How often this rule gives a clustered utterance, itself left out, the cluster that it has."""
        chosen_N = np.random.default_rng(seed).permutation(len(self.label_M))[:CHECKED]
        near_NK = self._index(more=1).kneighbors(self.vectors_MD[chosen_N], return_distance=False)
        others = [
            [m for m in row if m != own][: near_NK.shape[1] - 1] for row, own in zip(near_NK, chosen_N, strict=True)
        ]
        return float((self._vote(np.array(others)) == self.label_M[chosen_N]).mean())

    def _index(self, more: int = 0) -> Any:
        from sklearn.neighbors import NearestNeighbors

        return NearestNeighbors(n_neighbors=min(NEIGHBOURS + more, len(self.label_M))).fit(self.vectors_MD)

    def _vote(self, near_NK: npt.NDArray[np.int64]) -> Labels:
        # Counter keeps the order of first sight for equal counts: the nearest comes first.
        return np.array([Counter(row).most_common(1)[0][0] for row in self.label_M[near_NK].tolist()], np.int64)


def calibration(gate: Gate, vectors_ND: Vectors, label_N: Labels) -> dict[str, Any]:
    """`gate_report`'s figures for utterances with their (assumed) clusters, and the router's entropy in nats."""
    with torch.inference_mode():
        logits_NE = gate(torch.from_numpy(vectors_ND).to(gate.mean_D.device)).cpu()
    report = gate_report(logits_NE.softmax(1).numpy(), label_N)
    return report | {"entropy": float(router_entropy(logits_NE))}


def speaker_consistency(
    gate: Gate, table: EmbeddingTable, utterances: Sequence[Utterance], top_k: int
) -> dict[str, Any]:
    """How alike a speaker's utterances are routed, and the experts' load.

    Returns:
        same_expert: over the speakers of two utterances or more, the mean share of utterances whose first expert is the
        speaker's commonest (1: all alike; None without such speakers); speakers: how many there are; load, entropy,
        collapsed as in `RoutingReport`.
    """
    with torch.inference_mode():
        logits_NE = gate(torch.from_numpy(table.rows([u.id for u in utterances])).to(gate.mean_D.device)).cpu()
    firsts: dict[str, Counter[int]] = defaultdict(Counter)
    for u, expert in zip(utterances, logits_NE.argmax(1).tolist(), strict=True):
        if u.speaker:
            firsts[u.speaker][expert] += 1
    shares = [max(count.values()) / count.total() for count in firsts.values() if count.total() > 1]
    found = routing_report(logits_NE, top_k)
    return {
        "same_expert": sum(shares) / len(shares) if shares else None,
        "speakers": len(shares),
        "load": list(found.load),
        "entropy": found.entropy,
        "collapsed": found.collapsed,
    }


@dataclass(frozen=True)
class DecodingSet:
    """Utterances to decode again and again with other routings."""

    utterances: Sequence[Utterance]
    examples: Sequence[Example]
    loader: BatchLoader
    codec: TextCodec
    decoding: Decoding
    accelerator: Accelerator
    language: str


def decode_with(recogniser: Recogniser, data: DecodingSet, table: EmbeddingTable, top_k: int) -> dict[str, str]:
    """id → text with `top_k` experts per utterance, 0 for none, routed by the embeddings in `table`."""
    options, embeddings_ND = recogniser.options, recogniser.embeddings_ND
    rows_ND = torch.from_numpy(table.rows([example.id for example in data.examples]))
    try:
        recogniser.options = replace(options, top_k=max(top_k, 1))
        recogniser.embeddings_ND = rows_ND.to(recogniser.whisper.proj_out.weight.device)
        return decode_set(
            recogniser, data.examples, data.loader, data.codec, data.decoding, data.accelerator, base=top_k == 0
        )
    finally:
        recogniser.options, recogniser.embeddings_ND = options, embeddings_ND


def sensitivity(
    recogniser: Recogniser,
    data: DecodingSet,
    tables: Mapping[str, EmbeddingTable],
    *,
    counts: Sequence[int],
    trained: tuple[int, str],
) -> list[dict[str, Any]]:
    """Error rates with other numbers of experts, and with other embeddings for the gate.

    Args:
        tables: "utterance" and, where speakers are known, "speaker".
        counts: numbers of experts; 0 is none. A mixture that is not blended always uses one.
        trained: number of experts, and table, that the model was trained with.

    Returns:
        Rows of top_k, route_by, trained (whether it is the training's own), wer, interval, cer, and changed: the share
        of utterances whose text differs from that of the training's own choice. First those of the training's table
        with every number, then the trained number with the other tables.
    """
    own_k, own_table = trained
    if recogniser.options.mixture != "blend":
        counts, own_k = [count for count in counts if count == 0] + [1], 1
    choices = [(count, own_table) for count in sorted({*counts, own_k})]
    choices += [(own_k, name) for name in tables if name != own_table]
    texts = {choice: decode_with(recogniser, data, tables[choice[1]], choice[0]) for choice in choices}
    return [
        _row(data, choice, texts[choice], texts[own_k, own_table], choice == (own_k, own_table)) for choice in choices
    ]


def _row(
    data: DecodingSet, choice: tuple[int, str], texts: Mapping[str, str], own: Mapping[str, str], trained: bool
) -> dict[str, Any]:
    scores = score_set(data.utterances, texts, data.language)
    speakers = speakers_of_set(data.utterances)
    return {
        "top_k": choice[0],
        "route_by": choice[1],
        "trained": trained,
        "wer": wer(scores),
        "interval": list(bootstrap_interval(scores, speakers, metric="wer")),
        "cer": cer(scores),
        "changed": sum(texts[name] != own[name] for name in own) / len(own),
    }
