"""Rows of decoding: greedy generation against the transformers pipeline, and what short context does to the text."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, WhisperTokenizerFast

from bench.inputs import MARGIN, short_lengths, write_clips
from bench.measure import Measurement, rounds, row
from bench.peers import make_pipeline
from bench.setting import DEMO, SHAPES, WEIGHTS, Setting, make_whisper
from common.data.batches import BatchLoader, Example, make_examples
from common.data.corpus import Utterance, read_corpus
from common.data.subsets import stratified_subset
from common.data.tokens import TextCodec, load_codec
from common.decoding.decode import Decoding
from common.evaluation.score import decode_set, score_set
from common.evaluation.wer import wer
from common.model.recogniser import Recogniser
from common.training.train import make_accelerator

FIXED_TOKENS = 32  # random weights never end a sentence by themselves


def rows(setting: Setting) -> list[Measurement]:
    """Generation; with real weights and the demo corpus also word error rates."""
    accelerator = make_accelerator(setting.precision, setting.device.type)
    if setting.model == "tiny.en" and WEIGHTS.is_dir() and DEMO.is_dir():
        return _real_rows(setting, accelerator)
    with tempfile.TemporaryDirectory() as name:
        examples = write_clips(Path(name), setting.model, short_lengths(setting.clips))
        codec = fixed_length_codec(setting.model)
        options = {"max_new_tokens": FIXED_TOKENS, "min_new_tokens": FIXED_TOKENS}
        contest = Contest(setting, examples, codec, FIXED_TOKENS, options, accelerator)
        return [contest.result(f"{FIXED_TOKENS} tokens of each by random weights")]


def _real_rows(setting: Setting, accelerator: Accelerator) -> list[Measurement]:
    corpus = read_corpus(DEMO)
    utterances = stratified_subset(corpus.split("test"), count=setting.clips, seed=0)
    codec = load_codec(WEIGHTS)
    examples = {
        context: make_examples(corpus, utterances, codec, context=context, margin=MARGIN)
        for context in ("dynamic", "30s")
    }
    contest = Contest(setting, examples["dynamic"], codec, 100, {"max_new_tokens": 100}, accelerator)
    generated = contest.result("")
    ours, theirs = _rate(utterances, contest.ours()), _rate(utterances, contest.theirs())
    generated["note"] += f"; WER {ours:.1f}% against {theirs:.1f}%"
    padded = Contest(setting, examples["30s"], codec, 100, {}, accelerator)
    at_30s = _rate(utterances, padded.ours())
    lengths = f"{min(u.duration for u in utterances):.1f}–{max(u.duration for u in utterances):.1f} s"
    return [
        generated,
        row(
            "word error rate: dynamic context against 30 s, both ours",
            ours,
            at_30s,
            unit="% WER",
            target=None,
            note=f"tiny.en as it is, {len(utterances)} test utterances of the demo corpus, {lengths}",
        ),
    ]


def _rate(utterances: Sequence[Utterance], texts: dict[str, str]) -> float:
    return 100 * wer(score_set(utterances, texts, "en"))


class Contest:
    """The same clips decoded by both, greedily.

    Args:
        limit: tokens at most.
        options: generation options of the pipeline.
    """

    def __init__(
        self,
        setting: Setting,
        examples: Sequence[Example],
        codec: TextCodec,
        limit: int,
        options: dict[str, Any],
        accelerator: Accelerator,
    ) -> None:
        self.setting, self.examples, self.codec, self.accelerator = setting, list(examples), codec, accelerator
        self.decoding = Decoding(setting.encode_batch, limit)
        self.recogniser = Recogniser(make_whisper(setting.model, setting.device)).eval()
        self.loader = BatchLoader(examples, num_workers=setting.workers, device=setting.device)
        self.clips = [example.read() for example in examples]
        self.options = {"num_beams": 1, "do_sample": False} | options
        self._pipeline = make_pipeline(self._peer(), make_tokenizer(setting.model), setting)

    def _peer(self) -> Any:
        model = self.recogniser.whisper
        if self.setting.model != "tiny.en" or not WEIGHTS.is_dir():
            end = SHAPES[self.setting.model][3] - 3
            model.generation_config = GenerationConfig(
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=end,
                decoder_start_token_id=end + 1,
                no_timestamps_token_id=end + 2,
                is_multilingual=False,
                max_length=448,
            )
        return model

    def ours(self) -> dict[str, str]:
        """id → text, from files."""
        texts: dict[str, str] = decode_set(
            self.recogniser, self.examples, self.loader, self.codec, self.decoding, self.accelerator, base=True
        )
        return texts

    def theirs(self) -> dict[str, str]:
        """id → text, from decoded audio."""
        texts = self._pipeline(self.clips, self.options)
        return {example.id: text for example, text in zip(self.examples, texts, strict=True)}

    def result(self, what: str) -> Measurement:
        """The row."""
        taken = rounds({"ours": self.ours, "theirs": self.theirs}, self.setting)
        count = len(self.examples)
        lengths = [example.duration for example in self.examples]
        return row(
            "generation, greedy: against the transformers pipeline",
            count / taken["ours"],
            count / taken["theirs"],
            unit="clips/s",
            better="more",
            target=self.setting.target(2, 4),
            note=self.setting.words(
                f"{self.setting.model}, {count} clips of {min(lengths):.1f}–{max(lengths):.1f} s, "
                f"batches of {self.setting.encode_batch}",
                *([what] if what else []),
                "ours reads files, the pipeline gets decoded audio; neither is compiled",
            ),
        )


def fixed_length_codec(shape: str) -> TextCodec:
    """A codec that never lets a transcript end."""
    end = SHAPES[shape][3] - 3
    return TextCodec(_byte_tokenizer(shape), prompt=(end + 1, end + 2), end=end, suppressed=(end,), suppressed_first=())


def make_tokenizer(shape: str) -> WhisperTokenizerFast:
    """tiny.en's own, or one of bytes and placeholder words for a model of random weights."""
    if shape == "tiny.en" and WEIGHTS.is_dir():
        return WhisperTokenizerFast.from_pretrained(WEIGHTS)
    tokenizer = _byte_tokenizer(shape)
    end, start = "<|endoftext|>", "<|startoftranscript|>"
    return WhisperTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, unk_token=end, pad_token=end, language=None
    )


def _byte_tokenizer(shape: str) -> Tokenizer:
    """Bytes, then words that merely fill the vocabulary, then the three special tokens of `whisper_config`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = [*letters, *(f"w{i}" for i in range(SHAPES[shape][3] - 3 - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(plain)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return tokenizer
