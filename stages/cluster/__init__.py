"""cluster: groups of similar speech, from pooled embeddings."""

from common.config import Config
from common.pipeline.contract import Contract
from common.sections import ClusterConfig
from stages.extract import has_gate


def is_pretrained(config: Config) -> bool:
    """Whether gate and experts are pre-trained on clusters."""
    return has_gate(config) and config.asr.pretrain != "none"


CONTRACT = Contract(
    name="cluster",
    summary="groups of similar speech, from pooled embeddings",
    output="clusters",
    inputs=("embeddings",),
    sources=("corpus",),
    reads=(
        "seed",
        "num_experts",
        "subsets.embeddings_percent",
        "subsets.embeddings_samples",
        "audio.long_audio",
        *(f"cluster.{name}" for name in ClusterConfig.model_fields if name != "plot"),
    ),
    format=3,  # no warning that the corpus's own groups are fewer than num_experts
    active=is_pretrained,
)
