"""Trains the shared expert on all utterances of the pre-training subset, before routed experts are added to it."""

from pathlib import Path

from common.config import Config
from common.data.corpus import Corpus
from common.pipeline.stage import Context
from stages.experts.run import new_adapter, train_adapter
from stages.inputs import evaluation_subset, training_subset


def run(config: Config, context: Context, *, corpus: Corpus, model: Path, output: Path) -> None:
    """Writes a PEFT adapter, report.json and metrics."""
    train_adapter(
        config,
        context,
        new_adapter(config, model, routed=0, shared_rank=config.lora.shared_rank, seed=config.seed),
        corpus=corpus,
        model=model,
        train_on=training_subset(config, corpus, "experts"),
        dev=evaluation_subset(config, corpus, "dev"),
        max_steps=config.experts.shared_max_steps,
        expert=None,
        output=output,
    )
