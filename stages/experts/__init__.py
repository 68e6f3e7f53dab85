"""experts: one LoRA adapter per cluster, each on its own utterances."""

from __future__ import annotations

from collections.abc import Mapping

from common.config import Config
from common.data.corpus import Corpus
from common.pipeline.contract import Contract
from common.storage.manifest import Manifest
from stages.cluster import is_pretrained


def count_clusters(config: Config, corpus: Corpus, manifests: Mapping[str, Manifest]) -> int | None:
    """One expert per cluster found; not known before clustering."""
    found = manifests.get("clusters")
    return int(found.metrics["clusters"]) if found else None


def pretrains_experts(config: Config) -> bool:
    """Whether each expert is trained alone first."""
    return is_pretrained(config) and config.asr.pretrain == "alone"


CONTRACT = Contract(
    name="experts",
    summary="one LoRA adapter per cluster, each on its own utterances",
    output="experts",
    inputs=("embeddings", "clusters", "gate"),
    sources=("corpus", "model"),
    reads=(
        "seed",
        "precision",
        "model.language",
        "model.task",
        "audio",
        "augment",
        "subsets.experts_percent",
        "subsets.experts_samples",
        "subsets.dev_samples",
        "lora",
        "experts",
        "asr.magnitude_rate",
    ),
    fan_out=count_clusters,
    active=pretrains_experts,
    gpus=1,
)
