"""Cost and benefit of adding an expert, compared with tuning existing weights: rows for bench/results/extend.json.

    python -m bench.extend MODEL --new CORPUS --others CORPUS --utterances 5 10 20 36 200
    python -m bench.extend MODEL --others CORPUS --persons 10
    python -m bench.extend MODEL --others CORPUS --groups --utterances 5 10
    python -m bench.extend MODEL --new CORPUS --others CORPUS --where speaker=NAME --held-out 200 --utterances 200 1800
    python -m bench.extend                     computes the summary again

Sides: the model as it is; the methods of `moe-asr extend`; all adapter weights tuned on the new speech; the same with
replay of old speech; a fresh LoRA from Whisper; all weights of Whisper. The enrolment is drawn from the new group's
utterances in `--new`. The new group's and everybody else's test utterances are those of `--others`, decoded before and
after; with `--held-out`, the new group's are drawn from `--new` too. `--persons` enrols half of the utterances of
single test speakers, and scores the other half.

Sides are written as they are measured, with their word errors by utterance, and are not measured again; `summary` is
computed from them. `make generate` writes the tables of docs/extending.md.
"""

import argparse
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from bench.extend_results import EMPTY, add_row, add_side, summarise
from bench.results_file import RESULTS, read_results, tested_utterances, word_errors, write_results
from common.data.batches import BatchLoader, epoch_batches, make_examples
from common.data.corpus import Corpus, Utterance, read_corpus
from common.data.subsets import TEST_SEED
from common.decoding.decode import Decoding
from common.evaluation.breakdown import score_of
from common.evaluation.evaluate import decode_corpus
from common.evaluation.wer import Score, wer
from common.inference.load_model import OpenedModel, open_model
from common.json_files import Row
from common.model.added_experts import (
    TARGETS,
    AddedExpert,
    Terms,
    append_terms,
    prepare,
    remove_last,
    save_added,
)
from common.model.mixture import add_mixture, mixture_layers
from common.model.recogniser import Recogniser
from common.model.routing import Choice
from common.model.whisper import load_whisper
from common.storage import open_store
from common.training.added_experts import BATCH, WAYS, Candidates, Enrolment, fit, steps_for, ways_for
from common.training.train import TrainOptions, train
from stages.extend.choose import make_enrolment
from stages.extend.enrolment import parse_where

DECODING = Decoding(batch_size=8, max_new_tokens=60)
TUNE_RATE, REPLAY = 3e-4, 3  # of all adapter weights; old utterances for each new one
FRESH_RATE, FRESH_RANK, FULL_RATE = 1e-3, 48, 1e-4  # of models that start from Whisper
TUNED = ("tuned", "replay", "fresh", "full")  # sides that change weights
W = TypeVar("W", bound=str)


def open_fresh(arguments: argparse.Namespace) -> OpenedModel:
    """The model, read anew: tuning changes it."""
    torch.manual_seed(arguments.seed)
    store = open_store(arguments.store) if arguments.store else None
    return open_model(arguments.model, store=store, cache=Path(arguments.cache), device="cpu")


def scores_of(opened: OpenedModel, corpus: Corpus, utterances: Sequence[Utterance], voice: int = -1) -> list[Score]:
    """Scores of some utterances in their order, all of them with one added expert where `voice` says so."""
    rows = decode_corpus(replace(opened, voice=voice, added=()), corpus, utterances, DECODING)
    return [score_of(row) for row in rows]


def enrolment_of(opened: OpenedModel, corpus: Corpus, utterances: Sequence[Utterance], seed: int) -> Enrolment:
    """Utterances ready for `fit`, routed to the shared expert alone."""
    prepare(opened.recogniser)
    return make_enrolment(opened, corpus, utterances, lambda _: shared_alone(opened, len(utterances)), seed=seed)


def shared_alone(opened: OpenedModel, rows: int) -> Choice | None:
    """What a gate of old groups would say of new speech is no matter of this comparison."""
    experts = opened.recogniser.num_experts
    return (torch.zeros(rows, experts), torch.zeros(rows, dtype=torch.bool)) if experts > 1 else None


def stored_bytes(terms: Terms) -> int:
    """Size of an added expert's files."""
    info = AddedExpert("x", "speaker", "x", "none", 0, (), None, 0, 0.0, None, None, None, "", "")
    with tempfile.TemporaryDirectory() as folder:
        save_added(info, terms, Path(folder), base_model="base")
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def tune(opened: OpenedModel, corpus: Corpus, utterances: Sequence[Utterance], old: Sequence[tuple[Corpus, Utterance]],
         rate: float, seed: int) -> int:  # fmt: skip
    """Trains all adapter weights, or all weights of a model without adapters; returns their bytes."""
    pairs = [(corpus, u) for u in utterances] + list(old)
    examples = [
        make_examples(source, [u], opened.codec, context=opened.context, margin=opened.margin)[0] for source, u in pairs
    ]
    examples = [replace(example, row=row, id=f"{row}") for row, example in enumerate(examples)]
    loader = BatchLoader(examples, num_workers=0, device=opened.accelerator.device)
    recogniser, steps = opened.recogniser, steps_for(len(examples))
    if choice := shared_alone(opened, len(examples)):
        recogniser.choose_by(logits_NE=choice[0], known_N=choice[1])
    recogniser.requires_grad_(False)
    stacks = [
        s for _, layer in mixture_layers(recogniser.whisper) for s in (layer.shared, layer.routed) if s is not None
    ]
    adapters = [weight for stack in stacks for weight in (stack.lora_A, stack.lora_B)]
    weights = [weight.requires_grad_(True) for weight in adapters or recogniser.parameters()]
    per_epoch = len(epoch_batches(examples, batch_size=BATCH, seed=seed, epoch=0))
    epochs = math.ceil(steps / per_epoch)
    train(
        recogniser,
        accelerator=opened.accelerator,
        groups=[{"params": weights, "rate": 1.0, "weight_decay": 0.01}],
        plan_epoch=lambda epoch: epoch_batches(examples, batch_size=BATCH, seed=seed, epoch=epoch),
        load=loader,
        evaluate=lambda model, full: {"loss": 0.0},
        options=TrainOptions(epochs, rate, max_steps=steps, patience=epochs + 1, select_from=1.0, quiet=True),
    )
    opened.accelerator.free_memory()
    return 4 * sum(weight.numel() for weight in weights)


def from_whisper(opened: OpenedModel, way: str) -> OpenedModel:
    """Whisper with a new adapter in place of the model's (`fresh`), or as it is (`full`)."""
    whisper = load_whisper(opened.base)
    slot = None
    if way == "fresh":
        slot = add_mixture(whisper, targets=TARGETS, num_experts=0, rank=FRESH_RANK, alpha=2 * FRESH_RANK,
                           shared_rank=FRESH_RANK)  # fmt: skip
    return replace(opened, recogniser=Recogniser(whisper, slot=slot).eval(), info=None)


@dataclass
class Sides:
    """What all sides of a comparison share.

    Attributes:
        of: what tells the rows of this comparison from others.
        enrolment: utterances of `corpus` to learn from.
        tested: held-out utterances of the new speech, in `tested_in`.
        old: utterances of `others` by everybody else, which are decoded before and after.
    """

    arguments: argparse.Namespace
    of: Row
    corpus: Corpus
    enrolment: Sequence[Utterance]
    others: Corpus
    tested_in: Corpus
    tested: Sequence[Utterance]
    old: Sequence[Utterance]
    old_before: float

    def write(self, way: str, scores: Sequence[Score], others_after: float, seconds: float, size: int) -> None:
        """Appends one side to the results."""
        row = self.of | {"way": way, "new_wer": wer(scores), "others_before": self.old_before}
        row |= {"others_after": others_after, "seconds": round(seconds, 1), "bytes": size}
        tested = tested_utterances(scores, speakers=[u.speaker for u in self.tested])
        add_side(self.arguments.out, row | {"errors": word_errors(scores)}, tested)

    def missing(self, ways: Sequence[W]) -> list[W]:
        """The wanted ways that are not measured yet."""
        sides = read_results(self.arguments.out, EMPTY)["sides"]
        there = {row["way"] for row in sides if self.of.items() <= row.items()}
        return [way for way in ways if way not in there and way in self.arguments.sides]

    def measure_frozen(self) -> None:
        """The model as it is, and the ways that leave it as it is."""
        opened = open_fresh(self.arguments)
        if self.missing(["as it is"]):
            self.write("as it is", scores_of(opened, self.tested_in, self.tested), self.old_before, 0.0, 0)
        data = enrolment_of(opened, self.corpus, self.enrolment, self.arguments.seed)
        for way in self.missing(ways_for(opened.recogniser)):
            started = time.monotonic()
            terms = fit(data, way, data.all(), Candidates(data), way)
            seconds = time.monotonic() - started
            number = append_terms(opened.recogniser, terms)
            new = scores_of(opened, self.tested_in, self.tested, number)
            after = wer(scores_of(opened, self.others, self.old))
            self.write(way, new, after, seconds, stored_bytes(terms))
            remove_last(opened.recogniser)

    def replayed(self) -> list[tuple[Corpus, Utterance]]:
        """Old utterances of train, `REPLAY` for each new one."""
        old = self.others.split("train")
        chosen = random.Random(self.arguments.seed).sample(old, min(len(old), REPLAY * len(self.enrolment)))
        return [(self.others, u) for u in chosen]

    def measure_tuned(self) -> None:
        """The sides that change weights."""
        for way in self.missing(TUNED):
            opened = open_fresh(self.arguments)
            model = from_whisper(opened, way) if way in ("fresh", "full") else opened
            old = self.replayed() if way == "replay" else []
            rate = {"fresh": FRESH_RATE, "full": FULL_RATE}.get(way, TUNE_RATE)
            started = time.monotonic()
            size = tune(model, self.corpus, self.enrolment, old, rate, self.arguments.seed)
            seconds = time.monotonic() - started
            after = wer(scores_of(model, self.others, self.old))
            self.write(way, scores_of(model, self.tested_in, self.tested), after, seconds, size)


def measure_group(arguments: argparse.Namespace) -> None:
    """A group or a person that training never heard, by number of utterances."""
    column, value = parse_where(arguments.where)
    new, others = read_corpus(arguments.new), read_corpus(arguments.others)
    tests = others.split("test")
    tested = [u for u in tests if getattr(u, column) == value]
    old = [u for u in tests if getattr(u, column) != value]
    old = random.Random(TEST_SEED).sample(old, min(len(old), arguments.others_tested))
    pool, tested_in = [u for u in new.utterances if getattr(u, column) == value], others
    if arguments.held_out:
        tested, tested_in = random.Random(TEST_SEED).sample(pool, arguments.held_out), new
        texts = {u.text for u in tested}
        pool = [u for u in pool if u.text not in texts]
    before = wer(scores_of(open_fresh(arguments), others, old))
    for count in arguments.utterances:
        enrolment = random.Random(arguments.seed).sample(pool, count)
        name = f"{value} alone" if arguments.held_out else value  # tested on utterances of another corpus
        of = {"model": arguments.model_name, "new": name, "utterances": count, "seed": arguments.seed}
        sides = Sides(arguments, of, new, enrolment, others, tested_in, tested, old, before)
        sides.measure_frozen()
        sides.measure_tuned()


def test_speakers(corpus: Corpus) -> dict[str, list[Utterance]]:
    """speaker → utterances of test."""
    by_speaker: dict[str, list[Utterance]] = {}
    for u in corpus.split("test"):
        by_speaker.setdefault(u.speaker, []).append(u)
    return by_speaker


def measure_persons(arguments: argparse.Namespace) -> None:
    """Single test speakers, as many of the unseen group as of others."""
    column, value = parse_where(arguments.where)
    others = read_corpus(arguments.others)
    by_speaker = test_speakers(others)
    shuffled = random.Random(TEST_SEED).sample(sorted(by_speaker), len(by_speaker))
    unseen = [s for s in shuffled if getattr(by_speaker[s][0], column) == value][: arguments.persons // 2]
    seen = [s for s in shuffled if getattr(by_speaker[s][0], column) != value][: arguments.persons - len(unseen)]
    old = [u for s in shuffled if s not in (*seen, *unseen) for u in by_speaker[s]
           if getattr(u, column) != value]  # fmt: skip
    old = random.Random(TEST_SEED).sample(old, min(len(old), arguments.others_tested))
    before = wer(scores_of(open_fresh(arguments), others, old))
    for speaker in (*unseen, *seen):
        own = by_speaker[speaker]
        half = len(own) // 2
        kind = "a person of the unseen group" if speaker in unseen else "a person of a trained group"
        of = {"model": arguments.model_name, "new": kind, "speaker": speaker, "utterances": half,
              "seed": arguments.seed}  # fmt: skip
        sides = Sides(arguments, of, others, own[:half], others, others, own[half:], old, before)
        sides.measure_frozen()
        sides.measure_tuned()


def group_found(arguments: argparse.Namespace, count: int) -> Row:
    """How often `choose` finds the group of a heard test speaker; the model has one expert for each group."""
    opened, corpus = open_fresh(arguments), read_corpus(arguments.others)
    assert opened.info is not None
    groups = opened.info.groups or tuple(sorted({u.etiology for u in corpus.split("train")}))
    assert len(groups) == opened.info.num_experts
    by_speaker = {s: own for s, own in test_speakers(corpus).items() if own[0].etiology in groups}
    confused = []
    for own in by_speaker.values():
        data = enrolment_of(opened, corpus, own[:count], arguments.seed)
        weights, group = Candidates(data).weights(data.all()), own[0].etiology
        heaviest = groups[max(weights, key=lambda expert: weights[expert])] if weights else "no group"
        if heaviest != group:
            confused.append(f"{group} as {heaviest}")
    return {"model": arguments.model_name, "utterances": count, "seed": arguments.seed,
            "right": len(by_speaker) - len(confused), "speakers": len(by_speaker), "confused": confused}  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Measures one model and seed, and adds the rows to a file."""
    parser = argparse.ArgumentParser("python -m bench.extend")
    parser.add_argument("model", nargs="?", help="name of a run in the store, or folder of a trained model")
    parser.add_argument("--store", help="store of the run")
    parser.add_argument("--model-name", default="model", help="what the rows call it")
    parser.add_argument("--new", help="corpus from which the new group is enrolled, of whatever split")
    parser.add_argument("--where", default="etiology=island", help="the new group")
    parser.add_argument("--others", help="corpus of everybody else, and of the new group's test utterances")
    parser.add_argument("--utterances", type=int, nargs="+", default=[36], help="of the enrolment")
    parser.add_argument("--others-tested", type=int, default=60, help="utterances of others that are scored")
    parser.add_argument("--held-out", type=int, help="utterances of --new to score in place of those of --others")
    parser.add_argument("--sides", nargs="+", default=["as it is", *WAYS, *TUNED[:3]], help="sides to measure")
    parser.add_argument("--persons", type=int, help="measure single test speakers instead")
    parser.add_argument("--groups", action="store_true", help="measure instead how often choose finds the group")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", default=tempfile.gettempdir())
    parser.add_argument("--out", type=Path, default=RESULTS / "extend.json")
    arguments = parser.parse_args(words)
    if arguments.model is None:
        results = read_results(arguments.out, EMPTY)
        write_results(arguments.out, results | {"summary": summarise(results)})
    elif arguments.groups:
        for count in arguments.utterances:
            found = group_found(arguments, count)
            add_row(arguments.out, read_results(arguments.out, EMPTY), "groups", found)
    elif arguments.persons:
        measure_persons(arguments)
    else:
        measure_group(arguments)


if __name__ == "__main__":
    main()
