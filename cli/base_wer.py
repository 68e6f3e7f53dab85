"""The base model's word error rate on a corpus, before anything is trained."""

from __future__ import annotations

from pathlib import Path

from common.config import Config, validate
from common.corpus import Corpus
from common.data import BatchLoader
from common.evaluate import by_etiology, decode_set, score_set
from common.recogniser import Recogniser
from common.sources import locate_model
from common.speech_training import decoding_options, speech_examples
from common.train import make_accelerator
from common.wer import wer
from common.whisper import load_codec, load_whisper


def base_wer(corpus: Corpus, model: str) -> dict[str, dict[str, float]]:
    """etiology → clipped and unclipped WER of the base model, and utterances, over all splits."""
    config: Config = validate({"model": {"name": model}})
    folder = locate_model(config, Path.home() / ".cache" / "moe-asr")
    accelerator = make_accelerator("auto")
    codec = load_codec(folder)
    examples = speech_examples(config, corpus, corpus.utterances, codec)
    loader = BatchLoader(examples, num_workers=0, device=accelerator.device)
    recogniser = Recogniser(load_whisper(folder)).to(accelerator.device)
    decoding = decoding_options(config)
    texts = decode_set(recogniser, examples, loader, codec, decoding, accelerator)
    scores = score_set(corpus.utterances, texts, config.model.language)
    return {
        name: {"wer": wer(group), "wer_unclipped": wer(group, clipped=False), "utterances": len(group)}
        for name, group in sorted(by_etiology(corpus.utterances, scores).items())
    }
