"""The base model's word error rate on a corpus, before anything is trained."""

from __future__ import annotations

from common.config import Config, validate
from common.data.batches import BatchLoader
from common.data.corpus import Corpus
from common.data.tokens import load_codec
from common.evaluation.score import by_etiology, decode_set, score_set
from common.evaluation.wer import wer
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.training.train import make_accelerator
from stages.inputs import base_model
from stages.local_runner import cache_folder
from stages.settings import decoding_options, speech_examples


def base_wer(corpus: Corpus, model: str, language: str, endpoint_url: str | None) -> dict[str, dict[str, float]]:
    """etiology → clipped and unclipped WER of the base model, and utterances, over all splits."""
    config: Config = validate({"model": {"name": model, "language": language}, "endpoint_url": endpoint_url})
    folder = base_model(config, cache_folder())
    accelerator = make_accelerator("auto")
    codec = load_codec(folder, language=language)
    examples = speech_examples(config, corpus, corpus.utterances, codec, context="30s")
    loader = BatchLoader(examples, num_workers=0, device=accelerator.device)
    recogniser = Recogniser(load_whisper(folder)).to(accelerator.device)
    decoding = decoding_options(config)
    texts = decode_set(recogniser, examples, loader, codec, decoding, accelerator)
    scores = score_set(corpus.utterances, texts, config.model.language, published=decoding.published)
    return {
        name: {"wer": wer(group), "wer_unclipped": wer(group, clipped=False), "utterances": len(group)}
        for name, group in sorted(by_etiology(corpus.utterances, scores).items())
    }
