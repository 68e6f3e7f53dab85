"""Training of an expert for a new speaker or group from few utterances, without changing the model.

Shape letters: B utterances of a batch, N of the enrolment, E routed experts, C = E + 1 candidates: every routed expert
with the shared expert, and the shared expert alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.data.batches import Batch, BatchLoader, Example, epoch_batches
from common.model.added_experts import Method, Terms, append_terms, compressed, new_stack, remove_last, stack_of
from common.model.mixture import AddedTerm, MixtureLinear, mixture_layers
from common.model.recogniser import Recogniser
from common.model.routing import NEVER, Choice
from common.storage.checkpoint import Checkpointer
from common.training.train import TrainOptions, train

WAYS: tuple[Method, ...] = ("choose", "gates", "expert", "neighbour", "shared")  # the simplest first
# Rates, steps and ranks were measured: docs/extending.md.
RATES: Mapping[Method, float] = {"gates": 1e-1, "expert": 1e-3, "neighbour": 1e-3, "shared": 3e-4}
BATCH = 4  # utterances of a step
STEPS = ((13, 10), (36, 27), (200, 250), (1200, 1500))  # (utterances, steps), by trials with 10, 36 and 200 utterances
RANKS = ((0, 8), (400, 16), (1500, 32))  # utterances from which an expert has a rank
CHANGE_RANK = 11  # at least, of the change to the shared expert: under 2% of the size of tiny.en
FEW = 20  # utterances up to which `neighbour` can be better than `shared`
LEAST_WEIGHT = 0.05  # of a routed expert that is chosen
CLEARLY = 2.0  # standard errors by which a method has to be worse to be given up
JUDGED_FROM = 8  # utterances on which a method has to be worse
ENOUGH_GROUPS = 4  # speakers or sessions that an error is computed over; of fewer, the utterances count
CHOOSING = 10  # utterances that `choose` uses at most; they tell even alike groups apart (docs/extending.md)
GATE_WEIGHT = 0.5  # of its log-probabilities beside log-likelihoods: a speaker's utterances are not independent


@dataclass(frozen=True)
class Enrolment:
    """Utterances with text, and the model to which an expert is added.

    Attributes:
        recogniser: prepared for added experts (`prepare`) and frozen by `fit`; its added experts, if any, are not used.
        examples: their rows are 0 … N-1.
        loader: loader of the examples.
        own: routing of the examples by the unchanged model; None if the model has no routing.
        log_prob_NE: log-probability of each expert's group by the gate, plus log E so that a uniform guess is 0; None
            without a gate.
        checkpointer: opens the checkpoints of one training, by its name.
        stopping: asked at every step.
    """

    recogniser: Recogniser
    examples: Sequence[Example]
    loader: BatchLoader
    accelerator: Accelerator
    own: Choice | None
    log_prob_NE: np.ndarray | None = None
    seed: int = 0
    checkpointer: Callable[[str], Checkpointer | None] = lambda name: None
    stopping: Callable[[], bool] = lambda: False
    quiet: bool = True

    def route_own(self) -> None:
        """Sets the routing of the utterances to that of the model without an added expert."""
        logits_NE, known_N = self.own or (None, None)
        self.recogniser.choose_by(logits_NE=logits_NE, known_N=known_N)

    def route_to(self, number: int) -> None:
        """Sets the routing of all utterances to an added expert."""
        logits_NE, _ = self.own or (None, None)
        added_N = torch.full((len(self.examples),), number)
        self.recogniser.choose_by(logits_NE=logits_NE, added_N=added_N)

    @contextmanager
    def using(self, terms: Terms) -> Iterator[None]:
        """Routes all utterances to an expert while the block runs."""
        self.route_to(append_terms(self.recogniser, terms))
        try:
            yield
        finally:
            remove_last(self.recogniser)
            self.route_own()

    def all(self) -> list[int]:
        """Numbers of all utterances."""
        return list(range(len(self.examples)))


def steps_for(utterances: int) -> int:
    """Optimiser steps of a training, interpolated between the points of `STEPS`."""
    counts, steps = zip(*STEPS, strict=True)
    return round(float(np.interp(utterances, counts, steps)))


def rank_for(utterances: int) -> int:
    """Rank of an expert."""
    return max(rank for fewest, rank in RANKS if utterances >= fewest)


def ways_for(recogniser: Recogniser) -> list[Method]:
    """The methods that a model allows, the simplest first.

    `gates` and `shared` require a shared expert; `choose` and `neighbour` require several routed experts.
    """
    layer = next((layer for _, layer in mixture_layers(recogniser.whisper)), None)
    several = recogniser.num_experts > 1
    shared = layer is not None and layer.shared is not None
    allowed = {"choose": several, "gates": shared, "neighbour": several, "shared": shared}
    return [way for way in WAYS if allowed.get(way, True)]


def ways_to_try(allowed: Sequence[Method], utterances: int) -> list[Method]:
    """The methods that are compared: with a shared expert, without those that `shared` was measured to replace."""
    replaced = {"expert", *(["neighbour"] if utterances > FEW else [])} if "shared" in allowed else set()
    return [way for way in allowed if way not in replaced]


def losses(enrolment: Enrolment, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(summed cross-entropy, tokens) of utterances, with the current routing of the model."""
    loss_N, tokens_N = np.zeros(len(enrolment.examples)), np.zeros(len(enrolment.examples))
    for batch in _batches(enrolment, numbers):
        loss_B, count_B = enrolment.recogniser.utterance_losses(batch)
        rows_B = batch.row_B.tolist()
        loss_N[rows_B], tokens_N[rows_B] = loss_B.float().cpu().numpy(), count_B.cpu().numpy()
    return loss_N[list(numbers)], tokens_N[list(numbers)]


def _batches(enrolment: Enrolment, numbers: Sequence[int]) -> Iterator[Batch]:
    enrolment.recogniser.eval()
    examples = [enrolment.examples[number] for number in numbers]
    batches = epoch_batches(examples, batch_size=BATCH, shuffle=False)
    with torch.inference_mode(), enrolment.accelerator.autocast():
        yield from enrolment.loader([[numbers[i] for i in batch] for batch in batches])


def candidate_losses(enrolment: Enrolment, numbers: Sequence[int]) -> np.ndarray:
    """loss_NC: cross-entropy of texts with each routed expert and the shared expert, less the weighted log-probability
    of the expert's group by the gate; and with the shared expert alone.
    """
    experts, size = enrolment.recogniser.num_experts, len(enrolment.examples)
    columns = []
    for candidate in range(experts + 1):
        logits_NE = torch.full((size, experts), NEVER)
        logits_NE[:, min(candidate, experts - 1)] = 0.0
        enrolment.recogniser.choose_by(logits_NE=logits_NE, known_N=torch.full((size,), candidate < experts))
        columns.append(losses(enrolment, numbers)[0])
    enrolment.route_own()
    loss_NC = np.stack(columns, 1)
    if enrolment.log_prob_NE is not None:
        loss_NC[:, :-1] -= GATE_WEIGHT * enrolment.log_prob_NE[list(numbers)]
    return loss_NC


def choose_weights(loss_NC: np.ndarray) -> dict[int, float]:
    """Weights of routed experts by texts and gate: the posterior of a uniform prior over C candidates.

    The weight of the shared expert alone is not assigned to any routed expert; small weights are omitted.
    """
    total_C = loss_NC.sum(0)
    share_C = np.exp(total_C.min() - total_C)
    share_C /= share_C.sum()
    share_C[share_C < LEAST_WEIGHT] = 0
    share_C /= share_C.sum()
    return {expert: float(share) for expert, share in enumerate(share_C[:-1]) if share > 0}


@dataclass(frozen=True)
class Candidates:
    """`candidate_losses` of the utterances of an enrolment, measured once, and only of those that a choice uses."""

    enrolment: Enrolment
    measured: dict[int, np.ndarray] = field(default_factory=dict)

    def losses(self, numbers: Sequence[int]) -> np.ndarray:
        """loss_NC of some of these utterances: of `CHOOSING`, spread over all of them, or of all if they are fewer."""
        places = np.linspace(0, len(numbers) - 1, min(CHOOSING, len(numbers))).round().astype(int)
        used = [numbers[place] for place in places]
        if missing := [number for number in used if number not in self.measured]:
            self.measured.update(zip(missing, candidate_losses(self.enrolment, missing), strict=True))
        return np.stack([self.measured[number] for number in used])

    def weights(self, numbers: Sequence[int]) -> dict[int, float]:
        """`choose_weights` by the texts of these utterances."""
        return choose_weights(self.losses(numbers))

    def best(self, numbers: Sequence[int]) -> int:
        """The routed expert under which the texts of these utterances are most likely."""
        return int(self.losses(numbers)[:, :-1].sum(0).argmin())


def fit(enrolment: Enrolment, way: Method, numbers: Sequence[int], candidates: Candidates, name: str) -> Terms:
    """An expert fitted on some of the utterances.

    Args:
        numbers: numbers of these utterances.
        candidates: of the same enrolment, for `choose` and `neighbour`.
        name: name of the training, for its checkpoints and progress bar.

    Raises:
        Preempted: the process received a signal to stop; a checkpoint is written.
    """
    recogniser = enrolment.recogniser
    recogniser.requires_grad_(False)
    if way == "choose":
        weights = candidates.weights(numbers)
        return {layer_name: AddedTerm(weights=weights) for layer_name, _ in mixture_layers(recogniser.whisper)}
    torch.manual_seed(enrolment.seed)
    start = candidates.best(numbers) if way == "neighbour" else None
    rank = rank_for(len(numbers))
    terms = {layer_name: _new_term(layer, way, rank, start) for layer_name, layer in mixture_layers(recogniser.whisper)}
    _train(enrolment, terms, way, numbers, name)
    if way == "shared":
        layers, rank = mixture_layers(recogniser.whisper), max(CHANGE_RANK, rank)
        terms = {layer_name: compressed(layer, terms[layer_name], rank) for layer_name, layer in layers}
    return terms


def _new_term(layer: MixtureLinear, way: Method, rank: int, start: int | None) -> AddedTerm:
    if way == "gates":
        assert layer.shared is not None
        return AddedTerm(magnitude_1R=torch.zeros_like(layer.shared.magnitude))
    if way == "shared":  # a copy of the shared expert in its place, which is trained: the term is the change alone
        assert layer.shared is not None
        term = AddedTerm(magnitude_1R=-torch.ones_like(layer.shared.magnitude)).requires_grad_(False)
        term.stack = stack_of(layer, *layer.shared.plain(0))
        return term
    if start is None:
        return AddedTerm(stack=new_stack(layer, rank))
    return AddedTerm(stack=stack_of(layer, *layer.routed.plain(start)))


class _Training(nn.Module):
    """The loss of a batch whose rows all use the added expert."""

    def __init__(self, recogniser: Recogniser) -> None:
        super().__init__()
        self.recogniser = recogniser

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss_B, _ = self.recogniser.utterance_losses(batch)
        loss = loss_B.sum()
        return loss, {"ce": loss.detach()}


def _train(enrolment: Enrolment, terms: Terms, way: Method, numbers: Sequence[int], name: str) -> None:
    """Trains an expert's parameters; the weights after the last step are used, without selection."""
    examples, steps = [enrolment.examples[number] for number in numbers], steps_for(len(numbers))
    parameters = [parameter for term in terms.values() for parameter in term.parameters() if parameter.requires_grad]

    def plan_epoch(epoch: int) -> list[list[int]]:
        batches = epoch_batches(examples, batch_size=BATCH, seed=enrolment.seed, epoch=epoch)
        return [[numbers[i] for i in batch] for batch in batches]

    epochs = math.ceil(steps / len(plan_epoch(0)))
    options = TrainOptions(
        epochs=epochs,
        learning_rate=RATES[way],
        schedule="cosine",  # with which steps and rates were measured
        max_steps=steps,
        patience=epochs + 1,
        select_from=1.0,
        save_every_n_epochs=epochs + 1,
        checkpoint_minutes=1.0,
        quiet=enrolment.quiet,
    )
    decay = 0.0 if way == "gates" else 0.01
    with enrolment.using(terms):
        try:
            train(
                _Training(enrolment.recogniser),
                accelerator=enrolment.accelerator,
                groups=[{"params": parameters, "rate": 1.0, "weight_decay": decay}],
                plan_epoch=plan_epoch,
                load=enrolment.loader,
                evaluate=lambda model, full: {"loss": 0.0},
                options=options,
                checkpointer=enrolment.checkpointer(name),
                stopping=enrolment.stopping,
                label=name,
            )
        finally:
            enrolment.accelerator.free_memory()
            for parameter in parameters:
                parameter.requires_grad_(False)


def folds_of(groups: Sequence[str], most: int) -> list[list[int]]:
    """Utterance numbers in at most `most` parts of about equal size; a group is never in two.

    Args:
        groups: of each utterance: its speaker or session.
    """
    sizes: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        sizes.setdefault(group, []).append(number)
    folds: list[list[int]] = [[] for _ in range(min(most, len(sizes)))]
    for members in sorted(sizes.values(), key=len, reverse=True):
        min(folds, key=len).extend(members)
    return [sorted(fold) for fold in folds]


@dataclass(frozen=True)
class Trial:
    """Result of cross-validation of one method.

    Attributes:
        terms: terms of each fold, fitted on the other folds.
        loss_N: held-out cross-entropy per token of each utterance's text.
    """

    terms: list[Terms]
    loss_N: np.ndarray


def try_ways(
    enrolment: Enrolment,
    ways: Sequence[Method],
    folds: Sequence[Sequence[int]],
    candidates: Candidates,
    groups: Sequence[str],
    size: int | None = None,
) -> dict[Method, Trial]:
    """Cross-validates methods: fits them on all folds except one, and measures them on that fold, for each fold.

    A method that is clearly worse than another one after a fold is not tried on the next, and is not in the result.

    Args:
        groups: of each utterance: its speaker or session.
        size: maximum number of utterances to fit on, for a learning curve.
    """
    trials = {way: Trial([], np.full(len(enrolment.examples), np.nan)) for way in ways}
    for number, held_out in enumerate(folds):
        trials = without_worse(trials, groups) if number else trials
        rest = [n for n in enrolment.all() if n not in set(held_out)]
        rest = rest if size is None else sorted(np.random.default_rng(number).permutation(rest)[:size].tolist())
        for way, trial in trials.items():
            label = f"{way} {number + 1} of {len(folds)}" + ("" if size is None else f", {size} utterances")
            terms = fit(enrolment, way, rest, candidates, label)
            with enrolment.using(terms):
                summed_N, tokens_N = losses(enrolment, held_out)
            trial.loss_N[list(held_out)] = summed_N / tokens_N
            trial.terms.append(terms)
    return trials


def without_worse(trials: Mapping[Method, Trial], groups: Sequence[str]) -> dict[Method, Trial]:
    """Without the methods that are two standard errors worse than the best one, by what is measured so far."""
    best = min(trials.values(), key=lambda trial: float(np.nanmean(trial.loss_N)))
    kept = {}
    for way, trial in trials.items():
        difference_N = trial.loss_N - best.loss_N
        measured: list[int] = np.flatnonzero(~np.isnan(difference_N)).tolist()
        mean, error = paired_difference(difference_N[measured], [groups[n] for n in measured])
        if trial is best or len(measured) < JUDGED_FROM or mean < CLEARLY * error:
            kept[way] = trial
    return kept


def simplest_good(before_N: np.ndarray, trials: Mapping[Method, Trial], groups: Sequence[str]) -> Method:
    """The simplest method within one standard error of the best; `none` if this is the unchanged model.

    The error is that of the paired difference, over groups of utterances.

    Args:
        before_N: cross-entropy per token of the unchanged model.
        trials: the methods, the simplest first.
    """
    sides: dict[Method, np.ndarray] = {"none": before_N}
    sides.update({way: trial.loss_N for way, trial in trials.items()})
    best = min(sides, key=lambda way: float(sides[way].mean()))
    for way, loss_N in sides.items():
        mean, error = paired_difference(loss_N - sides[best], groups)
        if way == best or mean <= error:
            return way
    raise AssertionError("the best way is as good as itself")


def paired_difference(difference_N: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """Mean and standard error of a difference, over groups if there are enough, otherwise over utterances."""
    names = sorted(set(groups))
    values = np.array(
        [np.mean([d for d, group in zip(difference_N, groups, strict=True) if group == name]) for name in names]
        if len(names) >= ENOUGH_GROUPS
        else difference_N
    )
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
    return float(values.mean()), error
