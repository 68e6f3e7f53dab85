"""The inputs of a configuration: its corpus, its base model, and the parts of the corpus that each stage reads.

This module does not import torch, since it is used for planning.
"""

from pathlib import Path
from typing import Literal

from common.config import Config
from common.data import sources
from common.data.corpus import Corpus, Utterance
from common.data.subsets import TEST_SEED, stratified_subset
from common.errors import DataError
from common.inference.long_audio import LongAudio, within_limits

Purpose = Literal["embeddings", "experts", "asr"]


def load_corpus(config: Config, cache: Path) -> Corpus:
    """The configured corpus, after treatment of long utterances as configured.

    Raises:
        DataError: it cannot be found or read, or contains long utterances that are to be treated as an error.
    """
    limit = config.runtime.audio_cache_bytes
    corpus = sources.open_corpus(config.corpus.path, cache, endpoint_url=config.endpoint_url, cache_bytes=limit)
    return within_limits(corpus, long_audio(config), cache)


def long_audio(config: Config) -> LongAudio:
    """How long utterances are treated."""
    return LongAudio(
        treatment=config.audio.long_audio,
        model=config.model.name,
        revision=config.model.revision,
        language=config.model.language,
        task=config.model.task,
        context="30s",  # the base model has learned no other
        device=config.runtime.device,
        precision=config.precision,
        store=config.store,
        endpoint_url=config.endpoint_url,
        quiet=config.runtime.quiet,
    )


def base_model(config: Config, cache: Path) -> Path:
    """The folder of the base model (`data.sources.locate_model`)."""
    name, revision = config.model.name, config.model.revision
    return sources.locate_model(name, cache, revision=revision, endpoint_url=config.endpoint_url)


def base_digest(config: Config, cache: Path) -> str:
    """The digest of the base model (`data.sources.model_digest`)."""
    name, revision = config.model.name, config.model.revision
    return sources.model_digest(name, cache, revision=revision, endpoint_url=config.endpoint_url)


def training_subset(config: Config, corpus: Corpus, purpose: Purpose) -> list[Utterance]:
    """The stratified part of `train` for clustering, expert pre-training or joint training, sorted by id.

    Raises:
        DataError: the corpus has no such utterances.
    """
    samples: int | None = getattr(config.subsets, f"{purpose}_samples")
    percent: float = getattr(config.subsets, f"{purpose}_percent")
    return stratified_subset(_split(corpus, "train"), count=samples, percent=percent, seed=config.seed)


def evaluation_subset(config: Config, corpus: Corpus, split: Literal["dev", "test"]) -> list[Utterance]:
    """The evaluated part of dev or test, sorted by id; that of test does not depend on the seed, so that runs can be
    compared.

    Raises:
        DataError: the corpus has no such utterances.
    """
    samples = config.subsets.dev_samples if split == "dev" else config.subsets.test_samples
    seed = config.seed if split == "dev" else TEST_SEED
    return stratified_subset(_split(corpus, split), count=samples, percent=100, seed=seed)


def _split(corpus: Corpus, split: str) -> list[Utterance]:
    utterances = corpus.split(split)
    if not utterances:
        raise DataError(
            f"corpus {corpus.url} has no utterances in split {split!r}: give it speakers in index.jsonl "
            "(`moe-asr corpus stats` lists the splits)"
        )
    return utterances


def embedded_utterances(config: Config, corpus: Corpus) -> list[Utterance]:
    """Every utterance whose embedding some stage needs, sorted by id: each is encoded at most once in a run."""
    # All three, also where nothing is pre-trained: then both regimes share one extraction.
    purposes: tuple[Purpose, ...] = ("embeddings", "experts", "asr")
    chosen = {u.id: u for purpose in purposes for u in training_subset(config, corpus, purpose)}
    chosen |= {u.id: u for u in evaluation_subset(config, corpus, "dev")}
    chosen |= {u.id: u for u in evaluation_subset(config, corpus, "test")}
    return [chosen[name] for name in sorted(chosen)]
