"""Which utterances a configuration looks at: nested subsets of train, capped dev and test."""

from __future__ import annotations

from typing import Literal

from common.config import Config
from common.data.corpus import Corpus, Utterance, stratified_subset
from common.errors import DataError

TEST_SEED = 42  # of the part of test that is looked at: the same for every run, so that runs can be compared
Purpose = Literal["embeddings", "experts", "asr"]


def training_subset(config: Config, corpus: Corpus, purpose: Purpose) -> list[Utterance]:
    """The part of `train` for clustering, expert pre-training or joint training, sorted by id.

    Raises:
        DataError: the corpus has no such utterances.
    """
    pool = _usable(corpus, "train")
    samples = getattr(config.subsets, f"{purpose}_samples")
    percent = getattr(config.subsets, f"{purpose}_percent")
    if samples is not None:
        return stratified_subset(pool, count=min(samples, len(pool)), seed=config.seed)
    return stratified_subset(pool, percent=percent, seed=config.seed)


def evaluation_subset(config: Config, corpus: Corpus, split: Literal["dev", "test"]) -> list[Utterance]:
    """The looked-at part of dev or test, sorted by id; of test the same for every seed, so that runs can be compared.

    Raises:
        DataError: the corpus has no such utterances.
    """
    pool = _usable(corpus, split)
    samples = config.subsets.dev_samples if split == "dev" else config.subsets.test_samples
    seed = config.seed if split == "dev" else TEST_SEED
    return stratified_subset(pool, count=min(samples or len(pool), len(pool)), seed=seed)


def embedded_utterances(config: Config, corpus: Corpus) -> list[Utterance]:
    """Every utterance whose embedding some stage needs, sorted by id: each is encoded at most once in a run."""
    # All three, also where nothing is pre-trained: then both regimes share one extraction.
    purposes: tuple[Purpose, ...] = (
        "embeddings",
        "experts",
        "asr",
    )
    chosen = {u.id: u for purpose in purposes for u in training_subset(config, corpus, purpose)}
    chosen |= {u.id: u for u in evaluation_subset(config, corpus, "dev")}
    chosen |= {u.id: u for u in evaluation_subset(config, corpus, "test")}
    return [chosen[name] for name in sorted(chosen)]


def _usable(corpus: Corpus, split: str) -> list[Utterance]:
    found = corpus.split(split)
    if not found:
        raise DataError(
            f"corpus {corpus.url} has no utterances in split {split!r}: give it speakers in index.jsonl "
            "(`moe-asr corpus stats` lists the splits)"
        )
    return found
