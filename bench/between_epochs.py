"""Time between epochs: the text-to-SQL recipe against a typical script.

The typical script, below, answers dev in file order, 16 questions after another with up to 512 tokens each, runs the
predicted and gold queries in ten threads, and saves model and optimizer twice. Both sides look at the same half-trained
model on 466 dev questions. An epoch's gap is the time from its last step to the next epoch's first batch.
"""

import itertools
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.measure import Measurement, row
from common.errors import Preempted
from recipes.text_to_sql import run
from recipes.text_to_sql.data import Batch, make_examples, make_loader, read_lines
from recipes.text_to_sql.flights import write_demo
from recipes.text_to_sql.metrics import record_f1
from recipes.text_to_sql.model import TextToSql, pretrained
from recipes.text_to_sql.settings import Settings

DEV, EPOCHS = 466, 20
GAPS = 2  # measured, of the 19
SECONDS = 10.0  # after which either side gives up a query
SETTINGS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("full monitoring", {}, 5.0),
    ("full, --save_only_best", {"save_only_best": True}, 5.0),
    ("full, --async_eval", {"async_eval": True}, 5.0),
    ("loss only, --eval_every_n_epochs", {"eval_every_n_epochs": 100}, 35.0),
    ("loss only, --skip_record_computation", {"skip_record_computation": True}, 35.0),
)


def rows(*, pairs: int = 2000, width: int = 64, warm: int = 8) -> list[Measurement]:
    """Measures each setting's gap, and from it and the epoch's steps the time of 20 epochs.

    Args:
        pairs: training pairs.
        width: of the model.
        warm: epochs before measuring, so that queries are as good and as bad as in the middle of a training.
    """
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_demo(data, train=pairs, dev=DEV, test=1, flights=6000, seed=0)
        begun = Settings(data, output=Path(folder), experiment_name="warm", finetune=False, width=width, layers=1)
        begun = replace(begun, learning_rate=3e-3, batch_size=32, sql_timeout=SECONDS)
        run.train(replace(begun, max_n_epochs=warm, skip_record_computation=True))
        model = str(begun.folder / "model")
        peer = usual_gap(model, data)
        for number, (name, options, target) in enumerate(SETTINGS):
            chosen = replace(begun, experiment_name=str(number), finetune=True, model=model, max_n_epochs=EPOCHS)
            epoch, gap = measured(replace(chosen, learning_rate=1e-3, **options))
            note = (
                f"{DEV} dev examples, {pairs} training pairs, T5 of width {width}; an epoch's steps take {epoch:.1f} s"
            )
            measurements.append(row(f"gap between epochs: {name}", gap, peer, unit="s", target=target, note=note))
            total, theirs = EPOCHS * (epoch + gap), EPOCHS * (epoch + peer)
            measurements.append(
                row(f"{EPOCHS} epochs: {name}", total, theirs, unit="s", target=3.0, note="epoch + gap, times 20")
            )
    return measurements


def measured(settings: Settings) -> tuple[float, float]:
    """Trains until the third epoch begins; returns the mean seconds of an epoch's steps and of a gap."""
    steps: list[list[float]] = []  # times of an epoch's first batch and of each step's end

    def make_timed_loader(*arguments: Any) -> Any:
        load = make_loader(*arguments)

        def timed(batches: Sequence[list[int]]) -> Iterator[Batch]:
            steps.append([])
            for batch in load(batches):
                steps[-1] = steps[-1] or [time.perf_counter()]
                yield batch

        return timed

    def step_is_done() -> bool:
        steps[-1].append(time.perf_counter())
        return sum(len(times) > 1 for times in steps) > GAPS

    with (
        patch.object(run, "make_loader", make_timed_loader),
        patch.object(run, "handle_signals", lambda: nullcontext(step_is_done)),
        suppress(Preempted),
    ):
        run.train(settings)
    epochs = [times for times in steps if len(times) > 1]  # dev is loaded too, without steps
    gaps = [after[0] - before[-1] for before, after in itertools.pairwise(epochs)]
    lengths = [times[-1] - times[0] for times in epochs[:GAPS]]
    return sum(lengths) / len(lengths), sum(gaps) / len(gaps)


def usual_gap(folder: str, data: Path) -> float:
    """Seconds between two epochs of the usual script."""
    questions, gold = (read_lines(data, "dev", kind) for kind in ("nl", "sql"))
    model, tokenizer = pretrained(folder, gold)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # its moments exist
    model.eval()
    since = time.perf_counter()
    predicted = usual_generation(model, tokenizer, questions, gold)
    results = usual_records(data / "flights.db", [*predicted, *gold])
    for ours, theirs in zip(results[: len(gold)], results[len(gold) :], strict=True):
        record_f1(ours, theirs)
    for name in ("last", "best"):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, data / f"{name}.pt")
    return time.perf_counter() - since


def usual_generation(model: TextToSql, tokenizer: Any, questions: list[str], gold: list[str]) -> list[str]:
    """Loss and queries of dev, batch after batch."""
    predicted: list[str] = []
    examples = make_examples(tokenizer, questions, gold)
    numbers = list(range(len(examples)))
    for batch in make_loader(examples, model.t5.device)([numbers[i : i + 16] for i in range(0, len(numbers), 16)]):
        with torch.no_grad():
            model(batch)
            ids_BO = model.t5.generate(
                input_ids=batch.inputs_BI,
                attention_mask=batch.mask_BI,
                num_beams=5,
                do_sample=False,
                max_new_tokens=512,
            )
        predicted += tokenizer.batch_decode(ids_BO, skip_special_tokens=True)
    return predicted


def usual_records(database: Path, queries: list[str]) -> list[list[Any]]:
    """Records of each query, of ten threads; a query still running at the end of the time counts as empty."""
    connections = []

    def records_of(query: str) -> list[Any]:
        connection = sqlite3.connect(database, check_same_thread=False)
        connections.append(connection)
        try:
            return connection.execute(query).fetchall()
        except Exception:
            return []

    pool = ThreadPoolExecutor(10)
    futures = [pool.submit(records_of, query) for query in queries]
    done, _ = wait(futures, timeout=SECONDS + len(queries) / 10)
    records = [future.result() if future in done else [] for future in futures]
    pool.shutdown(wait=False, cancel_futures=True)
    for connection in connections:  # the usual script leaves them running; a benchmark must not
        connection.interrupt()
    return records
