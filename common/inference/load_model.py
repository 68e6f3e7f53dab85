"""Opens any trained or untrained model by its name, and transcribes batches of audio with it.

Shape letters: B utterances, K experts per utterance, D embedding width.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from common.data.batches import Batch
from common.data.corpus import Utterance
from common.data.features import describe_context
from common.data.groups import group_values
from common.data.sources import folder_digest, is_hub_name, locate_model
from common.data.tokens import TextCodec, load_codec
from common.decoding.decode import Decoded, Decoding, decode_hidden
from common.errors import DataError, UsageError
from common.files import read_document
from common.inference.added_experts import added_folders, model_content
from common.inference.peft_adapter import adapter_settings, with_adapter
from common.model.adapters import CONFIG as ADAPTER
from common.model.added_experts import AddedExpert, attach
from common.model.bundle import DESCRIPTION, BundleInfo, load_recogniser, read_info
from common.model.recogniser import Recogniser
from common.model.routing import Choice, route_by_table
from common.model.whisper import load_whisper
from common.pipeline.runs import find_run, run_names, stage_folders
from common.sections import AudioConfig, text_language
from common.storage.manifest import MANIFEST, Manifest
from common.storage.store import Store
from common.training.train import make_accelerator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """A model that is ready for transcription.

    Attributes:
        recogniser: on the device, in evaluation mode.
        codec: text ↔ tokens, with the prompt of its language and task.
        info: description of a trained model; None for a plain Whisper and for a PEFT adapter.
        folder: local folder of the model.
        base: folder of the base weights, tokenizer included.
        name: the name by which the model was opened.
        context, margin: audio context and margin, as in training.
        spoken: language of the speech, in the prompt.
        task: transcribe or translate.
        accelerator: its device and precision.
        added: experts that were added after training, in the order of their numbers.
        voice: number of the added expert that is used for all audio; -1 for none.
        group: number of the group whose routed expert is used for all audio, with routing by a table; -1 if unknown.
    """

    recogniser: Recogniser
    codec: TextCodec
    info: BundleInfo | None
    folder: Path
    base: Path
    name: str
    context: str
    margin: int
    spoken: str
    task: str
    accelerator: Accelerator
    added: tuple[AddedExpert, ...] = ()
    voice: int = -1
    group: int = -1

    @property
    def language(self) -> str:
        """Language of its texts, for the normaliser of scores: English if it translates."""
        return text_language(self.spoken, self.task)


class Usage(NamedTuple):
    """How a model is used: language of the speech, task, audio context and margin."""

    language: str
    task: str
    context: str
    margin: int


def open_model(
    name: str,
    *,
    store: Store | None,
    cache: Path,
    base: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    language: str | None = None,
    task: str | None = None,
    context: str | None = None,
    margin: int | None = None,
    endpoint_url: str | None = None,
) -> OpenedModel:
    """Opens a model of any kind.

    Args:
        name: in this order, a folder with recogniser.json (output of the asr stage), with adapter_config.json (PEFT),
            with config.json (a Hugging Face Whisper: base, merged or fully fine-tuned) or with run.json (a run's own
            folder); the name of a run in `store`; the address of such a folder in a store, or a hub name.
        store: store in which runs are looked up by name.
        cache: folder for downloads.
        base: location of the base weights, instead of the location recorded in the model.
        device, precision: as in the configuration.
        language, task: language of the speech and task of a model that does not record them; English and transcription
            if None.
        context, margin: audio context to use instead of the one that the model was trained with. A model that does not
            record a context (a plain Whisper, an adapter from elsewhere) gets 30 s, since it was not trained on a
            shorter one.
        endpoint_url: endpoint of an S3-compatible store, for addresses.

    Raises:
        DataError: there is no such model, or it does not fit its base.
        UsageError: a margin is given for a context of 30 s; the model was trained for another language or task.
        RetryableError: hub or store does not answer.
    """
    folder, added_from = find_model(name, store, cache, endpoint_url)
    accelerator = make_accelerator(precision, device)
    find_base = partial(_locate_base, cache=cache, endpoint_url=endpoint_url, model=name)
    recogniser, origin, info = _load(folder, base, find_base, accelerator.device)
    added = attach(recogniser, added_from)
    recorded = _recorded_usage(info, name, store)
    spoken, task = _prompt(name, recorded, language, task)
    context, margin = _audio_context(name, recorded, context, margin)
    return OpenedModel(
        recogniser=recogniser.to(accelerator.device).eval(),
        codec=load_codec(origin, language=spoken, task=task),
        info=info,
        folder=folder,
        base=origin,
        name=name,
        context=context,
        margin=margin,
        spoken=spoken,
        task=task,
        accelerator=accelerator,
        added=added,
    )


def _recorded_usage(info: BundleInfo | None, name: str, store: Store | None) -> Usage | None:
    """How a model was trained, or an untrained one was used when experts were added to it; None if not recorded.

    Raises:
        DataError: the run's record is not complete.
    """
    if info is not None:
        return Usage(info.language, info.task, info.context, info.margin)
    run = find_run(name, store)
    if run is None or not run[1].get("root"):
        return None
    try:
        return Usage(**run[1]["root"]["usage"])
    except (KeyError, TypeError):
        raise DataError(f"run {name}: its record does not say how its model is used: extend the model again") from None


def _prompt(name: str, recorded: Usage | None, language: str | None, task: str | None) -> tuple[str, str]:
    """Language of the speech and task, as recorded, otherwise as given."""
    if recorded is None:
        return language or "en", task or "transcribe"
    for given, own in ((language, recorded.language), (task, recorded.task)):
        if given not in (None, own):
            raise UsageError(f"{given}: model {name} was trained for {own}, which cannot be changed: omit the option")
    return recorded.language, recorded.task


def _load(
    folder: Path, base: str | None, find_base: Callable[..., Path], device: torch.device
) -> tuple[Recogniser, Path, BundleInfo | None]:
    """The model in a folder, the folder of its base, and its description."""
    if (folder / DESCRIPTION).is_file():
        info = read_info(folder)
        revision = info.base_digest.rpartition("@")[2] if info.base_digest.startswith("hub:") else None
        own = revision if base in (None, info.base) else None
        origin = find_base(base or info.base, own, from_hub=base is not None or revision is not None)
        _warn_of_other_base(origin, info, folder)
        return load_recogniser(folder, origin, device)[0], origin, info
    if (folder / ADAPTER).is_file():
        settings = adapter_settings(folder)
        recorded = settings.get("base_model_name_or_path")
        origin = find_base(base or recorded, settings.get("revision") if base in (None, recorded) else None)
        return Recogniser(with_adapter(load_whisper(origin), folder)), origin, None
    without_words = not (folder / "tokenizer.json").is_file()
    return Recogniser(load_whisper(folder)), find_base(base, None) if base and without_words else folder, None


def find_model(name: str, store: Store | None, cache: Path, endpoint_url: str | None = None) -> tuple[Path, list[Path]]:
    """The local folder of a model by its name (see `open_model`), and those of its added experts, in order.

    Raises:
        DataError: there is no such model.
    """
    folder = _unwrapped(Path(name))
    if any((folder / file).is_file() for file in (DESCRIPTION, ADAPTER, "config.json")):
        return folder, added_folders(None, folder, cache)
    if run := find_run(name, store):
        root = run[1].get("root")  # of an extension of what is no run
        if not root:
            return stage_folders(*run, "asr", cache)[0], added_folders(run, folder, cache)
        folder, own = _root(root, store, cache, endpoint_url)
        return folder, [*own, *added_folders(run, folder, cache)]
    if name.startswith("s3://") or is_hub_name(name):
        folder = _unwrapped(_locate_base(name, None, cache=cache, endpoint_url=endpoint_url, model=name))
        return folder, added_folders(None, folder, cache)
    where = f"; runs in {store.url}: {', '.join(run_names(store)) or 'none'}" if store else ""
    problem = "contains no model" if folder.is_dir() else "is neither a folder, nor a run, nor a hub name"
    wanted = f"give a run, or a folder with {DESCRIPTION}, {ADAPTER} or a Whisper's config.json"
    raise DataError(f"model {name!r} {problem}: {wanted}{where}")


def _root(
    root: Mapping[str, str], store: Store | None, cache: Path, endpoint_url: str | None
) -> tuple[Path, list[Path]]:
    """The model to which experts were added, if this model is not a run.

    Raises:
        DataError: the model is missing, or has changed.
    """
    folder, own = find_model(root["name"], store, cache, endpoint_url)
    if model_content(folder) != root["digest"]:
        raise DataError(f"model {root['name']} has changed since experts were added to it: restore it")
    return folder, own


def _unwrapped(folder: Path) -> Path:
    """For an artifact's folder, the attempt that its manifest names; otherwise the folder itself."""
    if not (folder / MANIFEST).is_file():
        return folder
    return folder / Manifest.from_json(read_document(folder / MANIFEST), str(folder / MANIFEST)).attempt


def _locate_base(
    name: str | None,
    revision: str | None,
    *,
    cache: Path,
    endpoint_url: str | None,
    model: str,
    from_hub: bool = True,
) -> Path:
    """The folder of base weights called `name`.

    Args:
        model: the model that needs it, for the message.
        from_hub: whether the name may be a hub name; the path of a moved folder can look like a hub name.
    """
    if name and (name.startswith("s3://") or Path(name).is_dir() or (from_hub and is_hub_name(name))):
        return locate_model(name, cache, revision=revision, endpoint_url=endpoint_url)
    base_name = name or "a base that it does not name"
    raise DataError(f"model {model!r} was trained on {base_name}, not found here: give --base")


def _warn_of_other_base(base: Path, info: BundleInfo, model: Path) -> None:
    known = info.base_digest.partition("sha256:")[2]
    if info.adapt != "full" and known and folder_digest(base) != known:
        log.warning("model %s was trained on another base than the weights in %s: its experts may not fit", model, base)


def _audio_context(name: str, recorded: Usage | None, context: str | None, margin: int | None) -> tuple[str, int]:
    """Audio context and margin with which a model is used; a context other than its own is logged as a warning."""
    own = recorded[2:] if recorded is not None else ("30s", AudioConfig().margin)
    wished = context or own[0], own[1] if margin is None else margin
    if wished[0] == "30s" and margin is not None:
        raise UsageError(f"audio.margin={margin}: model {name} is used with 30 s, which has no margin: "
                         "add --set audio.context=dynamic, or leave it out")  # fmt: skip
    if wished[0] != own[0] or (wished[0] == "dynamic" and wished[1] != own[1]):
        log.warning(
            "model %s %s audio context of %s, and is used with %s, as requested: this may cost accuracy",
            *(name, "was trained with an" if recorded else "is meant for Whisper's", describe_context(*own)),
            describe_context(*wished),
        )
    return wished


@torch.inference_mode()
def gate_evidence(opened: OpenedModel, batch: Batch) -> torch.Tensor | None:
    """Evidence of each utterance about its group (`Gate.evidence`); None for a model without a gate."""
    gate = opened.recogniser.gate
    if gate is None or opened.info is None:
        return None
    with opened.accelerator.autocast():
        pooled_BD = opened.recogniser.frozen_embedding(batch, layer=opened.info.layer, pooling=opened.info.pooling)
    return gate.evidence(pooled_BD.float())


def stacked(choices: Sequence[Choice]) -> Choice:
    """The choices of single rows, stacked to the choice of a batch."""
    return torch.cat([logits_1E for logits_1E, _ in choices]), torch.cat([known_1 for _, known_1 in choices])


def blank_choice(info: BundleInfo, rows: int, device: torch.device) -> Choice:
    """The choice by a table for audio of which nothing is known: the shared expert alone, unless all are one group."""
    blank = [Utterance(id="", audio_filepath="", duration=0.0, text="")] * rows
    return route_by_table(group_values(blank, info.column, info.groups), info.groups, device)


@torch.inference_mode()
def route_batch(
    opened: OpenedModel, batch: Batch, choice: Choice | None = None, added: Sequence[int] | None = None
) -> tuple[list[list[int]], list[list[float]]] | None:
    """Routes audio without stored embeddings: frozen encoder, pooled embedding, gate.

    Afterwards the recogniser's logits are those of this batch, in its order.

    Args:
        choice: (logits_BE, known_B) to use instead of the batch's own, for routing by speakers or by a table.
        added: number of each row's added expert, -1 for none; if None, the model's `voice` for all rows.

    Returns:
        Experts and weights of each utterance (B lists of K); None if the model has no routing.
    """
    recogniser = opened.recogniser
    if choice is None and recogniser.gate is not None:
        evidence_BF = gate_evidence(opened, batch)
        assert evidence_BF is not None
        choice = recogniser.gate.decide(evidence_BF)
    elif choice is None and opened.info is not None and opened.info.route_by == "table":
        choice = blank_choice(opened.info, len(batch), batch.row_B.device)
    numbers = [opened.voice] * len(batch) if added is None else list(added)
    added_B = torch.tensor(numbers, device=batch.row_B.device) if max(numbers) >= 0 else None
    if choice is None:
        recogniser.choose_by(added_N=added_B)
        return None
    logits_BE, known_B = choice
    recogniser.choose_by(logits_NE=logits_BE, known_N=known_B, added_N=added_B)
    routing = recogniser.set_routing(logits_BE, len(batch), known_B, added_B)
    return routing.topk_ids_BK.tolist(), routing.topk_weights_BK.float().tolist()


@dataclass(frozen=True)
class Transcript:
    """The transcript of a batch.

    Attributes:
        decoded: text and probabilities of each utterance.
        hidden_BTD: encoder output, from which the times of words are computed.
        routing: experts and weights of each utterance; None without a gate.
    """

    decoded: list[Decoded]
    hidden_BTD: torch.Tensor
    routing: tuple[list[list[int]], list[list[float]]] | None


@torch.inference_mode()
def transcribe_batch(
    opened: OpenedModel,
    batch: Batch,
    decoding: Decoding,
    choice: Choice | None = None,
    added: Sequence[int] | None = None,
) -> Transcript:
    """Routes (see `route_batch`), encodes and decodes a batch, for both evaluation and transcription.

    The slot keeps the batch's routing.
    """
    routing = route_batch(opened, batch, choice, added)
    recogniser = opened.recogniser
    own_rows = replace(batch, row_B=torch.arange(len(batch), device=batch.row_B.device))
    with opened.accelerator.autocast():
        hidden_BTD = recogniser.encode_batch(own_rows)
        decoded = decode_hidden(recogniser.whisper, hidden_BTD, opened.codec, decoding, recogniser.slot)
    return Transcript(decoded, hidden_BTD, routing)
