"""The model card of a finished run, in Hugging Face's format, with facts from the run's results and
configuration only.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from common import __version__
from common.config import Config
from common.data.corpus import Utterance, shared_speakers
from common.markdown import Markdown, code, escape, shell_word
from common.report.page import clock, percent
from common.storage.manifest import Manifest

SMALL_SAMPLE = 10  # speakers; below this, an interval over them is unreliable
# Inputs of joint training, in the words of the card.
PRE_TRAINED = {
    "gate": "a pre-trained gate",
    "shared": "a pre-trained shared expert",
    "experts": "pre-trained experts",
}
HUB = "hub:"  # prefix of a base model's digest where it was looked up on the hub


def model_card(
    config: Config,
    *,
    summary: Mapping[str, Any],
    report: Mapping[str, Any],
    manifest: Manifest,
    model_digest: str,
    corpus_digest: str,
    utterances: Sequence[Utterance],
) -> str:
    """The card as text: YAML head and Markdown.

    Args:
        summary: `summary.json` of the run.
        report: `report.json` of the asr stage.
        manifest: of the asr stage's artifact.
        model_digest: the base model's digest in keys.
        corpus_digest: the corpus's digest in keys.
        utterances: those of the corpus, in all splits.
    """
    import jinja2

    text = (files("common.report.templates") / "model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=escape
    )
    environment.filters |= {"rate": percent, "code": code, "word": shell_word}
    shared = len(shared_speakers(utterances))
    body = environment.from_string(text).render(
        name=config.run,
        version=__version__,
        what=_what(config, report),
        base_told=_base_told(config, model_digest),
        summary=summary,
        in_train=f", {known} of them also in train" if (known := summary.get("speakers_in_train")) else "",
        contexts=f" (audio context: {used['before']} before, {used['after']} after)"
        if (used := summary.get("audio_context"))
        else "",
        unified=config.decode.normaliser == "unified",
        rows=_rows(summary),
        facts=_facts(config, summary, report, manifest),
        corpus=PurePosixPath(config.corpus.path).name,
        digest=corpus_digest,
        splits=_splits(utterances),
        shared_told=f"Speakers in more than one split: {shared}." if shared else "No speaker is in two splits.",
        limits=_limits(config, summary, report),
        manifest=manifest,
    )
    return f"---\n{_head(config, summary, report, model_digest)}\n---\n\n{body}\n"


def _head(config: Config, summary: Mapping[str, Any], report: Mapping[str, Any], model_digest: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data_name = PurePosixPath(config.corpus.path).name
    results = [
        EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type=data_name,
            dataset_name=data_name,
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric.upper()} (%), normalised, clipped",
            metric_value=round(100 * summary[f"{metric}_after"], 2),
        )
        for metric in ("wer", "cer")
    ]
    full = config.asr.adapt == "full"
    tags = ["whisper", "atypical-speech"] + (["full-fine-tune"] if full else ["lora"])
    tags += ["mixture-of-experts"] if report.get("experts", 1) > 1 else []
    hub = model_digest.startswith(HUB)  # the name of a local folder would be taken for one of the hub's
    relation: dict[str, Any] = {"base_model_relation": "finetune" if full else "adapter"} if hub else {}
    languages = list(dict.fromkeys((config.model.language, config.model.text_language)))
    data = ModelCardData(
        base_model=config.model.name if hub else None,
        **relation,
        model_name=config.run,
        language=languages if len(languages) > 1 else languages[0],
        library_name="moe-asr",
        pipeline_tag="automatic-speech-recognition",
        metrics=["wer", "cer"],
        tags=tags,
        eval_results=results,
    )
    return str(data.to_yaml()).strip()


def _what(config: Config, report: Mapping[str, Any]) -> str:
    experts = report.get("experts", 1)
    if config.asr.adapt == "full":
        return "Whisper with all weights fine-tuned."
    if experts < 2:
        return "Whisper with one LoRA adapter, always on."
    kind = {"blend": "blended in each layer", "loss": "mixed by their losses", "hard": "one per utterance"}
    how = kind[config.asr.mixture]
    top = f"top {config.asr.top_k} of them {how}" if config.asr.mixture != "hard" else how
    dropped = sum(row["dropped"] for row in report.get("experts_judged") or ())
    without = f" {dropped} of them were dropped, because they did not lower the loss on dev." if dropped else ""
    chosen = "by a gate from the frozen encoder's embedding"
    if config.asr.route_by == "table":
        chosen = f"by the speaker's or utterance's {config.asr.route_column}"
    return f"Whisper with {experts} LoRA experts, {top}, chosen {chosen}.{without}"


def _base_told(config: Config, model_digest: str) -> Markdown:
    if model_digest.startswith(HUB):
        return Markdown(f"{code(config.model.name)}, revision {code(config.model.revision or 'main')}")
    return Markdown(f"the local checkpoint {code(PurePosixPath(config.model.name).name)} ({escape(model_digest)})")


def _rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{"name": name, **values} for name, values in summary["by_etiology"].items()]
    rows.append({"name": "overall", **{key: value for key, value in summary.items() if key != "by_etiology"}})
    for row in rows:
        low, high = row["wer_interval_after"]
        row["bounds"] = f"{percent(low)} to {percent(high)}" if row["speakers"] > 1 else "one speaker"
    return rows


def _facts(
    config: Config, summary: Mapping[str, Any], report: Mapping[str, Any], manifest: Manifest
) -> list[tuple[str, str]]:
    """Facts about the training, from configuration and report."""
    lora, asr = config.lora, config.asr
    facts = []
    if asr.adapt != "full":
        facts.append(("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)} ({lora.modules})"))
        start = [text for name, text in PRE_TRAINED.items() if manifest.inputs.get(name)]
        facts.append(("started from", ", ".join(start) or "new adapters"))
    facts += [
        ("trained parameters", f"{report['trained_parameters']:,}"),
        (
            "optimiser steps of joint training",
            f"{report['steps']:,}; the weights of step {report['best_step']:,} are kept",
        ),
        ("kept by", "decoded WER on dev" if asr.select_by == "wer" else "loss on dev"),
        ("precision", config.precision),
        ("seed", str(config.seed)),
        ("audio", f"context {config.audio.context}, margin {config.audio.margin} encoder positions"),
        ("time by stage", ", ".join(f"{stage} {clock(value)}" for stage, value in summary["seconds"].items())),
    ]
    return facts


def _splits(utterances: Sequence[Utterance]) -> list[dict[str, Any]]:
    splits = []
    for name in dict.fromkeys(u.split for u in utterances):
        of_split = [u for u in utterances if u.split == name]
        hours = f"{sum(u.duration for u in of_split) / 3600:.2f}"
        speakers = len({u.speaker or u.id for u in of_split})
        splits.append({"name": name, "utterances": len(of_split), "hours": hours, "speakers": speakers})
    return splits


def _limits(config: Config, summary: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Limits of the reported figures."""
    groups, texts = summary["by_etiology"], config.model.text_language
    told = code(texts) + (f", on speech in {code(config.model.language)}," if texts != config.model.language else "")
    limits = []
    if summary["speakers"] < SMALL_SAMPLE:
        limits.append(
            f"{summary['speakers']} speakers are few: other speakers will differ by more than the interval says."
        )
    if single := [name for name, values in groups.items() if values["speakers"] == 1]:
        limits.append(f"One speaker alone stands for: {', '.join(single)}.")
    if worse := [name for name, values in groups.items() if values["wer_after"] > values["wer_before"]]:
        limits.append(f"WER rose for: {', '.join(worse)}.")
    if report.get("collapsed"):
        limits.append("The experts collapsed: almost all routing goes to few of them.")
    limits += [
        Markdown(f"Trained and scored in language {told} on this one corpus; nothing is known of others."),
        f"Audio has to be encoded as in training (context {config.audio.context}); tools that pad otherwise differ.",
        "Groups are as the corpus labels them. Neither clusters nor experts say anything about a person's health.",
        "The licences of the base model and of the corpus apply; this card does not know them.",
    ]
    return limits
