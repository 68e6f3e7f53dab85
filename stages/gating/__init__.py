"""gating: an MLP that tells an utterance's group from its embedding."""

from common.pipeline.contract import Contract
from stages.cluster import is_pretrained

CONTRACT = Contract(
    name="gating",
    summary="an MLP that tells an utterance's group from its embedding",
    output="gate",
    inputs=("embeddings", "clusters"),
    sources=("corpus",),
    format=5,  # distances relative to all utterances
    reads=("seed", "gating"),
    active=is_pretrained,
    gpus=1,
)
