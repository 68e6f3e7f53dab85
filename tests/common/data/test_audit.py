"""The audit finds each fault that is planted, names the utterance, and finds nothing in a sound corpus."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from common.data.audit import audit
from common.data.corpus import Corpus, Utterance, read_corpus, write_index
from tests.factories import write_wav


def noise(number: int, seconds: float = 1.0, rate: int = 16000) -> np.ndarray:
    return np.random.default_rng(number).uniform(-0.3, 0.3, round(seconds * rate)).astype(np.float32)


@pytest.fixture
def utterances(tmp_path) -> list[Utterance]:
    made = [Utterance(f"u{i}", f"u{i}.wav", 1.0, f"text {i}", speaker=f"s{i // 2}") for i in range(4)]
    for i, u in enumerate(made):
        write_wav(tmp_path / u.audio_filepath, noise(i))
    return made


def findings(folder, utterances, **options) -> list[tuple[str, str, str]]:
    write_index(folder, utterances)
    return [(f.severity, f.kind, f.utterance_id) for f in audit(read_corpus(folder), **options)]


def test_a_sound_corpus_has_no_findings(tmp_path, utterances):
    assert findings(tmp_path, utterances, token_count=len) == []


@pytest.mark.parametrize(
    ("changes", "severity", "kind"),
    [
        ({"text": "  "}, "error", "empty-text"),
        ({"audio_filepath": "missing.wav"}, "error", "unreadable-audio"),
        ({"offset": 5.0}, "error", "unreadable-audio"),
        ({"split": "test"}, "error", "shared-speaker"),
        ({"text": "x" * 41}, "warning", "text-too-fast"),
        ({"duration": 0.5}, "warning", "duration-differs"),
    ],
)
def test_a_fault_of_the_index_is_found(tmp_path, utterances, changes, severity, kind):
    faulty = [*utterances[:3], replace(utterances[3], **changes)]
    assert findings(tmp_path, faulty) == [(severity, kind, "u3")]


def damage(path, how: str) -> None:
    samples = noise(3)
    match how:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"this is no audio " * 30)
        case "no samples":
            write_wav(path, samples[:0])
        case "nan":
            samples[100] = np.nan
            soundfile.write(path, samples, 16000, subtype="FLOAT")
        case "silent":
            write_wav(path, samples * 0)
        case "8 kHz":
            write_wav(path, noise(3, rate=8000), 8000)
        case "stereo":
            write_wav(path, np.stack([samples, samples], axis=1))


@pytest.mark.parametrize(
    ("how", "severity", "kind"),
    [
        ("empty", "error", "unreadable-audio"),
        ("text", "error", "unreadable-audio"),
        ("no samples", "error", "unreadable-audio"),
        ("nan", "error", "not-finite"),
        ("silent", "error", "silent-audio"),
        ("8 kHz", "warning", "resampled"),
        ("stereo", "warning", "mixed-down"),
    ],
)
def test_a_fault_of_the_audio_is_found(tmp_path, utterances, how, severity, kind):
    damage(tmp_path / "u3.wav", how)
    assert findings(tmp_path, utterances) == [(severity, kind, "u3")]


def test_audio_over_30_s_is_found(tmp_path, utterances):
    write_wav(tmp_path / "u3.wav", noise(3, 30.5))
    faulty = [*utterances[:3], replace(utterances[3], duration=30.5)]
    assert findings(tmp_path, faulty) == [("error", "too-long", "u3")]


def test_texts_over_448_tokens_are_found(tmp_path, utterances):
    counted = {"text 2": 448, "text 3": 449}
    problems = findings(tmp_path, utterances, token_count=lambda text: counted.get(text, 1))
    assert problems == [("error", "too-many-tokens", "u3")]


def test_equal_audio_is_a_warning_in_one_split_and_an_error_across_splits(tmp_path, utterances):
    write_wav(tmp_path / "u3.wav", noise(0))
    assert findings(tmp_path, utterances) == [("warning", "duplicate-audio", "u3")]
    other_split = [*utterances[:3], replace(utterances[3], split="test", speaker="another")]
    assert findings(tmp_path, other_split) == [("error", "duplicate-across-splits", "u3")]


def test_several_utterances_in_one_file_are_no_duplicates(tmp_path):
    write_wav(tmp_path / "long.wav", noise(0, 4.0))
    cut = [Utterance(f"u{i}", "long.wav", 1.0, "some text", speaker="s", offset=float(i)) for i in range(4)]
    assert findings(tmp_path, cut) == []
    twice = [*cut, replace(cut[3], id="u9")]
    assert findings(tmp_path, twice) == [("warning", "duplicate-audio", "u9")]
    past_the_end = [*cut, replace(cut[3], id="u9", offset=3.5)]
    assert findings(tmp_path, past_the_end) == [("error", "past-the-end", "u9")]


def test_an_id_that_occurs_twice_is_found(tmp_path, utterances):
    corpus = Corpus(tmp_path, (*utterances, replace(utterances[1], id="u0")), "no digest")
    kinds = {f.kind for f in audit(corpus)}
    assert "duplicate-id" in kinds


def test_errors_come_before_warnings(tmp_path, utterances):
    damage(tmp_path / "u0.wav", "stereo")
    damage(tmp_path / "u3.wav", "nan")
    assert [kind for _, kind, _ in findings(tmp_path, utterances)] == ["not-finite", "mixed-down"]
