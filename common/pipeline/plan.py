"""The plan of a run: the keys of its stages, which of them are done, and why the others are not.

This module neither runs stages nor imports torch; on a cluster, planning is the first step, on a CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import Config, read_values
from common.data.corpus import Corpus
from common.pipeline.contract import Contract
from common.storage.artifacts import Key, inspect, make_key, shard_key
from common.storage.manifest import Manifest
from common.storage.store import Store


@dataclass(frozen=True)
class Task:
    """One stage or one shard of it.

    Attributes:
        shard: number of the shard; None if the stage has one task.
        inputs: output name of each earlier stage → keys of its tasks.
    """

    contract: Contract
    shard: int | None
    key: Key
    inputs: Mapping[str, tuple[Key, ...]]

    @property
    def label(self) -> str:
        """`extract[0]`, `cluster`, …"""
        return self.contract.name if self.shard is None else f"{self.contract.name}[{self.shard}]"


@dataclass(frozen=True)
class Planned:
    """A task and its state: `done`, `todo` (never made) or `stale` (made, but not usable)."""

    task: Task
    status: Literal["done", "todo", "stale"]
    reason: str
    manifest: Manifest | None


@dataclass(frozen=True)
class Plan:
    """All tasks that are known so far; the fan-out of `open_ended` stages depends on results that do not exist yet."""

    planned: tuple[Planned, ...]
    open_ended: tuple[Contract, ...]
    groups: Mapping[str, Key] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self.open_ended and all(p.status == "done" for p in self.planned)


def active_stages(contracts: Sequence[Contract], config: Config) -> list[Contract]:
    """The stages that this configuration needs, in order."""
    return [contract for contract in contracts if contract.active(config)]


def group_keys(contracts: Sequence[Contract], config: Config, sources: Mapping[str, str]) -> dict[str, Key]:
    """Output name → key of the stage as a whole, for every active stage.

    Args:
        contracts: contracts of the stages, in order.
        sources: digests of `corpus` and `model`.
    """
    keys: dict[str, Key] = {}
    for contract in active_stages(contracts, config):
        inputs: dict[str, str] = {name: sources[name] for name in contract.sources}
        inputs |= {name: keys[name].digest for name in contract.inputs if name in keys}
        values = read_values(config, contract.reads)
        keys[contract.output] = make_key(contract.name, contract.format, values, inputs)
    return keys


def make_plan(
    contracts: Sequence[Contract],
    config: Config,
    corpus: Corpus,
    sources: Mapping[str, str],
    store: Store,
    *,
    before: Mapping[str, Any] | None = None,
    deep: bool = False,
) -> Plan:
    """Reads the state of each task from the store: whether it is done, and if not, why.

    Args:
        before: stage → key ingredients of the previous state of the run, to name the changes.
        deep: also re-hash every file.
    """
    groups = group_keys(contracts, config, sources)
    planned: list[Planned] = []
    open_ended: list[Contract] = []
    output_keys: dict[str, tuple[Key, ...]] = {}
    manifests: dict[str, Manifest] = {}
    for contract in active_stages(contracts, config):
        group = groups[contract.output]
        count = contract.fan_out(config, corpus, manifests) if contract.fan_out else 1
        if count is None or any(name not in output_keys for name in contract.inputs if name in groups):
            open_ended.append(contract)
            if contract.fan_out is None:  # its own key is known, even if not yet how many inputs it has
                output_keys[contract.output] = (group,)
            continue
        keys = tuple(shard_key(group, i) for i in range(count)) if contract.fan_out else (group,)
        output_keys[contract.output] = keys
        inputs = {name: output_keys[name] for name in contract.inputs if name in groups}
        for number, key in enumerate(keys):
            task = Task(contract, number if contract.fan_out else None, key, inputs)
            planned_task = _look(store, task, group, before, planned, deep)
            planned.append(planned_task)
            if planned_task.status == "done" and planned_task.manifest and contract.fan_out is None:
                manifests[contract.output] = planned_task.manifest
    return Plan(tuple(planned), tuple(open_ended), groups)


def _look(
    store: Store,
    task: Task,
    group: Key,
    before: Mapping[str, Any] | None,
    earlier: Sequence[Planned],
    deep: bool,
) -> Planned:
    state = inspect(store, task.key, deep=deep)
    if state.status == "damaged":
        return Planned(task, "stale", state.reason, state.manifest)
    if state.status == "missing":
        old = (before or {}).get(task.contract.name)
        if old is None or old == group.ingredients:
            return Planned(task, "todo", state.reason, None)
        return Planned(task, "stale", _difference(old, group.ingredients), None)
    assert state.manifest is not None
    changed = _changed_input(state.manifest, earlier)
    if changed:
        return Planned(task, "stale", changed, state.manifest)
    return Planned(task, "done", f"made in {state.manifest.seconds:.0f} s on {state.manifest.host}", state.manifest)


def _changed_input(manifest: Manifest, earlier: Sequence[Planned]) -> str:
    """The input whose content differs from the content when this artifact was made, which the key does not show."""
    now = {p.task.key.digest: p for p in earlier if p.manifest and p.status == "done"}
    for name, used in manifest.inputs.items():
        for artifact in used:
            current = now.get(artifact["key"])
            if current and current.manifest and current.manifest.digest != artifact["digest"]:
                return f"its input {current.task.label} ({name}) was recomputed with other content"
    return ""


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`asr.epochs 5 → 8; corpus changed` for two sets of key ingredients."""
    parts = []
    values_old, values_new = dict(old.get("values", {})), dict(new.get("values", {}))
    for name in sorted(values_old.keys() | values_new.keys()):
        a, b = values_old.get(name, "unset"), values_new.get(name, "unset")
        if a != b:
            parts.append(f"{name} {a} → {b}")
    inputs_old, inputs_new = dict(old.get("inputs", {})), dict(new.get("inputs", {}))
    for name in sorted(inputs_old.keys() | inputs_new.keys()):
        a, b = str(inputs_old.get(name, "none")), str(inputs_new.get(name, "none"))
        if a != b:
            parts.append(f"{name} changed ({a.removeprefix('sha256:')[:8]} → {b.removeprefix('sha256:')[:8]})")
    if old.get("format") != new.get("format"):
        parts.append(f"format {old.get('format')} → {new.get('format')}")
    return "; ".join(parts) or "its key changed"
