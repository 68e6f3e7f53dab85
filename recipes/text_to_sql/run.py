"""Training, prediction and evaluation, from the parts of this package."""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from common.errors import DataError, UsageError
from common.pipeline.metrics import MetricsLog
from common.signals import handle_signals
from common.storage import open_store
from common.storage.checkpoint import Checkpointer
from common.training.train import TrainOptions, make_accelerator
from common.training.train import train as train_loop
from recipes.text_to_sql.data import (
    Example,
    epoch_batches,
    file_lines,
    find_database,
    make_examples,
    make_loader,
    read_lines,
)
from recipes.text_to_sql.generate import generate
from recipes.text_to_sql.metrics import score
from recipes.text_to_sql.model import TextToSql, from_scratch, pretrained, save
from recipes.text_to_sql.settings import Settings
from recipes.text_to_sql.sql import Limits, Outcome, run_queries, write_lines, write_records

log = logging.getLogger(__name__)
Scores = dict[str, float]
SPLITS, KINDS = ("train", "dev"), ("nl", "sql")  # of the pairs from which a model is trained and selected


def train(settings: Settings) -> Scores:
    """Trains; leaves `model/`, `metrics.jsonl` and `result.json` in the experiment's folder and returns the result.

    An interrupted training continues from its last checkpoint; a finished training is not repeated.

    Raises:
        UsageError, DataError: settings or data are invalid.
        Preempted: the process received a signal to stop; a checkpoint is written.
    """
    settings.check()
    done = settings.folder / "result.json"
    if done.is_file():
        settings.claim(training_files(settings))
        log.info("%s is trained already", settings.folder)
        return dict(json.loads(done.read_text(encoding="utf-8")))
    texts = {name: [read_lines(settings.data, name, kind) for kind in KINDS] for name in SPLITS}
    database = None if settings.skip_record_computation else find_database(settings)
    accelerator = make_accelerator("bf16" if settings.bf16 else "fp16" if settings.fp16 else "auto", settings.device)
    if accelerator.num_processes > 1:
        raise UsageError("the recipe trains in one process: start it without torchrun")
    model, tokenizer = open_model(settings, *texts["train"])
    examples, dev = (make_examples(tokenizer, *texts[name]) for name in ("train", "dev"))
    model.t5.generation_config.max_new_tokens = max(len(example.labels) for example in [*examples, *dev]) * 11 // 10 + 1
    model.to(accelerator.device)
    if settings.compile:
        model.compile(dynamic=True)
    settings.claim(training_files(settings))
    torch.manual_seed(settings.seed)
    checkpointer = Checkpointer(open_store(settings.folder), "checkpoints/", scratch=settings.folder)
    abandoned = threading.Event()
    with handle_signals() as stopping, ThreadPoolExecutor(1) as beside:

        def given_up() -> bool:
            return abandoned.is_set() or stopping()

        try:
            judge = make_judge(settings, database, texts["dev"][1], given_up) if database else None
            look = make_evaluate(model, tokenizer, dev, judge, accelerator, settings, beside)
            outcome = train_loop(
                model,
                accelerator=accelerator,
                groups=[{"params": list(model.parameters()), "rate": 1.0, "weight_decay": settings.weight_decay}],
                plan_epoch=partial(epoch_batches, examples, settings.batch_size, settings.seed),
                load=make_loader(examples, accelerator.device),
                evaluate=look,
                options=loop_options(settings),
                checkpointer=checkpointer,
                metrics=MetricsLog(settings.folder / "metrics.jsonl"),
                stopping=stopping,
                label=settings.experiment_name,
            )
        finally:
            abandoned.set()
    value = {"loss": outcome.value} if settings.skip_record_computation else {"record_f1": 1 - outcome.value}
    result: Scores = {"steps": outcome.steps, "best_step": outcome.best_step, **value}
    save(model, tokenizer, settings.folder / "model")
    write_lines(done, [json.dumps(result)])
    checkpointer.clear()
    return result


def training_files(settings: Settings) -> list[Path]:
    """The files on whose contents the result of a training depends."""
    files = [settings.data / f"{split}.{kind}" for split in SPLITS for kind in KINDS]
    return files if settings.skip_record_computation else [*files, find_database(settings)]


def open_model(settings: Settings, questions: Sequence[str], queries: Sequence[str]) -> tuple[TextToSql, Any]:
    """The initial model of the training, with its tokenizer."""
    if not settings.finetune:
        texts = [*questions, *queries]
        return from_scratch(texts, width=settings.width, layers=settings.layers, seed=settings.seed)
    torch.manual_seed(settings.seed)  # characters that the vocabulary lacks get random embeddings
    model, tokenizer = pretrained(settings.model, queries)
    altered = sum(
        tokenizer.decode(tokenizer(q)["input_ids"], skip_special_tokens=True).split() != q.split() for q in queries
    )
    if altered:
        log.warning("%d of %d training queries are altered by the model's tokenizer", altered, len(queries))
    return model, tokenizer


def loop_options(settings: Settings) -> TrainOptions:
    """Options of the training loop."""
    skip = settings.skip_record_computation
    return TrainOptions(
        learning_rate=settings.learning_rate,
        epochs=settings.max_n_epochs,
        warmup_ratio=settings.num_warmup_epochs / settings.max_n_epochs,
        schedule=settings.scheduler_type,
        patience=settings.patience_epochs,
        eval_every_n_epochs=1 if skip else settings.eval_every_n_epochs,
        select_by="loss" if skip else "record_error",
        save_every_n_epochs=1,
        save_only_best=settings.save_only_best,
    )


def make_judge(
    settings: Settings, database: Path, gold: Sequence[str], stopping: Callable[[], bool]
) -> Callable[[Sequence[str]], Scores]:
    """A function that scores queries by their records.

    Args:
        gold: the correct queries, in order.
        stopping: ends running queries when it is true.
    """
    limits, threads = Limits(settings.sql_timeout), settings.sql_threads
    known = run_queries(database, gold, threads=threads, limits=limits, stopping=stopping)
    if failed := sum(bool(outcome.error) for outcome in known.values()):
        log.warning("%d gold queries of dev fail themselves: no prediction can match them", failed)

    def judge(texts: Sequence[str]) -> Scores:
        nonlocal known  # the next epoch's queries are mostly the same
        known = run_queries(database, [*texts, *gold], threads=threads, limits=limits, known=known, stopping=stopping)
        return score(texts, gold, known)

    return judge


def make_evaluate(
    model: TextToSql,
    tokenizer: Any,
    examples: Sequence[Example],
    judge: Callable[[Sequence[str]], Scores] | None,
    accelerator: Accelerator,
    settings: Settings,
    beside: Executor,
) -> Callable[[nn.Module, bool], Scores | Callable[[], Scores]]:
    """The evaluation function for the loop: loss on dev and, if `full`, scores of the records of generated queries.

    Args:
        examples: examples of dev.
        judge: scores queries; None if only the loss is used.
        beside: executor that computes records during training, if the settings request it.
    """
    batches = epoch_batches(examples, settings.eval_batch_size, 0, 0)
    load = make_loader(examples, accelerator.device)

    def scored(loss: float, texts: list[str]) -> Scores:
        assert judge
        scores = judge(texts)
        log.info("dev: loss %.4f, %s", loss, ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        return {"loss": loss, **scores, "record_error": 1 - scores["record_f1"]}

    def evaluate(wrapped: nn.Module, full: bool) -> Scores | Callable[[], Scores]:
        with accelerator.autocast():
            sums = [torch.stack([wrapped(batch)[0].float(), batch.weight.float()]) for batch in load(batches)]
            total, tokens = torch.stack(sums).sum(0).tolist()
            if judge is None or not full:
                return {"loss": total / tokens}
            texts = generate(model, tokenizer, examples, settings.num_beams, settings.eval_batch_size)
        if settings.async_eval:
            return beside.submit(scored, total / tokens, texts).result
        return scored(total / tokens, texts)

    return evaluate


def predict(settings: Settings, split: str) -> list[str]:
    """Writes the queries and records of a split with the trained model; returns the queries.

    Raises:
        DataError: there is no trained model, or there are no questions.
    """
    settings.check()
    if not (settings.folder / "result.json").is_file():
        raise DataError(
            f"{settings.folder} contains no finished training: run `train` with this --experiment_name first"
        )
    model, tokenizer = pretrained(str(settings.folder / "model"), [])
    device = make_accelerator("fp32", settings.device).device
    examples = make_examples(tokenizer, read_lines(settings.data, split, "nl"))
    queries = generate(model.to(device).eval(), tokenizer, examples, settings.num_beams, settings.eval_batch_size)
    outcomes = run_split(settings, queries)
    write_records(settings.folder / f"{split}.records.jsonl", [outcomes[query] for query in queries])
    write_lines(settings.folder / f"{split}.sql", queries)
    log.info("%s: %d queries in %s.sql, their records beside it", split, len(queries), settings.folder / split)
    return queries


def evaluate(settings: Settings, split: str, predicted: Path | None) -> Scores:
    """Scores of a file of queries, or of new queries from the trained model."""
    settings.check()
    gold = read_lines(settings.data, split, "sql")
    queries = file_lines(predicted, "--predicted names a file of queries") if predicted else predict(settings, split)
    if len(queries) != len(gold):
        raise DataError(f"{predicted} has {len(queries)} queries and {split}.sql {len(gold)}: line n belongs to line n")
    return score(queries, gold, run_split(settings, [*queries, *gold]))


def run_split(settings: Settings, queries: Sequence[str]) -> dict[str, Outcome]:
    """The outcome of each query on the data's database."""
    return run_queries(
        find_database(settings), queries, threads=settings.sql_threads, limits=Limits(settings.sql_timeout)
    )
