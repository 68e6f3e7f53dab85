"""What several commands share: options, and how a model is opened by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from common.config import Config, merge, nest, validate
from common.errors import UsageError
from common.options import parse_setting
from common.pipeline.runs import find_run
from common.storage.store import Store

if TYPE_CHECKING:
    from common.inference.load_model import OpenedModel

F = TypeVar("F", bound=Callable[..., Any])

endpoint_option = click.option("--endpoint-url", help="Endpoint of an S3-compatible store.")
store_options = (
    click.option(
        "--store", "store_url", default="runs", show_default=True, help="Folder or s3://bucket/prefix of the runs."
    ),
    endpoint_option,
)
base_option = click.option("--base", help="Location of the base weights, if it is not the one in the model.")
language_option = click.option(
    "--language", show_default="en", help="Language of a multilingual model that does not record its own."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or one GPU as cuda:1."
)
opening_options = (
    base_option,
    language_option,
    click.option(
        "--task",
        type=click.Choice(("transcribe", "translate")),
        show_default="transcribe",
        help="Transcribe, or translate into English, with a model that does not record its task.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Setting of decode, audio, runtime, precision or seed, as for `moe-asr run`.",
    ),
    device_option,
    click.option("--quiet", is_flag=True, help="Show no progress bar."),
)


added_options = (
    click.option("--speaker", help="Use the added expert of this speaker."),
    click.option("--expert", help="Use the added expert of this name, or the routed expert of this group."),
)


@dataclass(frozen=True)
class Opening:
    """How a model is opened: the values of `opening_options`, as typed."""

    base: str | None
    language: str | None
    task: str | None
    settings: tuple[str, ...]
    device: str
    quiet: bool


def with_opening(function: Callable[..., None]) -> Callable[..., None]:
    """A decorator that adds `opening_options`, whose values the command gets as `opening`."""

    @with_options(opening_options)
    @wraps(function)
    def command(**given: Any) -> None:
        function(opening=Opening(**{field.name: given.pop(field.name) for field in fields(Opening)}), **given)

    return command


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[F], F]:
    """A decorator that adds click options, in their order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


with_store = with_options(store_options)


def decoding_config(model: str, store: Store, opening: Opening, *settings: str) -> Config:
    """How to decode: as the run did whose model it is, else by the defaults; `--set` and `--device` over both.

    Args:
        settings: settings of other options, as of `--set`.

    Raises:
        ConfigError: a setting that does not validate.
        UsageError: one that says nothing about an evaluation.
    """
    stored_run = find_run(model, store)
    known: Mapping[str, Any] = stored_run[1]["config"] if stored_run else {}
    tree: dict[str, Any] = {name: known[name] for name in ("decode", "precision", "seed") if name in known}
    for text in (*opening.settings, *settings):
        path, value = parse_setting(text)
        if path.partition(".")[0] not in ("decode", "audio", "runtime", "precision", "seed"):
            raise UsageError(f"--set {text}: only decode, audio, runtime, precision and seed can be set here")
        merge(tree, nest(path, value))
    if opening.device != "auto":
        merge(tree, nest("runtime.device", opening.device))
    if opening.quiet:
        merge(tree, nest("runtime.quiet", True))
    return validate(tree)


def open_as_told(
    model: str, store: Store, config: Config, opening: Opening, *, endpoint_url: str | None
) -> OpenedModel:
    """Opens a model by a `decoding_config`; see `common.inference.load_model.open_model`.

    An audio context among the settings of `--set` is used instead of the model's own.
    """
    from common.inference.load_model import open_model
    from stages.local_runner import cache_folder

    given = {parse_setting(text)[0] for text in opening.settings}
    return open_model(
        model,
        store=store,
        cache=cache_folder(),
        base=opening.base,
        device=config.runtime.device,
        precision=config.precision,
        language=opening.language,
        task=opening.task,
        context=config.audio.context if "audio.context" in given else None,
        margin=config.audio.margin if "audio.margin" in given else None,
        endpoint_url=endpoint_url,
    )
