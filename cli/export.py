"""Commands that make other things of trained models: other tools' formats, one model of several."""

import json
from pathlib import Path

import click

from cli.shared import base_option, with_options, with_store
from common.console import echo
from common.errors import UsageError
from common.files import new_folder
from common.json_files import write_object
from common.storage import open_store

FORMATS = ("peft", "merged", "ctranslate2", "vllm")

out_options = (
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write."),
    click.option("--overwrite", is_flag=True, help="Replace an earlier result of this command in this folder."),
)


def numbers(text: str | None, option: str) -> list[float] | None:
    """`0.5,0.5` → [0.5, 0.5].

    Raises:
        UsageError: these are no numbers.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: write numbers with commas between, such as 0.7,0.3") from None


@click.command()
@click.argument("model")
@click.option("--to", "target", type=click.Choice(FORMATS), required=True, help="Format to write.")
@click.option("--expert", help="Expert to merge: number or group of a routed expert, or name of an added expert.")
@click.option("--speaker", help="Merge the added expert of this speaker.")
@click.option("--weights", help="Weights with which all routed experts of a mixture are merged, such as 0.7,0.3.")
@click.option(
    "--routing", type=click.Choice(("mean",)), help="Merge all routed experts with their mean weights on the test set."
)
@base_option
@click.option("--quantization", help="Quantization of CTranslate2: int8, float16, int8_float16 …")
@with_options(out_options)
@with_store
def export(
    model: str,
    target: str,
    out: Path,
    expert: str | None,
    speaker: str | None,
    weights: str | None,
    routing: str | None,
    base: str | None,
    quantization: str | None,
    overwrite: bool,
    store_url: str,
    endpoint_url: str | None,
) -> None:
    """Write a trained model in another tool's format.

    MODEL is a run's name; a folder or store address with a trained model, a PEFT adapter or a Whisper checkpoint; or a
    hub name. A mixture as adapters (peft, vllm) keeps its choice of experts; as a dense model (merged, ctranslate2) it
    has one fixed routing, to be chosen with --expert, --weights or --routing. A PEFT adapter, a Whisper checkpoint
    and a fully fine-tuned model can be written as a dense model only.

    \b
        moe-asr export mine --to peft --out out/adapters
        moe-asr export mine --to merged --out out/dense --expert 2
        moe-asr export mine-F07 --to merged --out out/F07 --speaker F07
    """
    from common.export.formats import MARK, export_model, fixed_routing
    from common.inference.added_experts import with_added
    from common.inference.load_model import open_model
    from stages.local_runner import cache_folder

    merging = target in ("merged", "ctranslate2")
    if not merging and (expert is not None or speaker is not None or weights or routing):
        raise UsageError(
            f"--to {target} keeps all experts: --expert, --speaker, --weights and --routing are for merging"
        )
    if quantization and target != "ctranslate2":
        raise UsageError(f"--quantization is for --to ctranslate2, not {target}")
    shares, mean = numbers(weights, "--weights"), routing == "mean"
    with new_folder(out, overwrite=overwrite, mark=MARK) as folder:
        opened = open_model(
            model,
            store=open_store(store_url, endpoint_url=endpoint_url),
            cache=cache_folder(),
            base=base,
            device="cpu",
            precision="fp32",
            endpoint_url=endpoint_url,
        )
        fixed: dict[int, float] = {}
        names = [*(opened.info.groups if opened.info else ()), *(added.name for added in opened.added)]
        number = int(expert) if expert is not None and expert.isdigit() and expert not in names else None
        opened = with_added(opened, speaker=speaker, expert=expert if number is None else None)
        if opened.voice >= 0 and (number is not None or shares or mean):
            name = opened.added[opened.voice].name
            raise UsageError(f"{name} is used without routed experts: omit --weights, --routing and an expert's number")
        if merging and opened.voice < 0:
            number = opened.group if opened.group >= 0 else number
            fixed = fixed_routing(opened.info, opened.folder, expert=number, weights=shares, mean=mean)
        export_model(opened, target, folder, routing=fixed, base_name=base, quantization=quantization)
    echo(out)
    if shares or mean:
        echo(f"all utterances use one routing; to measure its cost: moe-asr evaluate {out} CORPUS", err=True)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--weights", help="Weight of each model, such as 0.7,0.3. Equal by default.")
@with_options(out_options)
@with_store
def merge(
    models: tuple[str, ...],
    out: Path,
    weights: str | None,
    overwrite: bool,
    store_url: str,
    endpoint_url: str | None,
) -> None:
    """Make one model from several runs: the weighted mean of what their adapters add to the base.

    MODELS are runs' names or folders of models, trained on one base with the same targets. Mixtures can be merged where
    they have the same gate. Extensions of one model become that model with all their added experts, exactly.

    \b
        moe-asr merge seed-1 seed-2 --out out/merged
    """
    from common.export.join import join_extensions
    from common.export.merge import MARK, merge_models
    from common.inference.load_model import find_model
    from stages.local_runner import cache_folder

    if len(models) < 2:
        raise UsageError(f"merge {models[0]}: give two models or more")
    shares = numbers(weights, "--weights") or [1 / len(models)] * len(models)
    if len(shares) != len(models):
        raise UsageError(f"--weights {weights}: {len(shares)} numbers for {len(models)} models")
    store = open_store(store_url, endpoint_url=endpoint_url)
    with new_folder(out, overwrite=overwrite, mark=MARK) as folder:
        found = [find_model(name, store, cache_folder(), endpoint_url) for name in models]
        folders, added = [folder for folder, _ in found], [experts for _, experts in found]
        if any(added):
            if weights:
                raise UsageError("--weights is not for extensions: their experts are kept as they are")
            names = join_extensions(folders, added, folder)
            (folder / MARK).write_text(json.dumps({"models": list(models), "added": names}) + "\n", encoding="utf-8")
            echo(f"{out}: {len(names)} added experts")
            return
        rank = merge_models(folders, shares, folder)
        said = {"models": list(models), "weights": shares, "rank": rank}
        write_object(folder / MARK, said)
    echo(f"{out}: rank {rank}")
