"""extract: pooled embeddings of the frozen encoder, once per utterance."""

from collections.abc import Mapping

from common.config import Config
from common.data.corpus import Corpus
from common.pipeline.contract import Contract
from common.storage.manifest import Manifest


def has_gate(config: Config) -> bool:
    """Whether a gate routes between several experts, and so needs embeddings.

    A table needs none. If the gate learns the table's column, it routes the utterances whose value there is unknown.
    """
    asr = config.asr
    if asr.route_by == "table":
        learnt = config.gating.target == asr.route_column and asr.pretrain != "none"
    else:
        learnt = (config.num_experts or 0) > 1
    return asr.adapt == "lora" and learnt


def count_shards(config: Config, corpus: Corpus, manifests: Mapping[str, Manifest]) -> int:
    """Shards of at most `extract.shard_size` utterances, known from the corpus alone."""
    from stages.inputs import embedded_utterances

    return -(-len(embedded_utterances(config, corpus)) // config.extract.shard_size)


CONTRACT = Contract(
    name="extract",
    summary="pooled embeddings of the frozen encoder, once per utterance",
    output="embeddings",
    sources=("corpus", "model"),
    format=3,  # positions stand for the silence after an utterance
    reads=(
        "seed",
        "precision",
        "model.language",
        "model.task",
        "audio",
        "subsets",
        "extract.layer",
        "extract.pooling",
        "extract.shard_size",
    ),
    fan_out=count_shards,
    active=has_gate,
    gpus=1,
)
