"""Long utterances: refused with a count and the remedy, omitted and counted, or cut once and kept."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from common.config import validate
from common.data.corpus import Utterance, read_corpus, write_index
from common.decoding.alignment import Word
from common.errors import DataError
from common.inference.load_model import open_model
from common.inference.long_audio import (
    LongUtterance,
    long_utterances,
    segment_long,
    summary,
    with_pieces,
    within_limits,
)
from common.inference.segment import anchors, estimate_starts, split_words
from common.inference.transcribe import join_words
from common.storage import open_store
from stages.inputs import load_corpus, long_audio
from stages.local_runner import run_pipeline
from tests.factories import write_wav
from tests.stages.test_local_runner import micro_config

BURSTS = 14  # of 2 s, with 1 s of pause between: 42 s


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    """Two short utterances and a long one, of tones with pauses."""
    folder = tmp_path_factory.mktemp("long")
    generator = np.random.default_rng(0)
    burst = 0.3 * np.sin(np.arange(32_000) / 16_000 * 2 * np.pi * 300) + 0.01 * generator.standard_normal(32_000)
    write_wav(folder / "long.wav", np.concatenate([*[np.concatenate([burst, np.zeros(16_000)])] * BURSTS]), 16_000)
    write_wav(folder / "short.wav", burst, 16_000)
    text = " ".join(f"word{n}" for n in range(BURSTS))
    write_index(
        folder,
        [
            Utterance("long", "long.wav", BURSTS * 3.0, text, speaker="s", etiology="typical", text_alt=text.upper()),
            Utterance("short", "short.wav", 2.0, "hello there"),
            Utterance("test", "short.wav", 2.0, "hello", split="test"),
        ],
    )
    return folder


def config_of(folder, micro_model, tmp_path, **audio):
    return validate(
        {
            "corpus": {"path": str(folder)},
            "model": {"name": str(micro_model)},
            "store": str(tmp_path / "store"),
            "audio": audio,
            "runtime": {"device": "cpu", "quiet": True},
        }
    )


def test_long_audio_is_an_error_with_its_count_and_the_remedy(long_corpus, micro_model, tmp_path):
    with pytest.raises(DataError, match=r"1 of 3 utterances \(0\.01 h\).*long, 42\.0 s.*--use-chunking.*=drop"):
        load_corpus(config_of(long_corpus, micro_model, tmp_path), tmp_path / "cache")


def test_dropped_utterances_are_counted_aloud_once(long_corpus, micro_model, tmp_path, caplog):
    config = config_of(long_corpus, micro_model, tmp_path, long_audio="drop")
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(config, tmp_path / "cache")
        load_corpus(config, tmp_path / "cache")
    assert [u.id for u in corpus.utterances] == ["short", "test"]
    assert corpus.digest != read_corpus(long_corpus).digest
    assert sum("1 of 3 utterances (0.01 h)" in message and "omitted" in message for message in caplog.messages) == 1


def test_a_corpus_without_long_audio_keeps_its_digest(tones, micro_model, tmp_path):
    for choice in ("error", "drop", "segment"):
        corpus = load_corpus(config_of(tones, micro_model, tmp_path, long_audio=choice), tmp_path / "cache")
        assert corpus.digest == read_corpus(tones).digest


def test_segments_are_cut_in_pauses_kept_in_the_store_and_used_by_every_process(long_corpus, micro_model, tmp_path):
    config = config_of(long_corpus, micro_model, tmp_path, long_audio="segment")
    first = load_corpus(config, tmp_path / "cache")
    pieces = [u for u in first.utterances if u.id.startswith("long-")]
    assert [u.id for u in pieces] == [f"long-{n:03d}" for n in range(len(pieces))]
    assert " ".join(u.text for u in pieces) == read_corpus(long_corpus).utterances[0].text
    assert " ".join(u.text_alt or "" for u in pieces).split() == [f"WORD{n}" for n in range(BURSTS)]
    assert {(u.speaker, u.etiology, u.split, u.audio_filepath) for u in pieces} == {
        ("s", "typical", "train", "long.wav")
    }
    for u in pieces:
        assert u.duration <= 30
        for moment in (u.offset, u.offset + u.duration):
            assert moment % 3 == 0 or moment % 3 >= 2, "cuts lie in pauses"
    (entry,) = open_store(config.store).list("segmented/")
    other = load_corpus(config, tmp_path / "another machine")
    assert other == replace(first, root=other.root)
    assert open_store(config.store).size(entry.key) == entry.size


def test_an_interrupted_segmentation_goes_on(long_corpus, micro_model, tmp_path):
    corpus = read_corpus(long_corpus)
    opened = open_model(str(micro_model), store=None, cache=tmp_path, device="cpu")
    u = corpus.utterances[0]
    done = LongUtterance("long", (replace(u, id="long-000", duration=3.0, text="marked"),), 42.0, matched=1.0)
    unfinished = tmp_path / "rows.jsonl"
    from common.inference.long_audio import _line

    unfinished.write_text(_line(done) + _line(done)[:40])
    assert segment_long(opened, corpus, [u], unfinished, quiet=True) == {"long": done}


def test_texts_over_448_tokens_are_long_too():
    many = Utterance("many", "a.wav", 20.0, "ab" * 300)
    few = Utterance("few", "a.wav", 20.0, "hello")
    asked = []

    def counter():
        asked.append(True)
        return len

    assert long_utterances([few], counter) == []
    assert asked == [], "no tokenizer is loaded for short texts"
    assert long_utterances([few, many], counter) == [many]
    assert long_utterances([many], lambda: lambda text: 448) == []


def test_a_text_of_too_many_tokens_is_cut_at_a_pause(long_corpus, micro_model, tmp_path):
    source = read_corpus(long_corpus)
    text = " ".join(f"{'long' * 9}{n}" for n in range(BURSTS))  # the micro tokenizer has a token a byte
    u = replace(source.utterances[0], duration=27.0, text=text, text_alt=None)
    opened = open_model(str(micro_model), store=None, cache=tmp_path, device="cpu")
    row = segment_long(opened, source, [u], tmp_path / "rows.jsonl", quiet=True)["long"]
    assert len(row.pieces) > 1
    assert " ".join(piece.text for piece in row.pieces) == text
    assert all(opened.codec.length(piece.text) <= 448 for piece in row.pieces)


def test_what_cannot_be_divided_is_left_out_with_its_reason(long_corpus, micro_model, tmp_path):
    write_wav(tmp_path / "silent.wav", np.zeros(16_000 * 40), 16_000)
    u = Utterance("quiet", "silent.wav", 40.0, "nobody says this")
    write_index(tmp_path, [u, Utterance("short", "silent.wav", 2.0, "x")])
    corpus = read_corpus(tmp_path)
    opened = open_model(str(micro_model), store=None, cache=tmp_path, device="cpu")
    rows = segment_long(opened, corpus, [u], tmp_path / "rows.jsonl", quiet=True)
    assert rows["quiet"].pieces == ()
    assert "1 omitted (quiet: no speech in its audio)" in summary([u], rows)
    assert [utterance.id for utterance in with_pieces(corpus, [u], rows).utterances] == ["short"]


def test_a_piece_may_not_take_the_id_of_another(long_corpus):
    corpus = read_corpus(long_corpus)
    u = corpus.utterances[0]
    rows = {"long": LongUtterance("long", (replace(u, id="short"),), 42.0)}
    with pytest.raises(DataError, match="short would be a piece"):
        with_pieces(corpus, [u], rows)


def test_anchors_are_words_heard_as_written():
    written = split_words("The cat, sat on THE mat.", "en")
    heard = [Word(text, float(n), n + 0.5) for n, text in enumerate(["the", "cat", "set", "on", "the", "mat"])]
    known = anchors(written, heard)
    assert [(number, word.text) for number, word in known] == [
        (0, "the"),
        (1, "cat"),
        (3, "on"),
        (4, "the"),
        (5, "mat"),
    ]
    starts_U = estimate_starts(written, known, 10.0)
    assert (np.diff(starts_U) >= 0).all()
    assert starts_U[[0, 1, 3, 4, 5]].tolist() == [0, 1, 3, 4, 5]
    assert 1 < starts_U[2] < 3
    assert split_words("你好 吗", "zh") == ["你", "好", " 吗"]


@pytest.mark.parametrize(("text", "language"), [("我 用 iPhone Pro 手机", "zh"), ("The cat, sat", "en")])
def test_words_make_the_text_they_came_from(text, language):
    assert join_words(split_words(text, language), language) == text


def test_rows_are_kept_without_loss():
    row = LongUtterance("a", (Utterance("a-000", "a.wav", 3.0, "é", offset=1.5),), 40.0, 1.0, 0.5, 2, "")
    from common.inference.long_audio import _line, _rows

    odd = replace(row, id="a\u2028b\x85")  # separators for `splitlines`, not for JSON
    assert list(_rows(_line(row) + _line(odd) + "{")) == [row, odd]


def test_within_limits_leaves_short_corpora_alone(tones, micro_model, tmp_path):
    corpus = read_corpus(tones)
    assert within_limits(corpus, long_audio(config_of(tones, micro_model, tmp_path)), tmp_path) is corpus


def test_a_run_trains_on_the_pieces_of_long_utterances(long_corpus, micro_model, tmp_path):
    """Every stage sees the same pieces: extraction, clusters, gate, experts, joint training."""
    short = read_corpus(long_corpus).utterances[1]
    rows = [replace(u, audio_filepath=str(long_corpus / u.audio_filepath)) for u in read_corpus(long_corpus).utterances]
    path = str(long_corpus / short.audio_filepath)
    for split, count in (("train", 4), ("dev", 2), ("test", 2)):
        rows += [replace(short, id=f"{split}-{n}", split=split, audio_filepath=path) for n in range(count)]
    write_index(tmp_path / "corpus", rows)
    config = micro_config(
        tmp_path / "store",
        micro_model,
        tmp_path / "corpus",
        cluster={"plot": "none", "algorithm": "spectral", "reduce": "none"},
        audio={"long_audio": "segment"},
        asr__epochs=1,
    )
    summary = run_pipeline(config)
    assert summary["utterances"] == 3
    (embeddings,) = (tmp_path / "store" / "artifacts" / "extract").glob("*/*/ids.json")
    ids = json.loads(embeddings.read_text())
    assert {"long-000", "long-001", "short"} < set(ids)
    assert "long" not in ids
