"""Text ↔ tokens of a Whisper checkpoint, from its tokenizer and generation settings."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.errors import DataError
from common.files import read_document
from common.json_files import read_object
from common.whisper_limits import MAX_TOKENS

GENERATION = "generation_config.json"
REMEDY = "restore the file from its source"
IGNORED = -100  # label of positions that carry no loss, PyTorch's convention
TEXT_BUCKETS = (16, 32, 64, 128, 256, MAX_TOKENS)  # tokens; an utterance of 30 s seldom has over 128


def text_bucket(tokens: int) -> int:
    """The bucket length of a text of `tokens` tokens."""
    return next((bucket for bucket in TEXT_BUCKETS if bucket >= tokens), MAX_TOKENS)


def whisper_config(folder: Path) -> dict[str, Any]:
    """The values of a Whisper checkpoint's config.json.

    Raises:
        DataError: the folder is not a Whisper checkpoint.
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise DataError(f"model {folder} contains no config.json: give a Hugging Face Whisper checkpoint")
    values = read_object(config, REMEDY)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{config}: {name} is {value}, which is not a number")
    if (kind := values.get("model_type")) != "whisper":
        raise DataError(f"model {folder} is a {kind!r} model: only Whisper can be the base model")
    return values


def generation_settings(folder: Path) -> dict[str, Any]:
    """The values of a checkpoint's generation_config.json; empty if it has no such file.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(folder) / GENERATION
    return read_object(path, REMEDY) if path.is_file() else {}


@dataclass(frozen=True)
class TextCodec:
    """Conversion between text and tokens, the same for training, evaluation and transcription.

    Attributes:
        tokenizer: the checkpoint's own.
        prompt: start of transcript, language and task (multilingual models), no timestamps.
        end: end-of-text token.
        suppressed: tokens that decoding never emits.
        suppressed_first: tokens with which decoding does not begin.
        timestamp_begin: the timestamp <|0.00|>, right after <|notimestamps|>; None if there are no timestamp tokens.
        no_speech: the token for audio without speech; None if the tokenizer has no such token.
    """

    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    end: int
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    timestamp_begin: int | None = None
    no_speech: int | None = None

    def encode(self, text: str) -> list[int]:
        """Tokens of a transcript with its leading space, without any special token."""
        ids: list[int] = self.tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens; special tokens are omitted."""
        text: str = self.tokenizer.decode([i for i in ids if i < self.end], skip_special_tokens=True)
        return text.strip()

    def pair(self, text: str) -> tuple[list[int], list[int]]:
        """(decoder inputs, labels) of equal length; the prompt has no loss, the end token does."""
        tokens = self.encode(text)
        inputs = [*self.prompt, *tokens]
        labels = [IGNORED] * (len(self.prompt) - 1) + [*tokens, self.end]
        return inputs, labels

    def length(self, text: str) -> int:
        """Number of decoder positions of a transcript."""
        return len(self.encode(text)) + len(self.prompt) + 1


def load_codec(folder: Path, *, language: str = "en", task: str = "transcribe") -> TextCodec:
    """The codec of a checkpoint, from its tokenizer.json and generation_config.json.

    Raises:
        DataError: a file is missing or damaged, or the model does not know the language.
    """
    tokenizer = _load_tokenizer(folder)
    generation = generation_settings(folder)

    def token(text: str) -> int:
        number = tokenizer.token_to_id(text)
        if number is None:
            raise DataError(f"model {folder} has no token {text}; is the language or task right?")
        return int(number)

    prompt = ["<|startoftranscript|>"]
    if generation.get("is_multilingual", tokenizer.token_to_id("<|startoftranscript|>") != 50257):
        prompt += [f"<|{language}|>", f"<|{task}|>"]
    elif language != "en":
        raise DataError(f"model {folder} is for English only; model.language is {language!r}")
    return TextCodec(
        tokenizer=tokenizer,
        prompt=tuple(token(text) for text in [*prompt, "<|notimestamps|>"]),
        end=token("<|endoftext|>"),
        suppressed=_token_list(generation, "suppress_tokens", folder),
        suppressed_first=_token_list(generation, "begin_suppress_tokens", folder),
        timestamp_begin=tokenizer.token_to_id("<|0.00|>"),
        no_speech=tokenizer.token_to_id("<|nospeech|>") or tokenizer.token_to_id("<|nocaptions|>"),  # by its version
    )


def _load_tokenizer(folder: Path) -> Tokenizer:
    """A checkpoint's tokenizer, without the truncation and padding with which some are saved.

    Raises:
        DataError: it is missing or damaged, or has tokens that the model does not have.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"model {folder} contains no tokenizer.json; save its WhisperTokenizerFast there")
    try:
        tokenizer = Tokenizer.from_str(read_document(path).decode())
    except DataError:
        raise
    except Exception as error:  # the library raises plain ones
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): {REMEDY}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    highest, size = max(tokenizer.get_vocab().values(), default=-1), whisper_config(folder).get("vocab_size", 51865)
    if not isinstance(size, int) or highest >= size:
        raise DataError(f"{path} has tokens up to {highest}, and config.json says vocab_size {size!r}: {REMEDY}")
    return tokenizer


def _token_list(generation: dict[str, Any], name: str, folder: Path) -> tuple[int, ...]:
    tokens = generation.get(name) or []
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise DataError(f"{Path(folder) / GENERATION}: {name} is not a list of token numbers: {REMEDY}")
    return tuple(tokens)
