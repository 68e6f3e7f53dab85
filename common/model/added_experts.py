"""Experts added after training for a person or a group, each in a separate folder; the model is not changed.

added.json                                   whose it is, how it was made, what it brought
adapter_config.json adapter_model.safetensors   its low-rank adapter, in PEFT's format (`expert`, `neighbour`, `shared`)
magnitudes.safetensors                       its multiples of the shared expert's ranks (`gates`)
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import DataError
from common.json_files import write_object
from common.model.adapters import WEIGHTS, Matrices, adapter_matrices, save_adapter
from common.model.mixture import AddedTerm, LoraStack, MixtureLinear, add_mixture, mixture_layers, replace_layer, untie
from common.model.recogniser import Recogniser
from common.tensors import check_weights

ADDED, MAGNITUDES = "added.json", "magnitudes.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of a model without adapters
COLUMNS = ("speaker", "etiology", "severity")  # of a corpus, by which experts are given
NAME = re.compile(r"(?!(shared|adapter|gate|enrolled|expert-[0-9]+)$)[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
SCALING = 2.0  # alpha / rank, of a model without adapters

Method = Literal["none", "choose", "gates", "expert", "neighbour", "shared"]
Terms = dict[str, AddedTerm]  # layer name → what is added to it


@dataclass(frozen=True, slots=True)
class AddedExpert:
    """Content of added.json.

    Attributes:
        name: name of the expert.
        column, value: column and value of the corpus whose utterances use it: `speaker` F07, `etiology` ataxia.
        method: `none` if no method was better than the unchanged model.
        rank: rank of its adapter; 0 without an adapter.
        weights: (number, weight) of the routed experts that it uses.
        start: for `neighbour`, the routed expert from which it was initialised.
        utterances, seconds: amount of speech used for training.
        wer_before, wer_after: estimates from cross-validation; None if nothing was held out.
        interval: 95% interval of the expected gain.
        parent: digest of the model that it was made for.
        version: version of moe-asr.
    """

    name: str
    column: str
    value: str
    method: Method
    rank: int
    weights: tuple[tuple[int, float], ...]
    start: int | None
    utterances: int
    seconds: float
    wer_before: float | None
    wer_after: float | None
    interval: tuple[float, float] | None
    parent: str
    version: str

    @property
    def gain(self) -> float | None:
        """Expected reduction of the word error rate."""
        if self.wer_before is None or self.wer_after is None:
            return None
        return self.wer_before - self.wer_after


def save_added(info: AddedExpert, terms: Terms, folder: Path, *, base_model: str) -> None:
    """Writes an added expert.

    Args:
        terms: terms of all layers.
        base_model: base model for PEFT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stacks = {name: term.stack for name, term in terms.items() if term.stack is not None}
    if stacks:
        matrices = {name: _on_cpu(stack.plain(0)) for name, stack in stacks.items()}
        first = next(iter(stacks.values()))
        save_adapter(matrices, folder, base_model=base_model, alpha=first.scaling * first.rank)
    magnitudes = {name: term.magnitude.detach().cpu() for name, term in terms.items() if term.magnitude is not None}
    if magnitudes:
        save_file(magnitudes, folder / MAGNITUDES)
    write_object(folder / ADDED, asdict(info))


def _on_cpu(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].detach().cpu(), pair[1].detach().cpu()


def read_added(folder: Path) -> AddedExpert:
    """The description of an added expert.

    Raises:
        DataError: the folder contains no added expert, or a damaged one.
    """
    path = folder / ADDED
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        AddedExpert(**values)
        info: AddedExpert = TypeAdapter(AddedExpert).validate_json(json.dumps(values), strict=True)
        numbers = (info.seconds, *(weight for _, weight in info.weights))
        if not NAME.fullmatch(info.name) or info.column not in COLUMNS:  # it becomes a folder's name
            raise ValueError(f"{info.name[:80]!r} or {info.column[:80]!r} is not a valid expert name or column")
        if info.rank < 0 or not all(map(math.isfinite, numbers)):
            raise ValueError("its rank, seconds or weights are not valid")
        return info
    except FileNotFoundError:
        raise DataError(f"{folder} contains no {ADDED}: it is not an added expert") from None
    except (OSError, ValueError, TypeError, ValidationError, RecursionError) as error:
        raise DataError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}") from None


def prepare(recogniser: Recogniser) -> None:
    """Inserts layers for added experts into a model without adapters (a plain Whisper, or a fully fine-tuned model)."""
    if recogniser.slot is None:
        recogniser.slot = add_mixture(
            recogniser.whisper, targets=TARGETS, num_experts=0, rank=1, alpha=SCALING, magnitude=False
        )


def new_stack(layer: MixtureLinear, rank: int) -> LoraStack:
    """A new adapter for a layer, with the layer's scaling, initialised to add nothing."""
    shape, scaling = (layer.base.in_features, layer.base.out_features), layer.routed.scaling
    return LoraStack(1, rank, *shape, scaling=scaling, magnitude=False, device=layer.base.weight.device)


def stack_of(layer: MixtureLinear, a_RI: Tensor, b_OR: Tensor) -> LoraStack:
    """An adapter for a layer with these weights, at the layer's scaling."""
    stack = new_stack(layer, len(a_RI))
    with torch.no_grad():
        stack.lora_A[0].copy_(a_RI)
        stack.lora_B[0].copy_(b_OR)
    return stack


@torch.no_grad()
def compressed(layer: MixtureLinear, term: AddedTerm, rank: int) -> AddedTerm:
    """A term as one adapter of lower rank: its largest singular directions, the closest there is (Eckart and Young)."""
    a_CI, b_OC = (factor.float() for factor in term.plain(layer))
    left_OC, upper_CC = torch.linalg.qr(b_OC)
    right_IC, other_CC = torch.linalg.qr(a_CI.transpose(0, 1))
    u_CC, values_C, v_CC = torch.linalg.svd(upper_CC @ other_CC.transpose(0, 1), full_matrices=False)
    root_R = values_C[:rank].sqrt()
    a_RI = root_R.unsqueeze(1) * (v_CC[:rank] @ right_IC.transpose(0, 1))
    return AddedTerm(stack=stack_of(layer, a_RI, left_OC @ u_CC[:, :rank] * root_R))


def append_terms(recogniser: Recogniser, terms: Terms) -> int:
    """Adds one expert to all layers; returns its number."""
    layers = dict(mixture_layers(recogniser.whisper))
    number = min(len(layer.added) for layer in layers.values())
    for name, layer in layers.items():
        layer.added.append(terms[name])
    return number


def remove_last(recogniser: Recogniser) -> None:
    """Removes the expert that was added last."""
    for _, layer in mixture_layers(recogniser.whisper):
        del layer.added[-1]


def attach(recogniser: Recogniser, folders: Sequence[Path]) -> tuple[AddedExpert, ...]:
    """Reads added experts into a model, in the given order.

    Raises:
        DataError: an expert is damaged or does not fit the model, or two experts have the same name.
    """
    experts: list[AddedExpert] = []
    for folder in folders:
        info = read_added(folder)
        if info.name in (expert.name for expert in experts):
            raise DataError(f"two added experts are named {info.name!r}: one of them is in {folder}")
        prepare(recogniser)
        append_terms(recogniser, load_terms(recogniser, info, folder))
        experts.append(info)
    return tuple(experts)


def load_terms(recogniser: Recogniser, info: AddedExpert, folder: Path) -> Terms:
    """The parts of an added expert for each layer.

    Raises:
        DataError: they do not fit the model.
    """
    layers = dict(mixture_layers(recogniser.whisper))
    adapter = adapter_matrices(folder) if (folder / WEIGHTS).is_file() else {}
    magnitudes = _read_magnitudes(folder / MAGNITUDES) if (folder / MAGNITUDES).is_file() else {}
    for part in (adapter, magnitudes):
        if part and part.keys() != layers.keys():
            odd = min(part.keys() ^ layers.keys())
            raise DataError(f"added expert {folder} does not fit its model: {odd} is in one of them only")
    if any(not 0 <= number < recogniser.num_experts for number, _ in info.weights):
        raise DataError(f"added expert {folder} uses routed experts that its model does not have")
    return {name: _load_term(layer, info, name, adapter, magnitudes, folder) for name, layer in layers.items()}


def _load_term(
    layer: MixtureLinear,
    info: AddedExpert,
    name: str,
    adapter: Matrices,
    magnitudes: Mapping[str, Tensor],
    folder: Path,
) -> AddedTerm:
    stack = None
    if adapter:
        a_RI, b_OR = adapter[name]
        if (len(b_OR), a_RI.shape[1]) != layer.base.weight.shape:
            raise DataError(f"added expert {folder} does not fit its model in {name}")
        stack = stack_of(layer, a_RI, b_OR)
    magnitude_1R = magnitudes.get(name)
    if magnitude_1R is not None:
        if layer.shared is None or magnitude_1R.shape != layer.shared.magnitude.shape:
            raise DataError(f"added expert {folder} has magnitudes of a shared expert, which its model lacks")
        magnitude_1R = magnitude_1R.to(layer.base.weight.device)
    return AddedTerm(weights=dict(info.weights), magnitude_1R=magnitude_1R, stack=stack)


def _read_magnitudes(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    check_weights(tensors, str(path))
    return tensors


def added_matrices(recogniser: Recogniser, number: int) -> Matrices:
    """The total delta of a row with an added expert, as one plain LoRA at the layers' scaling, which is exact.

    It consists of the shared expert (or a single, always active routed expert) and the added expert's own parts.
    """
    matrices: Matrices = {}
    for name, layer in mixture_layers(recogniser.whisper):
        term = layer.added[number]
        assert isinstance(term, AddedTerm)
        parts = [term.plain(layer)]
        if recogniser.num_experts == 1:
            parts.insert(0, layer.routed.plain(0))
        if layer.shared is not None:
            parts.insert(0, layer.shared.plain(0))
        a_CI, b_OC = torch.cat([a_RI for a_RI, _ in parts]), torch.cat([b_OR for _, b_OR in parts], 1)
        matrices[name] = a_CI.detach().cpu(), b_OC.detach().cpu()
    return matrices


def merge_added(recogniser: Recogniser, number: int) -> None:
    """Adds the total delta of a row with an added expert to the base weights, which gives a plain dense model."""
    matrices = added_matrices(recogniser, number)
    whisper = recogniser.whisper
    untie(whisper, [layer.base for _, layer in mixture_layers(whisper)])
    for name, layer in list(mixture_layers(whisper)):
        a_CI, b_OC = matrices[name]
        with torch.no_grad():
            layer.base.weight += layer.routed.scaling * (b_OC @ a_CI).to(layer.base.weight)
        replace_layer(whisper, name, layer.base)
