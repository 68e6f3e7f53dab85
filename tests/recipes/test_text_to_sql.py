"""The recipe: hostile queries harm nobody, metrics are what one computes by hand, resumed equals uninterrupted."""

import copy
import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from common.errors import DataError, Preempted, UsageError
from recipes.text_to_sql import run, sql
from recipes.text_to_sql.__main__ import cli
from recipes.text_to_sql.data import epoch_batches, find_database, make_examples, make_loader, read_lines
from recipes.text_to_sql.flights import make_pairs, write_demo
from recipes.text_to_sql.generate import generate
from recipes.text_to_sql.metrics import record_f1, score
from recipes.text_to_sql.model import TextToSql, add_missing, from_scratch, make_tokenizer, pretrained, save
from recipes.text_to_sql.settings import Settings
from recipes.text_to_sql.sql import Limits, Outcome, run_queries

QUICK = Limits(seconds=5.0)
RUNAWAY = "SELECT COUNT(*) FROM t a, t b, t c, t d"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A small demonstration corpus."""
    folder = tmp_path_factory.mktemp("pairs")
    write_demo(folder, train=40, dev=4, test=4, flights=300, seed=0)
    return folder


def micro_settings(data, output):
    return Settings(
        data,
        output=output,
        finetune=False,
        width=32,
        layers=1,
        learning_rate=1e-2,
        batch_size=8,
        max_n_epochs=3,
        num_beams=2,
        device="cpu",
    )


@pytest.fixture
def settings(pairs, tmp_path):
    return micro_settings(pairs, tmp_path)


def run_one(database, query, limits=QUICK):
    return run_queries(database, [query], threads=1, limits=limits)[query]


# Metrics


@pytest.mark.parametrize(
    ("ours", "gold", "expected"),
    [
        ([(1,), (2,)], [(2,), (1,)], 1.0),  # order does not count
        ([(1,), (1,)], [(1,)], 1.0),  # nor repetition
        ([(1,), (2,), (3,)], [(3,)], 0.5),  # precision 1/3, recall 1
        ([(1,), (2,)], [(2,), (3,)], 0.5),
        ([], [(1,)], 0.0),
        ([(1,)], [], 0.0),
        ([], [], 1.0),
        ([("1",)], [(1,)], 0.0),  # a text is no number
    ],
)
def test_record_f1_is_what_one_computes_by_hand(ours, gold, expected):
    assert record_f1(ours, gold) == pytest.approx(expected)


def test_scores_of_four_queries_are_what_one_computes_by_hand():
    outcomes = {
        "a": Outcome(((1,), (2,))),
        "a  again": Outcome(((1,), (2,))),
        "half": Outcome(((1,),)),
        "broken": Outcome(error="syntax"),
        "none": Outcome(),
    }
    scores = score(
        ["a", "a  again", "half", "broken"], ["a", "a again", "a", "none"], outcomes | {"a again": outcomes["a"]}
    )
    assert scores == pytest.approx(
        {"record_f1": (1 + 1 + 2 / 3 + 0) / 4, "record_em": 2 / 4, "sql_em": 2 / 4, "error_rate": 1 / 4}
    )


# Queries


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELEC x FROM t", "syntax error"),
        ("", "not a query"),
        ("-- nothing", "not a query"),
        ("SELECT z FROM t", "no such column"),
        ("INSERT INTO t VALUES (1, 'a')", "not authorized"),
        ("DROP TABLE t", "not authorized"),
        ("CREATE TEMP TABLE u (x)", "not authorized"),
        ("ATTACH 'other.db' AS other", "not authorized"),
        ("VACUUM INTO 'copy.db'", "authoriz"),
        ("PRAGMA query_only = 0", "not authorized"),
        ("SELECT * FROM pragma_table_info('t')", "not authorized"),
        ("BEGIN", "not authorized"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT '\x00'", "null character"),
        ("SELECT '\ud800'", "surrogates"),
        ("SELECT randomblob(1000000000)", "not authorized to use function: randomblob"),
        ("SELECT zeroblob(900000) FROM t", "not authorized to use function: zeroblob"),
        (f"SELECT replace(group_concat(y), 'n', '{'9' * 400}') FROM t", "too big"),
        ("SELECT (SELECT group_concat(y) FROM t) FROM t a, t b", "over 10000000 bytes"),
        ("SELECT * FROM t a, t b", "over 1000 rows"),
        (RUNAWAY, "stopped after 0.2 s"),
        ("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT MAX(n) FROM r", "stopped after 0.2 s"),
    ],
)
def test_a_hostile_query_is_an_error_of_its_own_and_nothing_else_is_harmed(table, query, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = hashlib.sha256(table.read_bytes()).digest()
    limits = Limits(seconds=0.2, rows=1000)
    outcomes = run_queries(table, ["SELECT x FROM t WHERE x < 2", query, "SELECT 1"], threads=2, limits=limits)
    assert reason in outcomes[query].error and not outcomes[query].rows
    assert outcomes["SELECT x FROM t WHERE x < 2"] == Outcome(((0,), (1,)))
    assert outcomes["SELECT 1"] == Outcome(((1,),))
    assert hashlib.sha256(table.read_bytes()).digest() == before
    assert not list(tmp_path.iterdir())
    assert [path.name for path in table.parent.iterdir()] == [table.name]


@pytest.mark.parametrize(
    "query",
    [
        RUNAWAY,
        "SELECT a.x FROM t a, t b, t c ORDER BY a.x * b.x",
        "SELECT count(DISTINCT a.x * b.x) FROM t a, t b, t c",
    ],
)
def test_the_deadline_ends_a_runaway_query_within_one_and_a_half_times_of_it(table, query):
    def seconds():
        since = time.monotonic()
        assert "stopped" in run_one(table, query, Limits(seconds=0.6)).error
        return time.monotonic() - since

    assert min(seconds() for _ in range(3)) < 0.9  # of three: this machine may have other work


def test_deadlines_run_side_by_side(table):
    queries = [RUNAWAY + f" WHERE a.x > {number}" for number in range(8)]
    since = time.monotonic()
    outcomes = run_queries(table, queries, threads=8, limits=Limits(seconds=0.5))
    assert time.monotonic() - since < 8 * 0.5 and all("stopped" in outcome.error for outcome in outcomes.values())


def test_sorting_a_cross_join_runs_out_of_its_own_memory_only(table):
    code = f"""
from pathlib import Path
from recipes.text_to_sql import sql
sql.HEAP_BYTES = 20_000_000
greedy = "SELECT a.x FROM t a, t b ORDER BY a.x * b.x"
found = sql.run_queries(Path({str(table)!r}), [greedy, "SELECT SUM(x) FROM t"], threads=2, limits=sql.Limits())
print(found[greedy].error, found["SELECT SUM(x) FROM t"].rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "out of memory ((4498500,),)\n"


def test_values_come_back_as_they_are_and_blobs_as_hex_text(table):
    rows = run_one(table, "SELECT 1, 2.5, 'é', NULL, x'00ff', CAST(x'ff' AS TEXT)").rows
    assert rows == ((1, 2.5, "é", None, "00ff", "�"),)


def test_results_do_not_depend_on_the_number_of_threads(pairs):
    queries = [*read_lines(pairs, "train", "sql"), "broken", "SELECT 1"]
    results = [run_queries(find_database(Settings(pairs)), queries, threads=n, limits=QUICK) for n in (1, 5, 32)]
    assert results[0] == results[1] == results[2] and list(results[0]) == list(results[2])


def test_identical_and_known_queries_run_once(table, monkeypatch):
    ran = Counter()
    original = sql.QueryProcess.ask
    monkeypatch.setattr(
        sql.QueryProcess, "ask", lambda process, query: (ran.update([query]), original(process, query))[1]
    )
    known = {"SELECT 2": Outcome(((2,),))}
    outcomes = run_queries(table, ["SELECT 1"] * 9 + ["SELECT 2"], threads=4, limits=QUICK, known=known)
    assert ran == {"SELECT 1": 1} and outcomes["SELECT 2"] is known["SELECT 2"]


def test_a_file_that_is_no_database_is_the_users_to_mend(tmp_path):
    (tmp_path / "x.db").write_text("this is no database, but long enough to look at" * 30)
    assert "not a database" in run_one(tmp_path / "x.db", "SELECT * FROM t").error
    with pytest.raises(DataError, match="unable to open"):
        run_one(tmp_path / "none.db", "SELECT 1")


# Data


def test_the_demonstration_is_the_same_for_a_seed_and_every_query_of_it_runs(pairs, tmp_path):
    write_demo(tmp_path, train=40, dev=4, test=4, flights=300, seed=0)
    for path in pairs.glob("*.*l"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    dumps = [tuple(sqlite3.connect(folder / "flights.db").iterdump()) for folder in (pairs, tmp_path)]
    assert dumps[0] == dumps[1]
    made = make_pairs(300, seed=1)
    assert len({question for question, _ in made}) == 300
    outcomes = run_queries(pairs / "flights.db", [query for _, query in made], threads=2, limits=QUICK)
    assert not any(outcome.error for outcome in outcomes.values())
    assert sum(bool(outcome.rows) for outcome in outcomes.values()) > 0.3 * len(outcomes)


@pytest.mark.parametrize("option", ["--train", "--dev", "--test", "--flights"])
def test_a_demonstration_with_an_empty_part_is_refused_before_anything_is_written(option, tmp_path):
    done = CliRunner().invoke(cli, ["demo", str(tmp_path / "demo"), option, "0"])
    assert done.exit_code == 2 and option in done.output
    assert not (tmp_path / "demo").exists()


def test_batches_are_a_pure_function_of_seed_and_epoch_and_hold_each_pair_once(pairs):
    texts = [read_lines(pairs, "train", kind) for kind in ("nl", "sql")]
    examples = make_examples(make_tokenizer([*texts[0], *texts[1]]), *texts)
    plans = [epoch_batches(examples, 6, seed, epoch) for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]]
    assert plans[0] == plans[1] and len({str(plan) for plan in plans}) == 3
    for plan in plans:
        assert sorted(number for batch in plan for number in batch) == list(range(40)) and len(plan) == 7


def test_missing_uneven_or_ambiguous_files_are_named(pairs, tmp_path):
    with pytest.raises(DataError, match=r"dev\.nl does not exist"):
        read_lines(tmp_path, "dev", "nl")
    (tmp_path / "dev.nl").write_text("a\nb\n")
    (tmp_path / "dev.sql").write_text("SELECT 1\n")
    with pytest.raises(DataError, match=r"has 2 lines and dev\.sql 1"):
        read_lines(tmp_path, "dev", "nl")
    with pytest.raises(DataError, match="found none"):
        find_database(Settings(tmp_path))
    for name in ("a.db", "b.sqlite"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.db.*b\.sqlite.*--database"):
        find_database(Settings(tmp_path))
    assert find_database(Settings(tmp_path, database=pairs / "flights.db")) == pairs / "flights.db"


# Model


@pytest.fixture(scope="module")
def micro(pairs):
    """A random T5 with its tokenizer and the training pairs as examples."""
    texts = [read_lines(pairs, "train", kind) for kind in ("nl", "sql")]
    model, tokenizer = from_scratch([*texts[0], *texts[1]], width=32, layers=1, seed=0)
    model.t5.generation_config.max_new_tokens = 12
    return model.eval(), tokenizer, make_examples(tokenizer, *texts), texts


def test_the_summed_loss_of_a_batch_is_that_of_its_parts(micro):
    model, _, examples, _ = micro
    (batch,) = make_loader(examples, torch.device("cpu"))([[0, 1, 2, 3, 4]])
    parts = [batch.part(0, 2), batch.part(2, 5)]
    assert sum(model(part)[0] for part in parts).item() == pytest.approx(model(batch)[0].item(), rel=1e-5)
    assert sum(part.weight for part in parts) == batch.weight == sum(len(examples[n].labels) for n in range(5))


def test_the_loss_is_hugging_faces(micro):
    model, _, examples, _ = micro
    (batch,) = make_loader(examples, torch.device("cpu"))([[0, 7, 9]])
    theirs = model.t5(input_ids=batch.inputs_BI, attention_mask=batch.mask_BI, labels=batch.labels_BO).loss
    assert (model(batch)[0] / batch.weight).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_queries_do_not_depend_on_how_questions_are_batched(micro):
    model, tokenizer, examples, _ = micro
    alone, together = (generate(model, tokenizer, examples[:9], 3, size) for size in (1, 4))
    assert alone == together and len(set(alone)) > 1


def test_a_saved_model_loads_as_the_same_and_its_tokenizer_loses_nothing(micro, tmp_path):
    model, tokenizer, examples, texts = micro
    save(model, tokenizer, tmp_path)
    loaded, again = pretrained(str(tmp_path), texts[1])
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert make_examples(again, *texts) == examples
    for text in ("SELECT a.b FROM t WHERE x <= 5 AND y = 'Ü'", *texts[1]):
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text


def test_characters_that_a_vocabulary_lacks_are_added():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "x": 1, "5": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert add_missing(wrapped, ["x < 5", "x > 5"]) == ["<", ">"]
    assert wrapped.unk_token_id not in wrapped("x<5")["input_ids"] and add_missing(wrapped, ["x < 5"]) == []


def test_a_checkpoint_of_half_precision_is_trained_in_fp32(micro, tmp_path):
    model, tokenizer, _, texts = micro
    save(TextToSql(copy.deepcopy(model.t5).bfloat16()), tokenizer, tmp_path)
    loaded, _ = pretrained(str(tmp_path), texts[1])
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_a_truncated_checkpoint_is_refused(micro, tmp_path):
    model, tokenizer, _, texts = micro
    save(model, tokenizer, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"is no T5 that can be loaded"):
        pretrained(str(tmp_path), texts[1])


def test_what_is_no_t5_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"--model .*nothing.* is no T5"):
        pretrained(str(tmp_path / "nothing"), [])


# Training


def rows_of(settings):
    """metrics.jsonl, dev rows last: their place depends on when their records were done."""
    lines = (settings.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(lines, key=lambda line: '"dev"' in line)


def weights_of(settings):
    return (settings.folder / "model" / "model.safetensors").read_bytes()


def interrupt(monkeypatch, step):
    """The next training is stopped by a signal at this step."""
    count = iter(range(1, 10_000))

    @contextmanager
    def handle_signals():
        yield lambda: next(count) == step

    monkeypatch.setattr(run, "handle_signals", handle_signals)


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    """An uninterrupted training, the measure for all others: (settings, result)."""
    chosen = micro_settings(pairs, tmp_path_factory.mktemp("whole"))
    return chosen, run.train(chosen)


def test_training_lowers_the_loss_and_leaves_a_model_and_no_checkpoints(whole):
    settings, result = whole
    losses = [json.loads(row)["loss"] for row in rows_of(settings) if '"train"' in row]
    assert losses[-1] < 0.7 * losses[0] and 0 <= result["record_f1"] <= 1
    assert {path.name for path in settings.folder.iterdir()} >= {
        "model",
        "metrics.jsonl",
        "result.json",
        "settings.json",
    }
    assert not list(settings.folder.rglob("state.safetensors"))


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (5, {}),  # at an epoch's end, before it is evaluated
        (8, {}),
        (5, {"async_eval": True}),
        (8, {"async_eval": True}),  # while the records of the first epoch are computed
        (10, {"async_eval": True, "save_only_best": True}),
    ],
)
def test_resumed_equals_uninterrupted_to_the_last_bit(whole, settings, monkeypatch, step, options):
    chosen = replace(settings, **options)
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(Preempted):
            run.train(chosen)
    torch.manual_seed(99)
    assert run.train(chosen) == whole[1]
    assert rows_of(chosen) == rows_of(whole[0]) and weights_of(chosen) == weights_of(whole[0])


def test_records_computed_beside_training_give_the_same_result(whole, settings):
    chosen = replace(settings, async_eval=True)
    assert run.train(chosen) == whole[1]
    assert rows_of(chosen) == rows_of(whole[0]) and weights_of(chosen) == weights_of(whole[0])


@pytest.mark.parametrize("beside", [False, True])
def test_early_stopping_keeps_the_best_epoch_by_record_f1(settings, monkeypatch, beside):
    f1 = iter([0.2, 0.6, 0.5, 0.4, 0.9])
    empty = {"record_em": 0.0, "sql_em": 0.0, "error_rate": 0.0}
    monkeypatch.setattr(run, "score", lambda *_: {"record_f1": next(f1), **empty})
    result = run.train(replace(settings, max_n_epochs=9, patience_epochs=2, async_eval=beside))
    assert result["record_f1"] == pytest.approx(0.6) and result["best_step"] == 10


def test_without_records_dev_loss_selects_and_no_query_is_generated(settings, monkeypatch):
    monkeypatch.setattr(run, "generate", None)
    monkeypatch.setattr(run, "run_queries", None)
    chosen = replace(settings, skip_record_computation=True, eval_every_n_epochs=3)
    result = run.train(chosen)
    assert result["loss"] == min(json.loads(row)["loss"] for row in rows_of(chosen) if '"dev"' in row)


def test_without_records_no_database_is_needed_and_with_them_a_missing_one_leaves_nothing_behind(settings, tmp_path):
    for path in settings.data.glob("*.*l"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    chosen = replace(settings, data=tmp_path, max_n_epochs=1)
    with pytest.raises(DataError, match="database"):
        run.train(chosen)
    assert not settings.folder.exists()
    assert run.train(replace(chosen, skip_record_computation=True))["loss"] > 0


def test_between_full_evaluations_only_the_loss_is_looked_at(settings):
    chosen = replace(settings, eval_every_n_epochs=2, scheduler_type="linear", num_warmup_epochs=1)
    run.train(chosen)
    assert ["record_f1" in row for row in rows_of(chosen) if '"dev"' in row] == [False, True, True]


def test_a_finished_training_is_not_repeated_and_other_settings_are_refused(whole, monkeypatch):
    settings, result = whole
    monkeypatch.setattr(run, "train_loop", None)
    assert run.train(replace(settings, sql_threads=1)) == result
    with pytest.raises(UsageError, match=r"learning_rate=0\.01, not 0\.1"):
        run.train(replace(settings, learning_rate=0.1))


@pytest.mark.parametrize("finished", [True, False])
def test_files_that_changed_since_an_experiment_was_begun_are_refused(settings, tmp_path, monkeypatch, finished):
    chosen = replace(settings, data=tmp_path / "data", output=tmp_path / "out", max_n_epochs=1)
    shutil.copytree(settings.data, chosen.data)
    with monkeypatch.context() as patch, nullcontext() if finished else pytest.raises(Preempted):
        if not finished:
            interrupt(patch, 2)
        run.train(chosen)
    database, pairs = find_database(chosen), chosen.data / "train.sql"
    for path in (database, pairs):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"flight", b"FLIGHT"))
        with pytest.raises(UsageError, match=f"sha256 of {path.name}"):
            run.train(chosen)
        path.write_bytes(before)
    assert run.train(chosen)["steps"] > 0


def test_embeddings_of_new_characters_depend_on_the_seed_alone(settings, tmp_path):
    vocabulary = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *(f"x{n}" for n in range(61))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(vocab_size=64, d_model=32, d_kv=32, num_heads=1, d_ff=32, num_layers=1, decoder_start_token_id=0)
    save(TextToSql(T5ForConditionalGeneration(config)), tokenizer, tmp_path / "t5")
    weights = []
    for noise, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(noise)
        chosen = replace(settings, finetune=True, model=str(tmp_path / "t5"), seed=seed)
        weights.append(run.open_model(chosen, ["x"], ["x < y"])[0].t5.shared.weight)
    assert len(weights[0]) > 64 and torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"bf16": True, "fp16": True},
        {"width": 40},
        {"num_warmup_epochs": 9},
        {"batch_size": 0},
        {"sql_timeout": 0.0},
        {"learning_rate": -1.0},
    ],
)
def test_settings_without_sense_are_refused_before_anything_is_written(settings, wrong):
    with pytest.raises(UsageError):
        run.train(replace(settings, **wrong))
    assert not settings.folder.exists()


def test_speech_stages_and_recipe_share_the_loop():
    import stages.asr.run
    import stages.gating.run

    assert run.train_loop is stages.asr.run.train is stages.gating.run.train


# Command line


def test_predict_and_evaluate_write_and_print(whole, tmp_path):
    settings, _ = whole
    common = ["--data", settings.data, "--output", settings.output, "--num_beams", "2", "--device", "cpu"]
    invoke = CliRunner().invoke
    assert invoke(cli, [*map(str, ["predict", *common])], catch_exceptions=False).exit_code == 0
    assert len((settings.folder / "test.sql").read_text().splitlines()) == 4
    assert len((settings.folder / "test.records.jsonl").read_text().splitlines()) == 4
    perfect = ["evaluate", *common, "--split", "dev", "--predicted", settings.data / "dev.sql"]
    printed = invoke(cli, [*map(str, perfect)], catch_exceptions=False).output.split()
    assert printed == ["record_f1", "1.0000", "record_em", "1.0000", "sql_em", "1.0000", "error_rate", "0.0000"]
    assert (
        "record_f1" in invoke(cli, [*map(str, ["evaluate", *common, "--split", "test"])], catch_exceptions=False).output
    )
    with pytest.raises(DataError, match="no finished training"):
        invoke(cli, [*map(str, ["predict", *common, "--experiment_name", "x"])], catch_exceptions=False)


def test_each_hostile_query_counts_as_one_error_and_the_others_keep_their_scores(pairs, tmp_path):
    hostile = (
        "SELECT COUNT(*) FROM flight a, flight b, flight c, flight d",
        "SELEC flight_id FROM flight",
        "DELETE FROM flight",
        "ATTACH 'other.db' AS other",
        "PRAGMA query_only = 0",
        "SELECT randomblob(1000000000)",
    )
    gold = ["SELECT flight_id FROM flight WHERE stops = 0"] * len(hostile) + ["SELECT COUNT(*) FROM flight"] * 2
    predicted = [*hostile, "SELECT COUNT(*) FROM flight", "SELECT 1 + COUNT(*) FROM flight"]
    for name, lines in {"x.nl": ["?"] * len(gold), "x.sql": gold, "predicted.sql": predicted}.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    settings = Settings(tmp_path, database=pairs / "flights.db", sql_timeout=1.0)
    scores = run.evaluate(settings, "x", tmp_path / "predicted.sql")
    assert scores == {"record_f1": 1 / 8, "record_em": 1 / 8, "sql_em": 1 / 8, "error_rate": 6 / 8}


def test_the_command_line_has_the_names_its_users_know_and_loads_without_torch():
    names = (
        "finetune learning_rate weight_decay batch_size max_n_epochs patience_epochs num_warmup_epochs scheduler_type "
        "eval_every_n_epochs save_only_best skip_record_computation num_beams sql_threads sql_timeout bf16 fp16 "
        "compile experiment_name async_eval from-scratch"
    )
    shown = CliRunner().invoke(cli, ["train", "--help"]).output
    assert all(f"--{name}" in shown for name in names.split())
    code = "import sys, recipes.text_to_sql.__main__; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
