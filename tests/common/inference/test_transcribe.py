"""Transcription with experts: every window by its own, short files as evaluation hears them; formats."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.data.audio import read_audio
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import read_corpus
from common.data.features import context_positions
from common.data.tokens import load_codec
from common.decoding.alignment import Word
from common.decoding.decode import Decoding
from common.decoding.pauses import Stretch
from common.errors import UsageError
from common.evaluation.evaluate import decode_corpus
from common.inference.added_experts import with_added
from common.inference.choose_experts import warn_without_group
from common.inference.load_model import open_model
from common.inference.subtitles import FORMATS, clock
from common.inference.transcribe import Segment, make_batch, segments_of, snap, transcribe_audio, usual_window
from common.model.added_experts import AddedExpert, append_terms, remove_last
from common.model.bundle import save_recogniser
from common.model.gate import Gate
from common.model.mixture import AddedTerm, add_mixture, mixture_layers
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from tests.factories import bundle_info

DECODING = Decoding(batch_size=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def trained(micro_model, tones, tmp_path_factory):
    """Three experts and a gate with random weights, as the asr stage leaves them."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    targets = ("q_proj", "v_proj", "fc1")
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=targets, num_experts=3, rank=2, alpha=4)
    for name, parameter in whisper.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    gate = Gate(32, 16, 3, 0.0)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    corpus, codec = read_corpus(tones), load_codec(micro_model)
    examples = make_examples(corpus, corpus.split("test"), codec, context="30s", margin=64)
    loader = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))
    with torch.no_grad():
        batch = next(loader([list(range(len(examples)))]))
        gate.fit_scale(Recogniser(whisper, slot=slot).frozen_embedding(batch, layer=-1, pooling="mean"))
    info = bundle_info(micro_model, rank=2, targets=targets)
    save_recogniser(Recogniser(whisper, slot=slot, gate=gate), info, folder)
    return folder


@pytest.fixture(scope="module")
def opened(trained, tmp_path_factory):
    opened = open_model(str(trained), store=None, cache=tmp_path_factory.mktemp("cache"), device="cpu")
    weight_VD = torch.randn(259, 32, generator=torch.Generator().manual_seed(5))
    opened.recogniser.whisper.proj_out.weight = torch.nn.Parameter(weight_VD)  # tied ones repeat one token for ever
    return opened


def test_short_files_get_the_text_and_the_experts_of_evaluation(opened, tones):
    corpus = read_corpus(tones)
    utterances = corpus.split("dev")
    rows = {row["id"]: row for row in decode_corpus(opened, corpus, utterances, DECODING)}
    transcripts = transcribe_audio(opened, [read_audio(corpus.path(u)) for u in utterances], DECODING)
    for u, (window,) in zip(utterances, transcripts, strict=True):
        assert window.decoded.text == rows[u.id]["hypothesis"]
        assert list(window.experts) == rows[u.id]["experts"]
        assert list(window.weights) == pytest.approx(rows[u.id]["weights"], abs=1e-3)
    assert len({tuple(np.round(window.weights, 3)) for (window,) in transcripts}) > 1, "the gate tells the tones apart"
    assert len({window.decoded.text for (window,) in transcripts}) > 1


def test_each_window_of_a_long_file_is_heard_as_if_alone(opened, tones):
    corpus = read_corpus(tones)
    pause = np.zeros(16_000, np.float32)
    parts = [part for u in corpus.utterances[::4] for part in (read_audio(corpus.path(u)), pause)]
    samples = np.concatenate(parts)
    (windows,) = transcribe_audio(opened, [samples], DECODING)
    assert len(windows) > 1
    for transcript in windows:
        part = samples[round(transcript.window.start * 16_000) : round(transcript.window.end * 16_000)]
        (alone,) = transcribe_audio(opened, [part], DECODING)
        assert alone[0].decoded.text == transcript.decoded.text
        assert alone[0].experts == transcript.experts
        assert all(
            transcript.window.start <= word.start <= word.end <= transcript.window.end for word in transcript.words
        )


def test_a_gate_of_speakers_takes_a_recording_for_one_speaker(opened, tones):
    by_speaker = replace(opened, info=replace(opened.info, route_by="speaker"))
    corpus = read_corpus(tones)
    pause = np.zeros(16_000, np.float32)
    low, high = ([u for u in corpus.utterances if u.etiology == name][:10] for name in ("low", "high"))
    mixed = np.concatenate([part for u in low + high for part in (read_audio(corpus.path(u)), pause)])
    (windows,) = transcribe_audio(by_speaker, [mixed], DECODING)
    assert len(windows) > 1
    assert len({tuple(np.round(window.weights, 3)) for window in windows}) == 1
    (alone,) = transcribe_audio(opened, [mixed], DECODING)
    assert len({tuple(np.round(window.weights, 3)) for window in alone}) > 1


@pytest.fixture(scope="module")
def by_table(opened):
    """The model with its experts for `low`, `high` and a third group."""
    info = replace(opened.info, route_by="table", column="etiology", groups=("high", "low", "rough"))
    return replace(opened, info=info)


def test_a_group_that_is_named_gets_its_own_expert_as_in_evaluation(by_table, tones):
    corpus = read_corpus(tones)
    utterances = [u for u in corpus.split("dev") if u.etiology == "low"]
    rows = decode_corpus(by_table, corpus, utterances, DECODING)
    audios = [read_audio(corpus.path(u)) for u in utterances]
    transcripts = transcribe_audio(with_added(by_table, expert="low"), audios, DECODING)
    for row, (window,) in zip(rows, transcripts, strict=True):
        assert (window.decoded.text, list(window.experts)) == (row["hypothesis"], row["experts"])
        assert window.experts[0] == 1 and window.weights[0] == pytest.approx(1)
    blank = [replace(u, etiology="") for u in utterances]
    assert decode_corpus(with_added(by_table, expert="low"), corpus, blank, DECODING)[0]["experts"][0] == 1


def test_an_expert_that_is_named_is_used_for_added_speakers_too(by_table, tones):
    corpus = read_corpus(tones)
    utterances = [u for u in corpus.split("dev") if u.etiology == "low"]
    expected = decode_corpus(with_added(by_table, expert="low"), corpus, utterances, DECODING)
    whisper = by_table.recogniser.whisper
    append_terms(by_table.recogniser, {name: AddedTerm(weights={2: 1.0}) for name, _ in mixture_layers(whisper)})
    speaker = utterances[0].speaker
    info = AddedExpert(
        "own", "speaker", speaker.upper(), "choose", 0, ((2, 1.0),), None, 1, 1.0, None, None, None, "", ""
    )
    extended = replace(by_table, added=(info,))
    try:
        own = decode_corpus(extended, corpus, utterances, DECODING)
        named = decode_corpus(with_added(extended, expert="low"), corpus, utterances, DECODING)
    finally:
        remove_last(by_table.recogniser)
    assert named == expected
    assert own != expected, "the speaker's own expert, in whatever spelling"


def test_an_utterance_in_windows_gets_its_groups_expert(by_table, tones, monkeypatch):
    corpus = read_corpus(tones)
    utterances = [u for u in corpus.split("dev") if u.etiology == "low"][:2]
    expected = [row["hypothesis"].split() for row in decode_corpus(by_table, corpus, utterances, DECODING)]
    monkeypatch.setattr("common.evaluation.evaluate.is_too_long", lambda seconds: True)
    rows = decode_corpus(by_table, corpus, utterances, DECODING, windows=True)
    assert [row["hypothesis"].split() for row in rows] == expected


def test_a_table_without_the_group_leaves_it_to_the_gate_or_warns(by_table, tones, caplog, monkeypatch):
    corpus = read_corpus(tones)
    utterances = [replace(u, etiology="") for u in corpus.split("dev")]
    audios = [read_audio(corpus.path(u)) for u in utterances]
    transcripts = transcribe_audio(by_table, audios, DECODING)
    warn_without_group(by_table)
    assert not caplog.records and all(window.weights[0] > 0 for (window,) in transcripts)
    assert len({window.experts[0] for (window,) in transcripts}) > 1
    rows = decode_corpus(by_table, corpus, [replace(u, speaker=u.id) for u in utterances], DECODING)
    assert [row["experts"] for row in rows] == [list(window.experts) for (window,) in transcripts]
    alone = replace(by_table, info=replace(by_table.info, gate=False))
    warn_without_group(with_added(alone, expert="high"))
    assert not caplog.records
    monkeypatch.setitem(alone.recogniser._modules, "gate", None)
    rows = decode_corpus(alone, corpus, utterances, DECODING)
    assert "uses the shared expert alone, unless --expert names one of high, low, rough" in caplog.text
    transcripts = transcribe_audio(alone, audios, DECODING)
    assert [row["hypothesis"] for row in rows] == [window.decoded.text for (window,) in transcripts]
    assert {sum(window.weights) for (window,) in transcripts} == {0.0}
    caplog.clear()
    warn_without_group(replace(alone, info=replace(alone.info, column="none", groups=("everybody",))))
    assert not caplog.records, "a single group is always known"


def test_a_group_that_the_model_does_not_have_is_an_error(by_table, opened):
    with pytest.raises(UsageError, match="has no expert 'hgih'; did you mean high"):
        with_added(by_table, expert="hgih")
    with pytest.raises(UsageError, match="has no expert 'high': nothing was added to it"):
        with_added(opened, expert="high")


@pytest.mark.parametrize(("seconds", "expected"), [(None, 15.0), (12.0, 12.0), (3.0, 10.0), (100.0, 30.0)], ids=str)
def test_windows_of_long_audio_are_as_long_as_what_was_trained_on(opened, seconds, expected):
    trained = replace(opened, info=replace(opened.info, seconds=seconds))
    assert usual_window(trained) == expected
    assert usual_window(replace(opened, info=None)) == 30
    burst = 0.3 * np.sin(np.arange(16_000) / 16_000 * 2 * np.pi * 300)
    samples = np.tile(np.concatenate([burst, np.zeros(8_000)]), 25).astype(np.float32)
    (windows,) = transcribe_audio(trained, [samples], DECODING)
    assert 0.6 * expected < max(w.window.end - w.window.start for w in windows) <= expected
    (short,) = transcribe_audio(trained, [samples[: 16_000 * 29]], DECODING)
    assert len(short) == 1, "up to 30 s are one utterance"
    (asked,) = transcribe_audio(trained, [samples[: 16_000 * 29]], DECODING, longest=15)
    assert len(asked) == 2


def test_silence_has_no_text(opened):
    short, long = np.zeros(16_000, np.float32), np.zeros(16_000 * 50, np.float32)
    done = []
    assert transcribe_audio(opened, [short, long], DECODING, done.append) == [[], []]
    assert sum(done) == pytest.approx(51)


def test_batches_are_padded_as_those_of_corpora(opened):
    samples = np.ones(16_000, np.float32)
    length = context_positions(1.0, context=opened.context, margin=opened.margin)
    batch = make_batch(opened, [(samples, length), (samples[:8000], length)])
    assert batch.audio_BS.shape == (2, length * 320)
    assert batch.valid_B.tolist() == [50, 25]


def test_words_end_where_a_pause_begins():
    pauses = [Stretch(1.0, 2.0), Stretch(3.0, 3.5)]
    words = [Word("a", 0.5, 1.9), Word("b", 1.9, 2.6), Word("c", 2.6, 3.0), Word("d", 3.2, 4.0)]
    assert [(w.start, w.end) for w in snap(words, pauses)] == [(0.5, 1.0), (2.0, 2.6), (2.6, 3.0), (3.5, 4.0)]
    assert snap(words, []) == words


SEGMENTS = [
    Segment(0.0, 1.2345, "a < b & c", (Word("a", 0.0, 1.2345),), (2, 0), (0.75, 0.25), -0.123456),
    Segment(3599.9996, 3601.5, "naïve", (), (), (), -1.0),
]


def test_times_of_subtitles_carry_over():
    assert clock(3599.9996, ",") == "01:00:00,000"
    assert clock(59.9994, ".") == "00:00:59.999"
    assert clock(0, ",") == "00:00:00,000"
    assert clock(360_000, ",") == "100:00:00,000"


def test_formats():
    texts = {kind: make(SEGMENTS, {"file": "x.wav"}) for kind, make in FORMATS.items()}
    assert texts["txt"] == "a < b & c\nnaïve\n"
    assert texts["srt"].startswith("1\n00:00:00,000 --> 00:00:01,234\na < b & c\n\n2\n01:00:00,000 --> ")
    assert texts["vtt"].startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.234\na &lt; b &amp; c\n\n")
    value = json.loads(texts["json"])
    assert value["file"] == "x.wav"
    assert value["segments"][0]["experts"] == [2, 0]
    assert value["segments"][0]["mean_log_probability"] == -0.1235
    assert all(make([], {}) is not None for make in FORMATS.values())


def test_segments_end_at_pauses_sentences_and_windows(opened, tones):
    corpus = read_corpus(tones)
    (windows,) = transcribe_audio(opened, [read_audio(corpus.path(corpus.utterances[0]))], DECODING)
    starts = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 6.0, 6.5]
    texts = ["one", "two.", "three", "four", "five", "six", "seven", "eight"]
    words = tuple(Word(text, start, start + 0.4) for text, start in zip(texts, starts, strict=True))
    heard = [replace(windows[0], words=words), replace(windows[0], words=(Word("end", 9.0, 9.5),))]
    segments = segments_of(heard, "en")
    assert [s.text for s in segments] == ["one two.", "three four five six", "seven eight", "end"]
    assert [(s.start, s.end) for s in segments][1] == (1.0, 2.9)
