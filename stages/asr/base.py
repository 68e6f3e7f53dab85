"""The base model's transcripts of the test set, which are decoded once per store and shared by runs."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from common.config import Config
from common.data.corpus import Utterance
from common.errors import DataError
from common.json_files import read_rows, write_rows
from common.pipeline.shared_results import SharedResults
from common.storage.artifacts import Key, make_key

FILE = "transcripts.jsonl"
FORMAT = 1


def base_key(config: Config, corpus: str, utterances: Sequence[Utterance], model: str, precision: str) -> Key:
    """The key of the base model's transcripts of these utterances in 30 s of audio.

    Args:
        corpus: digest of its index, which describes the utterances, after treatment of long ones.
        model: digest of the base model.
        precision: precision of the device's computation.
    """
    decode = config.decode.model_dump(mode="json", exclude={"normaliser"})  # which changes a score, and no text
    values = {f"decode.{name}": value for name, value in decode.items()}
    values |= {"model.language": config.model.language, "model.task": config.model.task, "precision": precision}
    if any(config.decode.temperatures):
        values["seed"] = config.seed
    ids = hashlib.sha256(json.dumps([u.id for u in utterances]).encode()).hexdigest()
    inputs = {"corpus": f"sha256:{corpus}", "model": model, "utterances": f"sha256:{ids}"}
    return make_key("base", FORMAT, values, inputs)


def base_transcripts(
    results: SharedResults,
    key: Callable[[], Key],
    utterances: Sequence[Utterance],
    decode: Callable[[], Mapping[str, str]],
    accelerator: Accelerator,
) -> tuple[dict[str, str], bool]:
    """(id → text, whether it was decoded now) of the base model; from the store if an earlier run decoded it.

    Args:
        key: used in the main process only, which reads the store for all processes.
        decode: decodes the utterances, in all processes together.
    """
    started, main = time.time(), accelerator.is_main_process
    stored: list[dict[str, str] | None] = [_read(results.find(key()), utterances) if main else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(stored)
    if stored[0] is not None:
        return stored[0], False
    texts = dict(decode())
    if main:
        results.add(key(), lambda folder: _write(folder, utterances, texts), started=started)
    return texts, True


def _write(folder: Path, utterances: Sequence[Utterance], texts: Mapping[str, str]) -> None:
    write_rows(folder / FILE, ({"id": u.id, "text": texts[u.id]} for u in utterances))


def _read(folder: Path | None, utterances: Sequence[Utterance]) -> dict[str, str] | None:
    """The texts of exactly these utterances; None if the file contains other utterances."""
    if folder is None:
        return None
    try:
        texts = {str(row["id"]): str(row["text"]) for row in read_rows(folder / FILE)}
    except (DataError, KeyError):
        return None
    return texts if texts.keys() == {u.id for u in utterances} else None
