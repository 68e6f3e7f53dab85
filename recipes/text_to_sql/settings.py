"""The single definition of the options of a training: names, types, help texts and defaults, without torch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import click

from common.errors import UsageError
from common.files import file_hash
from recipes.text_to_sql.sql import write_lines

MAY_BE_ZERO = {"weight_decay", "num_warmup_epochs", "seed"}
# What may change when an experiment is started again: the result does not depend on it.
FREE = {"output", "experiment_name", "eval_batch_size", "async_eval", "save_only_best", "sql_threads", "device"}


@dataclass(frozen=True, slots=True)
class Settings:
    """One training."""

    data: Annotated[Path, "Folder with train, dev and test .nl and .sql beside an SQLite database."]
    database: Annotated[Path | None, "Database file. Needed where --data holds several."] = None
    output: Annotated[Path, "Folder for all experiments."] = Path("runs/text_to_sql")
    experiment_name: Annotated[str, "Folder of this experiment. An interrupted one goes on."] = "t5"
    model: Annotated[str, "T5 to fine-tune: hub name or folder."] = "google-t5/t5-small"
    finetune: Annotated[bool, "Fine-tune --model, or train a small new T5."] = True
    width: Annotated[int, "Width of a new T5, a multiple of 32."] = 128
    layers: Annotated[int, "Number of layers of a new T5, on each side."] = 2
    learning_rate: Annotated[float, "Learning rate after the warm-up."] = 5e-4
    weight_decay: Annotated[float, "Weight decay of AdamW."] = 0.0
    batch_size: Annotated[int, "Pairs per step."] = 16
    eval_batch_size: Annotated[int, "Questions that are answered at once."] = 64
    max_n_epochs: Annotated[int, "Maximum number of epochs."] = 20
    patience_epochs: Annotated[int, "Full evaluations without improvement before training stops."] = 3
    num_warmup_epochs: Annotated[int, "Epochs of linear warm-up."] = 0
    scheduler_type: Annotated[
        Literal["cosine", "linear", "none"], "Schedule of the learning rate after the warm-up."
    ] = "cosine"
    eval_every_n_epochs: Annotated[int, "Epochs between two evaluations by records."] = 1
    skip_record_computation: Annotated[bool, "Never compute records: select and stop by dev loss."] = False
    async_eval: Annotated[bool, "Compute records while the next epoch trains; the result is the same."] = False
    save_only_best: Annotated[bool, "Write a checkpoint only after an epoch that is the best so far."] = False
    num_beams: Annotated[int, "Beams of the search for a query."] = 5
    sql_threads: Annotated[int, "Queries that run at once."] = 32
    sql_timeout: Annotated[float, "Seconds after which a query is stopped."] = 60.0
    bf16: Annotated[bool, "Train in bf16 (default: by device)."] = False
    fp16: Annotated[bool, "Train in fp16 with a loss scaler."] = False
    compile: Annotated[bool, "Compile the model; pays on a GPU."] = False
    seed: Annotated[int, "Random seed."] = 0
    device: Annotated[str, "Device: auto, cpu or cuda."] = "auto"

    @property
    def folder(self) -> Path:
        """Folder of the experiment."""
        return self.output / self.experiment_name

    def check(self) -> None:
        """Raises UsageError for invalid values or combinations of values."""
        for name, value in asdict(self).items():
            least = 0 if name in MAY_BE_ZERO else 1 if type(value) is int else 1e-9
            if type(value) in (int, float) and not value >= least:
                raise UsageError(f"--{name} {value}: give {'more than 0' if least == 1e-9 else f'{least} or more'}")
        if self.bf16 and self.fp16:
            raise UsageError("--bf16 and --fp16 exclude each other: give one")
        if self.width < 32 or self.width % 32:
            raise UsageError(f"--width {self.width}: give a multiple of 32")
        if not 0 <= self.num_warmup_epochs <= self.max_n_epochs:
            raise UsageError(
                f"--num_warmup_epochs {self.num_warmup_epochs}: give 0 to {self.max_n_epochs} (--max_n_epochs)"
            )

    def claim(self, files: Sequence[Path]) -> None:
        """Writes settings.json; raises UsageError if the experiment was begun with other settings that affect the
        result, or with other contents of the files from which it is trained.
        """
        ours = {name: str(value) for name, value in asdict(self).items() if name not in FREE}
        ours |= {f"sha256 of {path.name}": file_hash(path) for path in files}
        path = self.folder / "settings.json"
        theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ours
        for name in ours:
            if ours[name] != theirs.get(name):
                raise UsageError(
                    f"experiment {self.experiment_name} was begun with {name}={theirs.get(name)}, not {ours[name]}: "
                    "give another --experiment_name"
                )
        write_lines(path, [json.dumps(ours, indent=1)])


def settings_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the named settings as options of a command, or all settings if none is named."""
    hints = get_type_hints(Settings, include_extras=True)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(fields(Settings)):
            if names and setting.name not in names:
                continue
            kind, text = get_args(hints[setting.name])
            flag = "--finetune/--from-scratch" if setting.name == "finetune" else f"--{setting.name}"
            default = {"required": True} if setting.default is MISSING else {"default": setting.default}
            shape = {"is_flag": True} if kind is bool else {"type": _click_type(kind), "show_default": True}
            function = click.option(flag, setting.name, help=text, **default, **shape)(function)
        return function

    return decorate


def _click_type(kind: Any) -> Any:
    if kind in (int, float, str):
        return kind
    return click.Choice(get_args(kind)) if str in map(type, get_args(kind)) else click.Path(path_type=Path)
