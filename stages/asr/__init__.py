"""asr: gate and experts trained jointly, and the word error rates before and after."""

from common.pipeline.contract import Contract

CONTRACT = Contract(
    name="asr",
    summary="gate and experts trained jointly, and the word error rates before and after",
    output="model",
    inputs=("embeddings", "clusters", "gate", "shared", "experts"),
    sources=("corpus", "model"),
    format=6,  # experts are dropped by the loss without them; masks lie in the speech at its new speed
    reads=(
        "seed",
        "precision",
        "num_experts",
        "model.language",
        "model.task",
        "audio",
        "augment",
        "subsets.asr_percent",
        "subsets.asr_samples",
        "subsets.dev_samples",
        "subsets.test_samples",
        "lora",
        "adalora",
        "asr",
        "decode",
        "gating.hidden",  # of a gate with random weights
        "gating.dropout",
    ),
    gpus=1,
    together=True,
)
