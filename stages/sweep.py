"""Several training regimes on one corpus with one budget of optimiser steps, so that they can be compared.

Equal in all regimes of a sweep: corpus, splits, base model, seed, utterances per step, and the optimiser steps in all,
those of pre-training experts counted. Where none is pre-trained, joint training gets all of them. Not equal: weights
trained (`dense` has as many ranks as an utterance uses in the mixture), time, and the steps of the gate's own training
on cached embeddings, which cost a second.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from common.config import Config, merge, nest, validate
from common.errors import ConfigError, UsageError
from common.json_files import parse_object
from common.signals import handle_signals
from stages.cluster import is_pretrained
from stages.experts import pretrains_experts, pretrains_shared
from stages.local_runner import Run, differences, read_record, run_one, run_pipeline

log = logging.getLogger(__name__)
NONE: Mapping[str, Any] = MappingProxyType({})
MIXTURE = {"asr.pretrain": "gate", "asr.shared_expert": True, "asr.route_by": "utterance"}


@dataclass(frozen=True, slots=True)
class Regime:
    """A regime: its settings, and whether it is one dense adapter with the mixture's active ranks."""

    summary: str
    settings: Mapping[str, Any] = field(default_factory=lambda: NONE)
    dense: bool = False


REGIMES: Mapping[str, Regime] = {
    "mixture": Regime("shared expert and routed ones by a gate pre-trained on clusters (the default)", MIXTURE),
    "speaker": Regime("the same, one choice for all utterances of a speaker", MIXTURE | {"asr.route_by": "speaker"}),
    "etiology": Regime("as the mixture, experts by the corpus's etiologies", MIXTURE | {"asr.route_by": "table"}),
    "one-group": Regime(
        "control: the same with one group for everybody, whose routed expert is always on",
        MIXTURE | {"asr.route_by": "table", "asr.route_column": "none"},
    ),
    "shuffled": Regime(
        "control: the same with a group drawn for each speaker",
        MIXTURE | {"asr.route_by": "table", "asr.route_column": "shuffled"},
    ),
    "regular": Regime(
        "shared expert and routed ones by a gate that is not pre-trained", MIXTURE | {"asr.pretrain": "none"}
    ),
    "dense": Regime("one LoRA adapter of as many ranks as an utterance uses in the mixture", dense=True),
    "dense-plain": Regime("the same without learned magnitudes", {"lora.magnitude": False}, dense=True),
    "pretrained": Regime(
        "shared expert pre-trained, then routed ones on top of it, then all jointly",
        MIXTURE | {"asr.pretrain": "experts"},
    ),
    "alone": Regime(
        "every expert pre-trained alone on its cluster, none shared, then all jointly",
        {"asr.pretrain": "alone", "asr.shared_expert": False},
    ),
    "loss": Regime("as the mixture, with losses mixed, not outputs", MIXTURE | {"asr.mixture": "loss"}),
    "hard": Regime("as the mixture, with one routed expert per utterance", MIXTURE | {"asr.mixture": "hard"}),
    "adalora": Regime("one adapter whose ranks go to the layers that need them", {"asr.adapt": "adalora"}),
    "full": Regime("all weights", {"asr.adapt": "full"}),
}


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One regime with one seed, as a run of the pipeline."""

    regime: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Of the run in the store."""
        return self.config.run


def plan_sweep(
    base: Config,
    regimes: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    pretrain_share: float = 0.5,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    dry: bool = False,
) -> list[SweepRun]:
    """The runs of a sweep; extracts and clusters first where the number of clusters decides what they do.

    Regimes without clusters get the number of experts, or an adapter with the weights of that number of experts, of the
    first regime with clusters.

    Args:
        base: configuration shared by all runs; its `run` is the sweep's name.
        regimes: names in `REGIMES`.
        seeds: each regime runs once with each.
        steps: optimiser steps of every run, pre-training included.
        pretrain_share: of these steps, for the experts' pre-training, divided evenly among them; where the shared
            expert is trained first, it gets half of these.
        settings: regime → `section.key` → value, over all else.
        dry: run nothing: as long as there are no clusters, their number is taken to be `num_experts`.

    Raises:
        UsageError: a regime is unknown, or no steps are left for a stage.
        ConfigError: a setting is invalid.
    """
    settings = settings or {}
    for name in (*regimes, *settings):
        if name not in REGIMES:
            raise UsageError(f"unknown regime {name!r}; choose one of {', '.join(REGIMES)}")
    if len(set(regimes)) < len(regimes) or not regimes:
        raise UsageError(f"--regimes {','.join(regimes)}: name each regime once")
    runs = []
    for seed in seeds:
        common = _with(base, {"seed": seed})
        cluster_counts = {
            name: count_clusters(config, dry=dry)
            for name in regimes
            if is_pretrained(config := _regime(common, name, settings.get(name, {})))
        }
        clusters = next(iter(cluster_counts.values()), common.num_experts or 1)
        for name in regimes:
            cluster_count = cluster_counts.get(name, clusters)
            own = settings.get(name, {})
            budget = regime_settings(
                common, name, clusters=cluster_count, steps=steps, pretrain_share=pretrain_share, settings=own
            )
            chosen = budget | dict(own) | {"run": f"{base.run}-{name}-s{seed}"}
            runs.append(SweepRun(name, seed, _with(common, chosen)))
    return runs


def regime_settings(
    base: Config,
    name: str,
    *,
    clusters: int,
    steps: int,
    pretrain_share: float,
    settings: Mapping[str, Any] = NONE,
) -> dict[str, Any]:
    """`section.key` → value of one regime within the budget of steps.

    Args:
        settings: the regime's own, which may decide whether experts are pre-trained; they are not in the result.

    Raises:
        UsageError: too few steps.
    """
    regime, own = REGIMES[name], _regime(base, name, settings)
    pretrained = pretrains_experts(own)
    before = int(steps * pretrain_share) if pretrained else 0
    first = before // 2 if pretrains_shared(own) else 0  # of the shared expert
    each = (before - first) // clusters
    joint = steps - first - each * clusters
    if joint < 1 or (pretrained and each < 1):
        shared = f"{first} steps for the shared expert, " if pretrains_shared(own) else ""
        raise UsageError(
            f"--max-steps {steps} with --pretrain-share {pretrain_share:g} leaves {shared}{each} steps for each of "
            f"{clusters} experts and {joint} for joint training of regime {name}: at least one of each is needed"
        )
    # Epochs and patience never end a training before its steps do.
    values: dict[str, Any] = {"asr.max_steps": joint, "asr.epochs": joint, "asr.patience": joint}
    values |= {"num_experts": clusters} if name in ("regular", "shuffled") else {}
    if each:
        values |= {"experts.max_steps": each, "experts.epochs": max(first, each), "experts.patience": max(first, each)}
        values |= {"experts.shared_max_steps": first} if first else {}
        same = ("batch_size", "batch_seconds", "batch_tokens", "gradient_accumulation_steps")
        values |= {f"experts.{key}": getattr(base.asr, key) for key in same}
    if regime.dense:
        values |= {"num_experts": 1, "lora.shared_rank": active_rank(base, clusters)}
    if name == "adalora":
        values |= {"adalora.target_rank": active_rank(base, clusters)}
    return values | dict(regime.settings)


def active_rank(config: Config, clusters: int) -> int:
    """The ranks that an utterance uses in the default mixture: the shared expert's and its routed experts'."""
    return config.lora.shared_rank + config.lora.rank * min(config.asr.top_k, clusters)


def _regime(base: Config, name: str, settings: Mapping[str, Any]) -> Config:
    regime = REGIMES[name]
    return _with(base, ({"num_experts": 1} if regime.dense else {}) | dict(regime.settings) | dict(settings))


def _with(base: Config, settings: Mapping[str, Any]) -> Config:
    tree = base.model_dump(mode="json")
    for path, value in settings.items():
        merge(tree, nest(path, value))
    return validate(tree)


def count_clusters(config: Config, *, dry: bool) -> int:
    """Number of groups that the gate learns; for clusters, the earlier stages are run if they are not done.

    Args:
        dry: run nothing; without clusters, the number is `num_experts`.
    """
    run = Run(config)
    if config.gating.target != "cluster":
        return len({getattr(u, config.gating.target) for u in run.corpus.split("train")} - {""}) or 1
    with handle_signals() as stopping:
        for stage in () if dry else ("extract", "cluster"):
            for planned in run.plan().planned:
                if planned.task.contract.name == stage and planned.status != "done":
                    log.info("%s of seed %d: started", planned.task.label, config.seed)
                    run_one(run, planned, stopping)
    for planned in run.plan().planned:
        if planned.task.contract.name == "cluster" and planned.status == "done" and planned.manifest:
            return int(planned.manifest.metrics["clusters"])
    log.warning("seed %d has no clusters yet: steps are given for %s of them", config.seed, config.num_experts)
    return config.num_experts or 1


def run_sweep(runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
    """Runs what is not done, in order; returns the summaries.

    Raises:
        ConfigError: a run of that name has another configuration.
        MoeAsrError: as raised by the stages; finished results are kept.
    """
    summaries = []
    for number, run in enumerate(runs, 1):
        summary = finished_summary(run)
        log.info("%s (%d of %d): %s", run.name, number, len(runs), "done before" if summary else "started")
        summaries.append(summary or run_pipeline(run.config))
    return summaries


def finished_summary(run: SweepRun) -> dict[str, Any] | None:
    """The summary of a run that was finished with this configuration.

    Raises:
        ConfigError: it holds another one.
    """
    from common.storage import open_store

    store = open_store(run.config.store, endpoint_url=run.config.endpoint_url)
    record = read_record(store, run.name)
    if record is None:
        return None
    changed = differences(record["config"], run.config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"run {run.name!r} in {store.url} has another configuration ({'; '.join(changed[:3])}): "
            "give the sweep another name by --run NAME"
        )
    if record["status"] != "done":
        return None
    name = f"{run.name}/summary.json"
    return parse_object(store.read(name), f"{store.url}/{name}")
