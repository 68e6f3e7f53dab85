"""A model's results on a test set, read from a finished run or from a folder written by `evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from common.data.features import describe_context
from common.errors import DataError
from common.evaluation.breakdown import score_of
from common.evaluation.wer import Score
from common.json_files import Row, read_object, read_rows
from common.pipeline.runs import find_run, recorded_states, run_names, stage_folders
from common.sections import text_language
from common.storage.store import Store

BASE = "base"  # what the model before training is called


@dataclass(frozen=True)
class Result:
    """Results of one model on a test set.

    Attributes:
        rows: of the utterances, as in predictions.jsonl.
        scores: by utterance id.
        facts: facts about the training, as far as known: seconds, samples_per_second, trained_parameters, experts,
            load, …; language is that of the texts; steps are those of joint training and, before it, of experts alone.
    """

    name: str
    rows: list[Row]
    scores: dict[str, Score]
    facts: Row


def read_result(name: str, *, store: Store | None, cache: Path) -> Result:
    """Reads the result of a finished run (by its name or folder) or of a folder written by `evaluate`.

    Args:
        store: store in which runs are looked up by name.
        cache: folder for artifacts downloaded from a remote store.

    Raises:
        DataError: there is no such run or folder, or the run has not finished.
    """
    folder = Path(name)
    if (folder / "evaluation.json").is_file():
        facts = read_object(folder / "evaluation.json")
        rows = read_rows(folder / "predictions.jsonl")
        kept = {key: facts.get(key) for key in ("load", "decoding", "language", "model")}
        kept["audio_context"] = describe_context(facts["context"], facts["margin"])
        return _result(name, rows, facts["language"], kept | {"experts": (facts["mixture"] or {}).get("experts")})
    if (run := find_run(name, store)) is None:
        names = f"; runs in {store.url}: {', '.join(run_names(store)) or 'none'}" if store else ""
        raise DataError(f"{name!r} is neither a run nor a folder with evaluation.json{names}")
    where, record = run
    if record.get("extends") is not None:
        raise DataError(
            f"{record['name']} is a model with added experts, which no run has tested: compare the folder that "
            f"`moe-asr evaluate {record['name']} CORPUS` writes"
        )
    model = stage_folders(where, record, "asr", cache)[0]
    rows = read_rows(model / "predictions.jsonl")
    facts = _facts_of_run(where, record, model)
    return _result(record["name"], rows, facts["language"], facts)


def before_training(result: Result) -> Result:
    """The base model's result on the same test set, as measured by the run of `result`.

    Raises:
        DataError: the run did not measure the base model.
    """
    if not all("hypothesis_before" in row for row in result.rows):
        raise DataError(f"{result.name} contains no transcripts of its base model: name a run, or evaluate the base")
    facts = {key: result.facts.get(key) for key in ("decoding", "language")}
    facts["speakers_in_train"] = result.facts.get("speakers_in_train")
    facts["audio_context"] = result.facts.get("audio_context_before")
    language, published = facts["language"] or "en", _published(facts)
    scores = {str(row["id"]): score_of(row, language, "hypothesis_before", published=published) for row in result.rows}
    return Result(BASE, result.rows, scores, facts)


def _result(name: str, rows: list[Row], language: str, facts: Row) -> Result:
    published = _published(facts)
    return Result(name, rows, {str(row["id"]): score_of(row, language, published=published) for row in rows}, facts)


def _published(facts: Row) -> bool:
    """Whether texts were compared by Whisper's normaliser alone, as in older versions, which did not record it."""
    return bool((facts.get("decoding") or {}).get("normaliser", "published") == "published")


def _facts_of_run(store: Store, record: Row, model: Path) -> Row:
    stages = record["timeline"]
    pretrained = [s.manifest for stage in ("shared", "experts") for _, _, s in recorded_states(store, record, stage)]
    before = sum(manifest.metrics.get("steps", 0) for manifest in pretrained if manifest)
    report, rates, summary = (
        read_object(model / name) if (model / name).is_file() else {}
        for name in ("report.json", "throughput.json", "summary.json")
    )
    contexts, texts = summary.get("audio_context") or {}, record["config"]["model"]
    names = ("trained_parameters", "experts", "top_k", "load", "router_entropy", "collapsed", "mixture")
    return {
        "seconds": sum(entry["seconds"] for entry in stages),
        "asr_seconds": sum(entry["seconds"] for entry in stages if entry["stage"] == "asr"),
        "seed": record["config"]["seed"],
        "decoding": record["config"]["decode"],
        "language": text_language(texts["language"], texts.get("task", "transcribe")),
        "speakers_in_train": summary.get("speakers_in_train"),
        "audio_context": contexts.get("after"),
        "audio_context_before": contexts.get("before"),
        **{key: report.get(key) for key in names},
        "steps": report["steps"] + before if "steps" in report else None,
        **{key: rates.get(key) for key in ("samples_per_second", "audio_seconds_per_second")},
    }
