"""Cost and benefit of adding an expert, compared with tuning existing weights: rows for bench/results/extend.json.

    python -m bench.extend MODEL --new CORPUS --where etiology=island --others CORPUS --out bench/results/extend.json

Sides: the model as it is; the four ways of `moe-asr extend`; all adapter weights tuned on the new speech; the same with
replay of old speech; a fresh LoRA from Whisper. The enrolment is what `extend` would take of the new corpus, cut to
--utterances; the new speech's test utterances and the others' test utterances are decoded before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.data.batches import BatchLoader, epoch_batches, make_examples
from common.data.corpus import Corpus, Utterance, read_corpus
from common.data.subsets import TEST_SEED
from common.decoding.decode import Decoding
from common.evaluation.breakdown import score_of
from common.evaluation.evaluate import decode_corpus
from common.evaluation.wer import wer
from common.inference.load_model import OpenedModel, open_model
from common.model.added import AddedExpert, Terms, append_terms, prepare, remove_last, save_added
from common.model.mixture import add_mixture, mixture_layers
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.training.added import (
    BATCH,
    CHOOSING,
    Enrolment,
    candidate_losses,
    choose_weights,
    fit,
    steps_for,
    ways_for,
)
from common.training.rates import adapter_groups
from common.training.train import TrainOptions, train
from stages.extend.enrolment import enrolled, parse_where

DECODING = Decoding(batch_size=8, max_new_tokens=60)
TUNE_RATE, REPLAY = 3e-4, 3  # of all adapter weights; old utterances for each new one
FRESH_RATE, FRESH_RANK = 1e-3, 48


def open_fresh(arguments: argparse.Namespace) -> OpenedModel:
    """The model, read anew: tuning changes it."""
    torch.manual_seed(arguments.seed)
    return open_model(arguments.model, store=None, cache=Path(arguments.cache), device="cpu")


def error_rate(opened: OpenedModel, corpus: Corpus, utterances: Sequence[Utterance], voice: int = -1) -> float:
    """WER on some utterances, all of them with one added expert where `voice` says so."""
    rows = decode_corpus(replace(opened, voice=voice, added=()), corpus, utterances, DECODING)
    return wer([score_of(row) for row in rows])


def enrolment_of(opened: OpenedModel, corpus: Corpus, utterances: Sequence[Utterance], seed: int) -> Enrolment:
    """Utterances ready for `fit`, routed to the shared expert alone."""
    examples = make_examples(corpus, utterances, opened.codec, context=opened.context, margin=opened.margin)
    loader = BatchLoader(examples, num_workers=0, device=opened.accelerator.device)
    prepare(opened.recogniser)
    experts = opened.recogniser.num_experts
    own = (torch.zeros(len(examples), experts), torch.zeros(len(examples), dtype=torch.bool)) if experts > 1 else None
    return Enrolment(opened.recogniser, examples, loader, opened.accelerator, own, seed=seed)


def stored_bytes(terms: Terms) -> int:
    """Size of an added expert's files."""
    info = AddedExpert("x", "speaker", "x", "none", 0, (), None, 0, 0.0, None, None, None, "", "")
    with tempfile.TemporaryDirectory() as folder:
        save_added(info, terms, Path(folder), base_model="base")
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def tune(opened: OpenedModel, corpus: Corpus, utterances: Sequence[Utterance], old: Sequence[tuple[Corpus, Utterance]],
         rate: float, seed: int) -> int:  # fmt: skip
    """Trains all adapter weights on new and old utterances; returns their bytes."""
    pairs = [(corpus, u) for u in utterances] + list(old)
    examples = [
        make_examples(source, [u], opened.codec, context=opened.context, margin=opened.margin)[0] for source, u in pairs
    ]
    examples = [replace(example, row=row, id=f"{row}") for row, example in enumerate(examples)]
    loader = BatchLoader(examples, num_workers=0, device=opened.accelerator.device)
    recogniser, steps = opened.recogniser, steps_for(len(examples))
    experts = recogniser.num_experts
    if experts > 1:  # what a gate of old groups would say of new speech is no matter of this comparison
        recogniser.choose_by(
            logits_NE=torch.zeros(len(examples), experts), known_N=torch.zeros(len(examples), dtype=torch.bool)
        )
    recogniser.requires_grad_(False)
    for _, layer in mixture_layers(recogniser.whisper):
        for stack in (layer.shared, layer.routed):
            if stack is not None:
                stack.lora_A.requires_grad_(True)
                stack.lora_B.requires_grad_(True)
    groups = adapter_groups(recogniser, routed_rate=1.0, magnitude_rate=0.0, weight_decay=0.01)
    groups = [{**group, "rate": 1.0} for group in groups]
    per_epoch = len(epoch_batches(examples, batch_size=BATCH, seed=seed, epoch=0))
    epochs = math.ceil(steps / per_epoch)
    train(
        recogniser,
        accelerator=opened.accelerator,
        groups=groups,
        plan_epoch=lambda epoch: epoch_batches(examples, batch_size=BATCH, seed=seed, epoch=epoch),
        load=loader,
        evaluate=lambda model, full: {"loss": 0.0},
        options=TrainOptions(epochs, rate, max_steps=steps, patience=epochs + 1, select_from=1.0, quiet=True),
    )
    opened.accelerator.free_memory()
    size: int = 4 * sum(p.numel() for group in groups for p in group["params"])
    return size


def fresh_lora(opened: OpenedModel, arguments: argparse.Namespace) -> OpenedModel:
    """Whisper with a new adapter in place of the model's."""
    whisper = load_whisper(opened.base)
    targets = opened.info.targets if opened.info else ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    slot = add_mixture(whisper, targets=targets, num_experts=0, rank=FRESH_RANK, alpha=2 * FRESH_RANK,
                       shared_rank=FRESH_RANK)  # fmt: skip
    return replace(opened, recogniser=Recogniser(whisper, slot=slot).eval(), info=None)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each side."""
    column, value = parse_where(arguments.where)
    new, others = read_corpus(arguments.new), read_corpus(arguments.others)
    enrolment = random.Random(arguments.seed).sample(enrolled(new, column, value), arguments.utterances)
    new_test = [u for u in new.utterances if u.split == "test" and getattr(u, column) == value][: arguments.tested]
    others_test = [u for u in others.utterances if u.split == "test" and getattr(u, column) != value]
    others_test = random.Random(TEST_SEED).sample(others_test, min(arguments.others_tested, len(others_test)))
    opened = open_fresh(arguments)
    before = error_rate(opened, others, others_test)
    common = {"model": arguments.model_name, "utterances": arguments.utterances, "seed": arguments.seed,
              "others_before": before}  # fmt: skip
    rows = [common | {"way": "as it is", "new_wer": error_rate(opened, new, new_test), "others_after": before,
                      "seconds": 0.0, "bytes": 0}]  # fmt: skip
    show(rows[-1])
    data = enrolment_of(opened, new, enrolment, arguments.seed)
    for way in ways_for(opened.recogniser):
        started = time.monotonic()
        loss_NC = candidate_losses(data, data.all()[:CHOOSING]) if way in ("choose", "neighbour") else None
        terms = fit(data, way, data.all(), loss_NC, way)
        seconds = time.monotonic() - started
        number = append_terms(opened.recogniser, terms)
        rows.append(common | {"way": way, "new_wer": error_rate(opened, new, new_test, number),
                              "others_after": error_rate(opened, others, others_test), "seconds": round(seconds, 1),
                              "bytes": stored_bytes(terms)})  # fmt: skip
        remove_last(opened.recogniser)
        show(rows[-1])
    old = [u for u in others.utterances if u.split == "train"]
    replayed = random.Random(arguments.seed).sample(old, min(len(old), REPLAY * arguments.utterances))
    for way in arguments.tuned:
        opened = open_fresh(arguments)
        model = fresh_lora(opened, arguments) if way == "fresh" else opened
        started = time.monotonic()
        size = tune(model, new, enrolment, [(others, u) for u in replayed] if way == "replay" else [],
                    FRESH_RATE if way == "fresh" else TUNE_RATE, arguments.seed)  # fmt: skip
        seconds = time.monotonic() - started
        rows.append(common | {"way": way, "new_wer": error_rate(model, new, new_test),
                              "others_after": error_rate(model, others, others_test), "seconds": round(seconds, 1),
                              "bytes": size})  # fmt: skip
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """One row on the terminal."""
    print(json.dumps(row), flush=True)


def group_found(arguments: argparse.Namespace, column: str = "etiology") -> dict[str, Any]:
    """How often `choose` finds the group of a heard test speaker from five utterances; the model routes by a table."""
    opened, corpus = open_fresh(arguments), read_corpus(arguments.others)
    assert opened.info is not None and opened.info.groups, "give a model that routes by a table"
    by_speaker: dict[str, list[Utterance]] = {}
    for u in corpus.utterances:
        if u.split == "test" and getattr(u, column) in opened.info.groups:
            by_speaker.setdefault(u.speaker, []).append(u)
    right = total = 0
    for own in by_speaker.values():
        data = enrolment_of(opened, corpus, own[:5], arguments.seed)
        weights = choose_weights(candidate_losses(data, data.all()))
        best = max(weights, key=lambda expert: weights[expert], default=-1)
        right += best >= 0 and opened.info.groups[best] == getattr(own[0], column)
        total += 1
    return {"way": "group found by choose", "model": arguments.model_name, "right": right, "speakers": total}


def main() -> None:
    """Measures one model and seed, and appends the rows to a file."""
    parser = argparse.ArgumentParser("python -m bench.extend")
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("--model-name", default="model", help="what the rows call it")
    parser.add_argument("--new", help="corpus of the new speech")
    parser.add_argument("--where", default="etiology=island", help="the new group")
    parser.add_argument("--others", required=True, help="corpus of everybody else")
    parser.add_argument("--utterances", type=int, default=36, help="of the enrolment")
    parser.add_argument("--tested", type=int, default=72, help="new utterances that are scored")
    parser.add_argument("--others-tested", type=int, default=100, help="utterances of others that are scored")
    parser.add_argument("--tuned", nargs="*", default=["tuned", "replay", "fresh"], help="sides that change weights")
    parser.add_argument("--groups", action="store_true", help="measure instead how often choose finds the group")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", default=tempfile.gettempdir())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [group_found(arguments)] if arguments.groups else measure(arguments)
    if arguments.groups:
        show(rows[0])
    there = json.loads(arguments.out.read_text(encoding="utf-8"))["sides"] if arguments.out.is_file() else []
    arguments.out.write_text(json.dumps({"sides": [*there, *rows]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
