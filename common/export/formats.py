"""Trained models in the formats of other tools: PEFT, a merged Hugging Face checkpoint, CTranslate2, vLLM.

A mixture chooses its experts for each utterance; a dense model cannot. A merged model therefore has one fixed routing,
which the caller gives. Exported adapters keep the choice: the serving program applies the gate.

Shape letters: E experts, R rank, M mel bands, F mel frames, U tokens, V vocabulary.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from common.data.tokens import TextCodec
from common.errors import DataError, UsageError
from common.export.readmes import peft_page, vllm_page
from common.inference.load_model import OpenedModel
from common.json_files import read_object, write_object
from common.model.adapters import Matrices, expert_matrices, merge_experts, save_adapter
from common.model.added_experts import SCALING, TARGETS, added_matrices, merge_added
from common.model.bundle import BundleInfo, save_gate
from common.model.recogniser import Recogniser
from common.model.routing import Routing, route_to
from common.model.whisper import encode, load_whisper

MARK = "export.json"  # in every folder made here: what it is, and that it may be replaced
# Files of a checkpoint other than its weights; copied from the base.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that its --max-lora-rank takes
TOLERANCE = 1e-3  # of the largest logit: how far a merged model may be from the mixture it was
PROBE_FRAMES = 400  # of noise on which both are compared


def fixed_routing(
    info: BundleInfo | None,
    folder: Path,
    *,
    expert: int | None = None,
    weights: Sequence[float] | None = None,
    mean: bool = False,
) -> dict[int, float]:
    """The weight of each routed expert in a merged model, in addition to the shared expert; empty without experts.

    Args:
        info: description of the trained model; None for a plain Whisper.
        folder: folder of the trained model, whose report.json contains the mean routing.
        expert: number of a single expert.
        weights: weight of each expert, summing to 1.
        mean: use the mean routing weights over the test set, which sum to the share of utterances with routed experts.

    Raises:
        UsageError: the model is a mixture and none or several of the three are given, or they do not fit it.
        DataError: the mean routing is not known.
    """
    count = info.num_experts if info and info.adapt != "full" else 0
    options = {"--expert": expert is not None, "--weights": weights is not None, "--routing mean": mean}
    wishes = [name for name, given in options.items() if given]
    if len(wishes) > 1:
        raise UsageError(f"{' and '.join(wishes)}: give one of them")
    if wishes and count < 2:
        raise UsageError(f"{wishes[0]}: {folder} has no experts to choose from; omit it")
    if not wishes and count > 1:
        raise UsageError(
            f"{folder} is a mixture of {count} experts, and merging is exact for one fixed routing only: "
            "choose it with --expert, --weights or --routing mean, or export the adapters with --to peft"
        )
    if expert is not None and not 0 <= expert < count:
        raise UsageError(f"--expert {expert}: {folder} has experts 0 to {count - 1}")
    if weights is not None and (len(weights) != count or abs(sum(weights) - 1) > 1e-3):
        raise UsageError(f"--weights {','.join(map(str, weights))}: give {count} numbers that sum to 1, one per expert")
    if expert is not None:
        routing = {expert: 1.0}
    elif weights is not None:
        routing = dict(enumerate(weights))
    elif mean:
        routing = dict(enumerate(_mean_routing(folder, count)))
    else:
        routing = dict.fromkeys(range(count), 1.0)  # of the only one, if there is one
    return {number: weight for number, weight in routing.items() if weight}


def _mean_routing(folder: Path, count: int) -> list[float]:
    """Mean weight of each routed expert; utterances that used the shared expert alone count as 0."""
    try:
        report = read_object(folder / "report.json")
        load, routed = report["load"], 1 - report["abstained"]
    except (DataError, KeyError):
        raise DataError(f"--routing mean: {folder} has no report.json with the experts' load; give --weights") from None
    assert len(load) == count
    return [routed * share for share in load]


def export_model(
    opened: OpenedModel,
    target: str,
    folder: Path,
    *,
    routing: Mapping[int, float],
    base_name: str | None = None,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Writes a model and export.json into an empty folder as `peft`, `merged`, `ctranslate2` or `vllm`.

    Args:
        opened: on the CPU in fp32; not to be used afterwards.
        routing: result of `fixed_routing`, for a merged model.
        base_name: name of the base in the adapters' files; the name recorded in the model if None.
        quantization: quantization of CTranslate2.

    Returns:
        The object of export.json.
    """
    said: dict[str, Any] = {"format": target, "model": opened.name}
    base_name = base_name or (opened.info.base if opened.info else str(opened.base))
    said["audio"] = {"context": opened.context, "margin": opened.margin}
    if opened.voice >= 0:
        said["added"] = opened.added[opened.voice].name
    if target == "peft":
        said |= export_peft(opened, folder, base_name)
    elif target == "vllm":
        said |= export_vllm(opened, folder, base_name)
    else:
        dense = folder if target == "merged" else folder / "merged"
        said |= {"routing": dict(routing)} | export_merged(opened, routing, dense)
        if target == "ctranslate2":
            export_ctranslate2(dense, folder / "converted", quantization)
            shutil.rmtree(dense)
            for path in (folder / "converted").iterdir():
                path.replace(folder / path.name)
            (folder / "converted").rmdir()
    write_object(folder / MARK, said)
    return said


def export_merged(opened: OpenedModel, routing: Mapping[int, float], folder: Path) -> dict[str, Any]:
    """Writes a dense Hugging Face checkpoint with the experts of `routing` in its weights; `opened` becomes dense.

    Returns:
        Largest difference between the logits of the written model and those of the mixture at this routing, on noise.

    Raises:
        DataError: the logits differ, so that the merged model would give other texts.
    """
    recogniser = opened.recogniser
    expected_UV = probe(recogniser, opened.codec, routing, opened.voice)
    if opened.voice >= 0:
        merge_added(recogniser, opened.voice)
    else:
        merge_experts(recogniser.whisper, routing)
    recogniser.whisper.save_pretrained(folder)
    for name in COMPANIONS:
        if (opened.base / name).is_file():
            shutil.copyfile(opened.base / name, folder / name)
    found_UV = probe(Recogniser(load_whisper(folder)), opened.codec, {})
    difference, largest = float((found_UV - expected_UV).abs().max()), float(expected_UV.abs().max())
    if not difference <= TOLERANCE * largest:
        raise DataError(
            f"merged {opened.name} differs from its mixture: by {difference:.3g} in logits up to {largest:.3g}"
        )
    return {"largest_logit_difference": difference, "largest_logit": largest}


@torch.inference_mode()
def probe(recogniser: Recogniser, codec: TextCodec, routing: Mapping[int, float], voice: int = -1) -> Tensor:
    """logits_UV of a few tokens for noise as audio, at a fixed routing, to compare the computation of two models.

    Args:
        voice: number of an added expert to use instead of routed experts; -1 for none.
    """
    whisper = recogniser.whisper
    generator = torch.Generator().manual_seed(0)
    mel_1MF = torch.randn(1, recogniser.mel_bands, PROBE_FRAMES, generator=generator)
    tokens_U = [*codec.prompt, *torch.randint(codec.end, (12,), generator=generator).tolist()]
    if recogniser.slot is not None:
        ids_1K = torch.tensor([list(routing)], dtype=torch.int64)
        recogniser.slot.routing = Routing(ids_1K, torch.tensor([list(routing.values())]))
        if voice >= 0:
            only = 0 if recogniser.num_experts == 1 else None
            added = ((voice, torch.tensor([0])),)
            recogniser.slot.routing = replace(route_to(only, 1, torch.device("cpu")), added=added)
    hidden_1TD = encode(whisper, mel_1MF)
    decoded_1UD = whisper.model.decoder(input_ids=torch.tensor([tokens_U]), encoder_hidden_states=hidden_1TD)
    logits_1UV: Tensor = whisper.proj_out(decoded_1UD.last_hidden_state)
    return logits_1UV[0]


def export_ctranslate2(merged: Path, folder: Path, quantization: str | None) -> None:
    """Turns a Hugging Face checkpoint into CTranslate2's format, by its own converter.

    Args:
        folder: folder to make; the converter requires that it does not exist.
        quantization: `int8`, `float16` …, by CTranslate2's names; that of the checkpoint if None.

    Raises:
        UsageError: ctranslate2 is not installed.
        DataError: the converter refuses the checkpoint.
    """
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        raise UsageError("--to ctranslate2 needs the ctranslate2 package: pip install 'moe-asr[export]'") from None
    extra = [name for name in ("tokenizer.json", "preprocessor_config.json") if (merged / name).is_file()]
    try:
        TransformersConverter(str(merged), copy_files=extra).convert(str(folder), quantization=quantization)
    except (ValueError, OSError) as error:
        raise DataError(f"ctranslate2 cannot convert {merged}: {' '.join(str(error).split())}") from None


def adapters_of(opened: OpenedModel) -> dict[str, Matrices]:
    """Matrices of each adapter by name; each routed expert is concatenated with the shared expert.

    Returns:
        `shared`, if there is a shared expert, for utterances that are far from all groups; `expert-0`, `expert-1`, …;
        only `adapter` for a dense model. Added experts follow under their own names.

    Raises:
        UsageError: the model has no experts, or experts were added to a base that is not a plain Whisper.
    """
    info, whisper = opened.info, opened.recogniser.whisper
    added = {expert.name: added_matrices(opened.recogniser, n) for n, expert in enumerate(opened.added)}
    if info is None and added and opened.folder == opened.base:
        return added
    if info is None or info.adapt == "full":
        raise UsageError(f"{opened.name} has no LoRA experts: export it with --to merged or --to ctranslate2")
    experts = {f"expert-{number}": expert_matrices(whisper, number) for number in range(info.num_experts)}
    if not info.shared_rank:
        return experts | added
    shared = expert_matrices(whisper, None)
    if not experts:
        return {"adapter": shared} | added
    return {"shared": shared} | {name: _beside(shared, expert) for name, expert in experts.items()} | added


def _beside(shared: Matrices, expert: Matrices) -> Matrices:
    """Both adapters as one adapter whose rank is the sum of their ranks; it equals exactly their sum."""
    return {
        name: (torch.cat([shared[name][0], a_RI]), torch.cat([shared[name][1], b_OR], 1))
        for name, (a_RI, b_OR) in expert.items()
    }


def export_adapters(opened: OpenedModel, folder: Path, base_name: str) -> dict[str, Any]:
    """Writes `shared`, `expert-0`, `expert-1`, … as PEFT adapters, and the gate.

    Returns:
        The content of routing.json: the adapters of the gate's outputs in order, and the input of the gate.
    """
    adapters = adapters_of(opened)
    info = opened.info or _plain_info(opened)
    ranks = {name: len(next(iter(matrices.values()))[0]) for name, matrices in adapters.items()}
    for name, matrices in adapters.items():
        save_adapter(matrices, folder / name, base_model=base_name, alpha=info.alpha / info.rank * ranks[name])
    added = {expert.name: {"column": expert.column, "value": expert.value} for expert in opened.added}
    names = [name for name in adapters if name != "shared" and name not in added] or list(adapters)
    rank = max(ranks.values())
    if opened.recogniser.gate is not None:
        save_gate(opened.recogniser.gate, folder / "gate")
    table = {
        "base": base_name,
        "adapters": names,
        "shared": "shared" if "shared" in adapters else None,
        "added": added,
        "gate": info.gate,
        "route_by": info.route_by,
        "column": info.column,
        "groups": list(info.groups),
        "rank": rank,
        "mixture": info.mixture,
        "top_k": min(info.top_k, len(names)) if info.mixture == "blend" else 1,
        "embedding": {"layer": info.layer, "pooling": info.pooling},
        "audio": {"context": info.context, "margin": info.margin},
        "language": info.language,
        "task": info.task,
        "multilingual": len(opened.codec.prompt) > 2,
        "encoder_adapted": any(".encoder." in name for name in adapters[names[0]]),
    }
    write_object(folder / "routing.json", table)
    return table


def _plain_info(opened: OpenedModel) -> BundleInfo:
    """The description, as in a bundle, of a plain Whisper to which experts were added."""
    return BundleInfo(
        base=str(opened.base),
        base_digest="",
        language=opened.spoken,
        task=cast(Literal["transcribe", "translate"], opened.task),
        context=opened.context,
        margin=opened.margin,
        layer=-1,
        pooling="mean",
        adapt="lora",
        num_experts=0,
        gate=False,
        shared_rank=0,
        mixture="blend",
        top_k=1,
        rank=1,
        alpha=SCALING,
        targets=TARGETS,
        within="",
    )


def export_peft(opened: OpenedModel, folder: Path, base_name: str) -> dict[str, Any]:
    """Writes one PEFT adapter per expert, the gate, and a README with code to load them."""
    table = export_adapters(opened, folder, base_name)
    (folder / "README.md").write_text(peft_page(table), encoding="utf-8")
    return {"adapters": table["adapters"]}


def export_vllm(opened: OpenedModel, folder: Path, base_name: str) -> dict[str, Any]:
    """Writes the same files for vLLM's multi-LoRA serving, with a README that contains vLLM's serve command.

    Raises:
        UsageError: the adapters' rank exceeds vLLM's maximum.
    """
    table = export_adapters(opened, folder, base_name)
    fitting = [rank for rank in VLLM_RANKS if rank >= table["rank"]]
    if not fitting:
        raise UsageError(f"{opened.name} has adapters of rank {table['rank']}; vLLM takes at most {VLLM_RANKS[-1]}")
    (folder / "README.md").write_text(vllm_page(table, fitting[0]), encoding="utf-8")
    return {"adapters": table["adapters"], "max_lora_rank": fitting[0]}
