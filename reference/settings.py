"""The reference of the configuration, from its models, modes and presets: docs/reference/config.md."""

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from argo.parameters import PRODUCTS
from common.config import GPUS, MODES, Config, flatten, read_yaml, shipped
from common.pipeline.contract import Contract
from common.section_base import Section
from reference.blocks import table
from stages import STAGES

HEAD = """# Configuration

<!-- Written by `make generate` from common/sections.py, conf/ and the stages' contracts: change those. -->

One YAML tree. `moe-asr config show` prints the resolved one; `--config FILE` overrides a mode's values with a file, and
`--set section.key=value` sets one value. An unknown name is refused with the nearest known one.

The last column names the stages whose result depends on a value: it is part of their keys, and after a change these
stages, and those that depend on them, run again. Settings that no stage reads can be changed without recomputing
anything.
"""
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page() -> str:
    """The whole page."""
    own = {name: field for name, field in Config.model_fields.items() if not _section_of(field)}
    parts = [HEAD, "## At the top\n", _table("", own)]
    for name, field in Config.model_fields.items():
        if section := _section_of(field):
            parts += [f"## {name}\n", f"{section.__doc__}\n", _table(f"{name}.", section.model_fields)]
    parts += [
        "## Modes\n",
        "What `--mode` sets. All other settings keep the defaults above.\n",
        _shipped_table(MODES, ()),
    ]
    parts += [
        "## GPU presets\n",
        "What `--gpu` sets, and the nodes that `submit` requests. All other settings keep the values of the mode.\n",
    ]
    parts += ["\n".join(preset_rows()) + "\n", _shipped_table(GPUS, ("gpu",))]
    return "\n".join(parts).rstrip("\n") + "\n"


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = []
    for name, field in fields.items():
        default = json.dumps(field.default, ensure_ascii=False) if field.default is not None else "unset"
        readers = ", ".join(read_by(f"{prefix}{name}"))
        rows.append((f"`{prefix}{name}`", type_of(field), f"`{default}`", field.description or "", readers))
    return "\n".join(table(("setting", "type", "default", "what it is", "read by"), rows)) + "\n"


def type_of(field: FieldInfo) -> str:
    """A field's type and bounds in words: `int > 0, or unset`."""
    kinds = get_args(field.annotation) if not _is_single(field.annotation) else (field.annotation,)
    words = [_words(kind) for kind in kinds if kind is not type(None)]
    bounds = [f"{BOUNDS[n]} {getattr(m, n)}" for m in field.metadata for n in BOUNDS if hasattr(m, n)]
    return " or ".join(words) + (f" {', '.join(bounds)}" if bounds else "") + (", or unset" * (type(None) in kinds))


def _is_single(kind: Any) -> bool:
    return get_origin(kind) in (None, Literal, tuple)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_words(get_args(kind)[0])}"
    return {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}.get(kind.__name__, "text")


def read_by(path: str) -> list[str]:
    """Names of the stages whose key holds this setting, or what it names."""
    sources = {"corpus.path": "corpus", "model.name": "model", "model.revision": "model"}

    def reads(contract: Contract) -> bool:
        named = any(path == setting or path.startswith(f"{setting}.") for setting in contract.reads)
        return named or sources.get(path) in contract.sources

    return [contract.name for contract in STAGES if reads(contract)]


def _shipped_table(names: Sequence[str], folder: Sequence[str]) -> str:
    """One row per setting that any of these files sets, one column per file."""
    files = {name: dict(flatten(read_yaml(shipped(*folder, f"{name}.yaml")))) for name in names}
    paths = list(dict.fromkeys(path for values in files.values() for path in values))
    rows = [
        (f"`{path}`", *(f"`{values[path]}`" if path in values else "" for values in files.values())) for path in paths
    ]
    return "\n".join(table(("setting", *names), rows)) + "\n"


def preset_rows() -> list[str]:
    """The presets in one table: batches, evaluation interval, precision and the products of their nodes."""
    rows = []
    for name in GPUS:
        values = dict(flatten(read_yaml(shipped("gpu", f"{name}.yaml"))))
        batches = [str(values.get(f"{stage}.batch_size", "mode's")) for stage in ("gating", "experts", "asr")]
        accumulate, workers = values.get("asr.gradient_accumulation_steps", 1), values["runtime.num_workers"]
        interval = values.get("asr.eval_every_n_epochs", "mode's")
        precision = {"auto": "bf16, or fp16 where the device has none"}.get(values["precision"], values["precision"])
        products = ", ".join(p for p in PRODUCTS[name] if p != "none") or "–"
        rows.append(
            (f"`{name}`", " / ".join(batches), str(accumulate), str(interval), str(workers), precision, products)
        )
    batch, interval = "batch: gating / experts / asr", "evaluate every n epochs"
    return table(("preset", batch, "accumulate", interval, "workers", "precision", "node label says"), rows)
