"""The JSON files of a base model and of an adapter are data: broken or crafted ones end in one error each."""

import copy
import json
import re
import shutil
import time

import pytest

from common.data.tokens import load_codec
from common.decoding.alignment import alignment_heads
from common.errors import DataError
from common.files import MAX_DOCUMENT
from common.json_files import read_object, read_rows
from common.model.adapters import check_patterns
from common.model.whisper import load_whisper
from common.storage import open_store
from common.storage.artifacts import inspect
from tests.common.storage.test_artifacts import KEY, make
from tests.hostile.test_records import DAMAGED, NASTY, changed, leaves

VALUES = (*NASTY, float("nan"), 10**400, [[]], [-1], [2**40], ["x"], {"type": "Nothing"})


@pytest.fixture
def folder(micro_model, tmp_path):
    return shutil.copytree(micro_model, tmp_path / "model")


def use(folder):
    """Reads a checkpoint as every command does, and takes a text to tokens and back."""
    codec = load_codec(folder)
    inputs, _ = codec.pair("river lamp")
    codec.decode(inputs)
    assert min(inputs) >= 0 and max(inputs) < 259


def use_all(folder):
    """The same, and its weights."""
    use(folder)
    alignment_heads(load_whisper(folder))


def tried(folder, name, bodies, use=use_all):
    """How many of a file's bodies were refused; any other end than DataError is the test's failure."""
    refused = 0
    for body in bodies:
        (folder / name).write_bytes(body)
        try:
            use(folder)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
            assert str(folder) in str(error)
    return refused


def encoded(value):
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_file_that_is_no_json_object_is_refused(folder, name, tally):
    assert tried(folder, name, [content for content in DAMAGED if content != b'{"schema": 1}']) == len(DAMAGED) - 1
    with (folder / name).open("wb") as file:
        file.truncate(MAX_DOCUMENT + 1)  # takes no disk
    with pytest.raises(DataError, match=rf"{name} has 67,108,865 bytes, but at most 67,108,864 are read"):
        use_all(folder)
    tally(len(DAMAGED))


def test_a_preprocessor_config_is_not_read(folder):
    assert tried(folder, "preprocessor_config.json", DAMAGED[:3]) == 0


def test_a_tokenizer_with_odd_values(folder, tally):
    plain = json.loads((folder / "tokenizer.json").read_text())
    small = copy.deepcopy(plain)
    small["model"]["vocab"] = dict(list(plain["model"]["vocab"].items())[:2])  # enough names to change one by one
    bodies = [encoded(merge(changed(small, path, value), plain)) for path in leaves(small) for value in (*VALUES, ...)]
    assert tried(folder, "tokenizer.json", bodies, use) > len(bodies) // 2
    tally(len(bodies))


def merge(tree, plain):
    """The whole vocabulary again, but for what was changed in its beginning."""
    if isinstance(tree.get("model"), dict) and isinstance(tree["model"].get("vocab"), dict):
        tree["model"]["vocab"] = plain["model"]["vocab"] | tree["model"]["vocab"]
    return tree


def test_a_generation_config_with_odd_values(folder, tally):
    names = (
        "is_multilingual",
        "suppress_tokens",
        "begin_suppress_tokens",
        "alignment_heads",
        "max_length",
        "lang_to_id",
    )
    bodies = [
        encoded({"is_multilingual": False, name: value})
        for name in names
        for value in (*VALUES, [[1, 1]], [[9, 0]], [[[], 0]])
    ]
    assert 0 < tried(folder, "generation_config.json", bodies) < len(bodies)
    tally(len(bodies))


def test_a_tokenizer_of_another_model_is_refused(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"has tokens up to 300, and config\.json says vocab_size 259"):
        load_codec(folder)


def test_texts_are_neither_cut_nor_padded_by_a_tokenizer_that_was_saved_so(folder):
    whole = load_codec(folder).encode("river lamp")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_codec(folder).encode("river lamp") == whole


# Patterns of an adapter

SLOW = (
    "(a+)+$",
    "(.*)*",
    "(.|.)*x",
    "(a|a)b",
    "(?=a)",
    "[a-z]+",
    r"(\w+\s?)*",
    "a{9}",
    r"(a)\1",
    ".*.*.*.*.*x",
    "a" * 1001,
)
SLOW += ("(l|la)(a|ay)(e|er)(s|s1)",)
QUICK = (
    *("all-linear", r".*\.encoder\..*\.(fc1|q_proj)", ".*decoder.*(self_attn|encoder_attn).*(q_proj|v_proj)$"),
    *(r"^model\.decoder\.layers\.\d+\.(?:self_attn|encoder_attn)\.(q|k|v|out)_proj", "fc1"),
)


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_may_be_slow_is_refused(tmp_path, pattern):
    for settings in ({"target_modules": pattern}, {"rank_pattern": {pattern: 2}}, {"modules_to_save": [pattern]}):
        with pytest.raises(DataError, match="too complex a pattern: list the names of layers instead"):
            check_patterns(settings, tmp_path)
    check_patterns({"target_modules": [pattern]}, tmp_path)  # compared, not matched


def test_what_is_let_through_is_quick_on_the_largest_whisper(tmp_path):
    names = [f"model.{p}.layers.{n}.{m}" for p in ("encoder", "decoder") for n in range(32) for m in ("fc1", "q_proj")]
    started = time.monotonic()
    for pattern in (*QUICK, ".*.*.*.*x", ".*.+.*(l|la)(y|ye)(s|r)x"):
        check_patterns({"target_modules": pattern}, tmp_path)
        for name in names[::8]:
            re.fullmatch(pattern, name)
    assert time.monotonic() - started < 20


# Sizes


def test_a_large_manifest_is_refused(tmp_path):
    store = open_store(tmp_path / "store")
    make(store, tmp_path)
    with store.local_path(f"{KEY.prefix}manifest.json").open("wb") as file:
        file.truncate(MAX_DOCUMENT + 1)
    with pytest.raises(DataError, match="67,108,864 are read"):
        inspect(store, KEY)


def test_lines_and_depths_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("common.json_files.MAX_LINE", 50)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + '{"a": "' + "x" * 100 + '"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a line of over 50 characters"):
        read_rows(tmp_path / "rows.jsonl")
    monkeypatch.undo()
    (tmp_path / "rows.jsonl").write_text("[" * 100_000)
    for read in (read_rows, read_object):
        with pytest.raises(DataError, match=r"rows\.jsonl"):
            read(tmp_path / "rows.jsonl")
