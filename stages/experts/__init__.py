"""experts: training of experts before joint training.

`asr.pretrain: alone` trains one LoRA adapter per group of the gate, each on its own utterances. `asr.pretrain: experts`
trains the shared expert on the whole pre-training subset first (contract `shared`), then one routed expert per group on
top of it.
"""

from collections.abc import Mapping

from common.config import Config
from common.data.corpus import Corpus
from common.pipeline.contract import Contract
from common.storage.manifest import Manifest
from stages.cluster import is_pretrained

READS = (
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
)


def count_groups(config: Config, corpus: Corpus, manifests: Mapping[str, Manifest]) -> int | None:
    """One expert per group of the gate; unknown until the gate exists."""
    gate = manifests.get("gate")
    return int(gate.metrics["groups"]) if gate else None


def pretrains_experts(config: Config) -> bool:
    """Whether experts are trained before joint training."""
    return is_pretrained(config) and config.asr.pretrain in ("alone", "experts")


def pretrains_shared(config: Config) -> bool:
    """Whether the shared expert is trained first, and routed experts on top of it."""
    return is_pretrained(config) and config.asr.pretrain == "experts"


SHARED = Contract(
    name="shared",
    summary="the shared expert, trained on the pre-training subset before the routed experts (asr.pretrain: experts)",
    output="shared",
    format=3,  # masks lie in the speech at its new speed, and hold its mean
    sources=("corpus", "model"),
    reads=READS,
    active=pretrains_shared,
    gpus=1,
    part_of="experts",
)

CONTRACT = Contract(
    name="experts",
    summary="one LoRA adapter per cluster, each on its own utterances",
    output="experts",
    format=3,  # masks lie in the speech at its new speed, and hold its mean
    inputs=("embeddings", "gate", "shared"),
    sources=("corpus", "model"),
    reads=(*READS, "asr.routed_rate"),
    fan_out=count_groups,
    active=pretrains_experts,
    gpus=1,
)
