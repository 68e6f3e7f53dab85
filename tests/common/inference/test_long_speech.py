"""Long recordings with the real tiny.en: transcripts are divided where their words are said, and heard without a loss.

The recordings are utterances of espeak-ng's voices one after the other, so that the truth is known from construction.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from common.data.audio import SAMPLE_RATE, read_audio
from common.data.corpus import Utterance
from common.data.features import context_positions
from common.decoding.decode import Decoding
from common.inference.load_model import open_model
from common.inference.segment import divide
from common.inference.transcribe import make_batch, segments_of, transcribe_audio
from common.text import normalise
from demo.corpus import synthesize
from tests.factories import heard_texts

DECODING = Decoding(batch_size=4, max_new_tokens=224)


@dataclass(frozen=True)
class Recording:
    """Utterances one after the other: samples, and (start, end, text) of each."""

    samples: np.ndarray
    said: list[tuple[float, float, str]]

    @property
    def words(self):
        """(word, start and end of the utterance that it is in)."""
        return [(word, start, end) for start, end, text in self.said for word in text.split()]


@pytest.fixture(scope="module")
def opened(tiny_en, tmp_path_factory):
    return open_model(str(tiny_en), store=None, cache=tmp_path_factory.mktemp("cache"), device="cpu")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """(samples, text) by speaker; one that is understood well, and one with half its words wrong."""
    corpus = synthesize(
        tmp_path_factory.mktemp("spoken") / "corpus",
        speakers_per_etiology=3,
        utterances_per_speaker=11,
        seed=5,
        etiologies=["typical", "slurred"],
    )
    voices = {}
    for u in corpus.utterances:
        voices.setdefault((u.etiology, u.speaker), []).append((read_audio(corpus.path(u)), u.text))
    return dict(sorted(voices.items(), reverse=True))


def one_after_the_other(utterances, *, pause, seed):
    generator = np.random.default_rng(seed)
    parts, said, time = [], [], 0.0
    for samples, text in utterances:
        seconds = len(samples) / SAMPLE_RATE
        parts += [samples, np.zeros(int(generator.uniform(*pause) * SAMPLE_RATE), np.float32)]
        said.append((time, time + seconds, text))
        time += seconds + len(parts[-1]) / SAMPLE_RATE
    return Recording(np.concatenate(parts), said)


@pytest.fixture(scope="module")
def recordings(spoken):
    """Five minutes: one recording of each speaker, first those who are understood well."""
    return [one_after_the_other(own, pause=(0.25, 0.8), seed=n) for n, own in enumerate(spoken.values())]


@pytest.mark.timeout(900)
def test_nineteen_of_twenty_words_go_to_the_piece_in_which_they_are_said(opened, recordings):
    utterances = [
        Utterance(
            f"r{n}", f"r{n}.wav", len(source.samples) / SAMPLE_RATE, " ".join(word for word, _, _ in source.words)
        )
        for n, source in enumerate(recordings)
    ]
    divisions = divide(opened, utterances, [source.samples for source in recordings])
    total = right = 0
    for recording, utterance, division in zip(recordings, utterances, divisions, strict=True):
        assert len(division.pieces) > 1
        assert " ".join(piece.text for piece in division.pieces) == utterance.text, "every word is in one piece"
        truth = iter(recording.words)
        for piece in division.pieces:
            start, end = piece.offset, piece.offset + piece.duration
            assert piece.duration <= 30
            for moment in (start, end):
                assert not any(a < moment < b for _, a, b in recording.words), "cuts lie between utterances"
            for word in piece.text.split():
                written, a, b = next(truth)
                assert word == written
                total += 1
                right += start <= (a + b) / 2 <= end
    assert total > 450
    assert right / total >= 0.95


def error_rate(utterances, windows):
    """Of what was heard in one or more recordings, against the texts of their utterances."""
    expected = normalise(" ".join(text for _, text in utterances)).split()
    heard = normalise(" ".join(word.text for group in windows for window in group for word in window.words)).split()
    return Levenshtein.normalized_distance(expected, heard)


@pytest.mark.timeout(300)
def test_every_word_is_heard_once_at_its_time(opened, spoken, recordings):
    utterances, recording = next(iter(spoken.values())), recordings[0]
    (windows,) = transcribe_audio(opened, [recording.samples], DECODING)
    assert len(windows) > 1
    words = [word for window in windows for word in window.words]
    assert all(a.start <= b.start for a, b in pairwise(words))
    one_by_one = transcribe_audio(opened, [samples for samples, _ in utterances], DECODING)
    assert error_rate(utterances, [windows]) < error_rate(utterances, one_by_one) + 0.05
    middles = [(word.start + word.end) / 2 for word in words]
    inside = [any(a - 0.1 <= middle <= b + 0.1 for a, b, _ in recording.said) for middle in middles]
    assert sum(inside) / len(inside) > 0.95
    segments = segments_of(windows, "en")
    assert " ".join(segment.text for segment in segments) == " ".join(word.text for word in words)


@pytest.mark.timeout(300)
def test_where_windows_overlap_no_word_is_lost_or_said_twice(opened, spoken):
    """Speech without any pause, beside a machine that whistles."""
    whistled = [
        (samples + 0.05 * np.sin(2 * np.pi * 7000 / SAMPLE_RATE * np.arange(len(samples))).astype(np.float32), text)
        for samples, text in next(iter(spoken.values()))[:10]
    ]
    recording = one_after_the_other(whistled, pause=(0.0, 0.0), seed=1)
    (windows,) = transcribe_audio(opened, [recording.samples], DECODING)
    assert any(not window.window.paused for window in windows)
    one_by_one = transcribe_audio(opened, [samples for samples, _ in whistled], DECODING)
    assert error_rate(whistled, [windows]) < error_rate(whistled, one_by_one) + 0.05
    heard = [word.text for window in windows for word in window.words]
    assert not any(heard[i : i + 3] == heard[i + 3 : i + 6] for i in range(len(heard) - 5))


def test_a_short_recording_is_one_window_with_the_text_of_evaluation(opened, spoken):
    audios = [samples for samples, _ in next(iter(spoken.values()))[:4]]
    transcripts = transcribe_audio(opened, audios, DECODING)
    for samples, windows in zip(audios, transcripts, strict=True):
        length = context_positions(len(samples) / SAMPLE_RATE, context=opened.context, margin=opened.margin)
        expected = heard_texts(opened, make_batch(opened, [(samples, length)]), DECODING)
        assert [window.decoded.text for window in windows] == expected


def test_timestamp_tokens_come_in_pairs_around_the_same_text(opened, spoken):
    samples = [samples for samples, _ in next(iter(spoken.values()))[:3]]
    plain = transcribe_audio(opened, samples, DECODING)
    timed = transcribe_audio(opened, samples, replace(DECODING, timestamps=True))
    zero = opened.codec.timestamp_begin
    for (before,), (after,) in zip(plain, timed, strict=True):
        times = [token for token in after.decoded.tokens if token >= zero]
        assert after.decoded.tokens[0] == times[0] <= zero + 50
        assert times == sorted(times)
        assert len(times) % 2 == 0
        assert not any(token >= zero for token in before.decoded.tokens)
        expected, heard = (normalise(transcript.decoded.text).split() for transcript in (before, after))
        assert Levenshtein.normalized_distance(expected, heard) < 0.4
