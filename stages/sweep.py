"""Several training regimes on one corpus with one budget of optimiser steps, so that they can be compared.

Equal in all regimes of a sweep: corpus, splits, base model, seed, utterances per step, and the optimiser steps in all,
those of pre-training experts counted. Where nothing is pre-trained, joint training gets all of them. Not equal: weights
trained (`dense` has as many as the mixture, `dense-active` as many as an utterance passes through), time, and the
steps of the gate's own training on cached embeddings, which cost a second.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from common.config import Config, merge, nest, validate
from common.errors import ConfigError, UsageError
from common.pipeline.stage import heed_signals
from stages.cluster import is_pretrained
from stages.experts import pretrains_experts
from stages.local_runner import Run, differences, read_record, run_one, run_pipeline

log = logging.getLogger(__name__)
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Regime:
    """What makes a regime: settings, and the rank of its one dense adapter against an expert's."""

    summary: str
    settings: Mapping[str, Any] = field(default_factory=lambda: NONE)
    dense: str = ""  # "trained" or "active": whose parameters the dense adapter has as many of


REGIMES: Mapping[str, Regime] = {
    "moe": Regime("gate and experts pre-trained on clusters, then trained jointly"),
    "branch": Regime(
        "gate pre-trained; the experts are trained as one for half of the steps, then apart", {"asr.common_share": 0.5}
    ),
    "regular": Regime("the same mixture with random gate and experts", {"asr.pretrained": False}),
    "dense": Regime("one LoRA adapter for everybody, of as many weights as all experts", dense="trained"),
    "dense-active": Regime("one LoRA adapter, of as many weights as an utterance's experts", dense="active"),
    "etiology": Regime("as moe, with the corpus's etiologies in place of clusters", {"cluster.algorithm": "etiology"}),
    "adalora": Regime(
        "one adapter whose ranks are given to the layers that need them", {"asr.adapt": "adalora"}, dense="trained"
    ),
    "full": Regime("all weights", {"asr.adapt": "full"}),
    "shared": Regime("pre-trained, and one more expert for everybody", {"asr.shared_expert": True}),
    "loss": Regime("pre-trained; the experts' losses are mixed, not their outputs", {"asr.mixture": "loss"}),
    "hard": Regime("pre-trained; one expert per utterance", {"asr.mixture": "hard"}),
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
) -> list[SweepRun]:
    """The runs of a sweep; extracts and clusters first where the number of clusters decides what they do.

    Regimes without clusters get as many experts, or that many experts' weights, as the first regime that has them.

    Args:
        base: what all runs have in common; its `run` is the sweep's name.
        regimes: names in `REGIMES`.
        seeds: each regime runs once with each.
        steps: optimiser steps of every run, pre-training included.
        pretrain_share: of these steps, for the experts' pre-training, divided evenly among them.
        settings: regime → `section.key` → value, over all else.

    Raises:
        UsageError: an unknown regime, or no steps are left for a stage.
        ConfigError: a setting that does not fit.
    """
    settings = settings or {}
    for name in (*regimes, *settings):
        if name not in REGIMES:
            raise UsageError(f"no regime {name!r}: there are {', '.join(REGIMES)}")
    if len(set(regimes)) < len(regimes) or not regimes:
        raise UsageError(f"--regimes {','.join(regimes)}: name each regime once")
    runs = []
    for seed in seeds:
        common = _with(base, {"seed": seed})
        found = {
            name: count_clusters(config)
            for name in regimes
            if is_pretrained(config := _regime(common, name, settings.get(name, {})))
        }
        clusters = next(iter(found.values()), common.num_experts or 1)
        for name in regimes:
            mine = found.get(name, clusters)
            own = settings.get(name, {})
            budget = regime_settings(
                common, name, clusters=mine, steps=steps, pretrain_share=pretrain_share, settings=own
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
    regime = REGIMES[name]
    alone = pretrains_experts(_regime(base, name, settings))
    each = int(steps * pretrain_share) // clusters if alone else 0
    joint = steps - each * clusters
    if joint < 1 or (each < 1 and alone):
        raise UsageError(
            f"--max-steps {steps} with --pretrain-share {pretrain_share:g} leaves {each} steps for each of {clusters} "
            f"experts and {joint} for joint training of regime {name}: at least one of each is needed"
        )
    # Epochs and patience never end a training before its steps do.
    found: dict[str, Any] = {"asr.max_steps": joint, "asr.epochs": joint, "asr.patience": joint}
    found |= {"num_experts": clusters} if name == "regular" else {}
    if each:
        found |= {"experts.max_steps": each, "experts.epochs": each, "experts.patience": each}
        same = ("batch_size", "batch_seconds", "batch_tokens", "gradient_accumulation_steps")
        found |= {f"experts.{key}": getattr(base.asr, key) for key in same}
    if regime.dense:
        times = clusters if regime.dense == "trained" else min(base.asr.top_k, clusters)
        # Alpha grows alike: the scale alpha / rank, and so the meaning of the learning rate, stays.
        found |= {"num_experts": 1, "lora.rank": base.lora.rank * times, "lora.alpha": base.lora.alpha * times}
    return found | dict(regime.settings)


def _regime(base: Config, name: str, settings: Mapping[str, Any]) -> Config:
    regime = REGIMES[name]
    return _with(base, ({"num_experts": 1} if regime.dense else {}) | dict(regime.settings) | dict(settings))


def _with(base: Config, settings: Mapping[str, Any]) -> Config:
    tree = base.model_dump(mode="json")
    for path, value in settings.items():
        merge(tree, nest(path, value))
    return validate(tree)


def count_clusters(config: Config) -> int:
    """Clusters that the configuration finds; made by the stages that come before, where they are not done."""
    run = Run(config)
    with heed_signals() as stopping:
        for stage in ("extract", "cluster"):
            for one in run.plan().planned:
                if one.task.contract.name == stage and one.status != "done":
                    log.info("%s of seed %d: started", one.task.label, config.seed)
                    run_one(run, one, stopping)
    found = next(p.manifest for p in run.plan().planned if p.task.contract.name == "cluster")
    assert found is not None
    return int(found.metrics["clusters"])


def run_sweep(runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
    """Runs what is not done, in order; returns the summaries.

    Raises:
        ConfigError: a run of that name holds another configuration.
        MoeAsrError: as the stages raise; what was finished stays.
    """
    summaries = []
    for number, one in enumerate(runs, 1):
        summary = finished_summary(one)
        log.info("%s (%d of %d): %s", one.name, number, len(runs), "done before" if summary else "started")
        summaries.append(summary or run_pipeline(one.config))
    return summaries


def finished_summary(one: SweepRun) -> dict[str, Any] | None:
    """The summary of a run that was finished with this configuration.

    Raises:
        ConfigError: it holds another one.
    """
    from common.storage import open_store

    store = open_store(one.config.store, endpoint_url=one.config.endpoint_url)
    record = read_record(store, one.name)
    if record is None:
        return None
    changed = differences(record["config"], one.config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"run {one.name!r} in {store.url} holds another configuration ({'; '.join(changed[:3])}): "
            "give the sweep another name by --run NAME"
        )
    if record["status"] != "done":
        return None
    return dict(json.loads(store.read(f"{one.name}/summary.json")))
