"""`moe-asr transcribe` as a user meets it: odd files, formats, what already exists, text equal to evaluation's."""

import csv
import json

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from cli.evaluate import evaluate
from cli.segment import segment
from cli.transcribe import say, transcribe
from common.data.corpus import read_corpus
from common.errors import DataError, UsageError
from tests.factories import write_wav

SHORT = ("--set", "decode.max_new_tokens=10", "--set", "runtime.num_workers=0")


def invoke(command, *words):
    """The finished command, with short texts: random weights would go on for ever."""
    options = () if command is segment else SHORT
    done = CliRunner().invoke(command, [str(word) for word in (*words, *options)])
    assert done.exception is None or isinstance(done.exception, UsageError | DataError | SystemExit), done.exception
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tone, stereo at 44.1 kHz, an empty file, a text, silence."""
    folder = tmp_path_factory.mktemp("files")
    tone = 0.3 * np.sin(np.arange(16_000 * 2) / 16_000 * 2 * np.pi * 220)
    write_wav(folder / "tone.wav", tone, 16_000)
    stereo = 0.3 * np.sin(np.arange(44_100) / 44_100 * 2 * np.pi * 220)
    soundfile.write(folder / "stereo.flac", np.stack([stereo, 0.5 * stereo], 1), 44_100)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no audio\n")
    write_wav(folder / "silence.wav", np.zeros(16_000 * 3), 16_000)
    return folder


def test_every_format_is_written_and_nothing_is_overwritten(files, micro_model, tmp_path):
    words = [
        files / "tone.wav",
        files / "stereo.flac",
        "--model",
        micro_model,
        "--format",
        "all",
        "--out",
        tmp_path / "o",
    ]
    assert invoke(transcribe, *words).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == sorted(f"{stem}.{kind}" for stem in ("tone", "stereo") for kind in ("txt", "srt", "vtt", "json"))
    assert json.loads((tmp_path / "o" / "stereo.json").read_text())["seconds"] == 1.0
    before = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    again = invoke(transcribe, *words)
    assert isinstance(again.exception, UsageError)
    assert "already exist" in str(again.exception)
    assert invoke(transcribe, *words, "--overwrite").exit_code == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}


def test_what_cannot_be_read_is_named_and_the_rest_is_done(files, micro_model, tmp_path):
    bad = [files / name for name in ("empty.wav", "text.wav", "gone.wav")]
    done = invoke(
        transcribe, *bad, files / "tone.wav", files / "silence.wav", "--model", micro_model, "--out", tmp_path
    )
    assert isinstance(done.exception, DataError)
    assert "3 of 5 recordings could not be transcribed" in str(done.exception)
    assert "2 of 5 recordings cannot be opened" in done.stderr.splitlines()[0], "known before the model is loaded"
    for file in bad:
        assert sum(f"{file}" in line for line in done.stderr.splitlines()) == 1
    assert f"{files / 'silence.wav'}: no speech was found" in done.stderr
    assert f"{tmp_path}: 2 files written, of 2 recordings" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["silence.txt", "tone.txt"]
    assert (tmp_path / "silence.txt").read_text() == ""


def test_without_a_folder_the_transcript_is_printed(files, micro_model):
    done = invoke(transcribe, files / "tone.wav", "--model", micro_model, "--format", "json")
    assert json.loads(done.stdout)["file"] == str(files / "tone.wav")
    assert "--out" in str(invoke(transcribe, files / "tone.wav", "--model", micro_model, "--format", "all").exception)


def test_a_missing_folder_is_no_hub_name(files):
    done = invoke(transcribe, files / "tone.wav", "--model", "../nothere")
    assert isinstance(done.exception, DataError)
    assert "model '../nothere' is neither a folder, nor a run, nor a hub name" in str(done.exception)


def test_a_terminal_obeys_nothing_that_a_transcript_contains(capsys, tmp_path):
    say("\x1b[2Jtext\n", on_stdout=True)
    say("file\x1b[2J: no speech was found")
    printed = capsys.readouterr()
    assert printed.out == "\\u001b[2Jtext\n" and printed.err == "file\\u001b[2J: no speech was found\n"


def test_two_files_of_one_name_are_refused(files, micro_model, tmp_path):
    other = tmp_path / "tone.flac"
    other.touch()
    done = invoke(transcribe, files / "tone.wav", other, "--model", micro_model, "--out", tmp_path)
    assert "would both become" in str(done.exception)


@pytest.mark.parametrize("options", [[], ["--set", "decode.num_beams=3"]])
def test_short_files_get_the_text_of_evaluate(tones, micro_model, tmp_path, options):
    corpus = read_corpus(tones)
    assert invoke(evaluate, micro_model, tones, "--split", "dev", "--out", tmp_path / "e", *options).exit_code == 0
    with next((tmp_path / "e").glob("*.csv")).open(encoding="utf-8") as file:
        expected = {row["id"]: row["hypothesis"] for row in csv.DictReader(file)}
    paths = [corpus.path(u) for u in corpus.split("dev")]
    as_is = ("--no-fall-back", "--loops", "keep")
    words = [*paths, "--model", micro_model, "--out", tmp_path / "t", "--format", "json", *as_is, *options]
    assert invoke(transcribe, *words).exit_code == 0
    for u in corpus.split("dev"):
        transcript = json.loads((tmp_path / "t" / f"{u.id}.json").read_text())
        assert " ".join(s["text"] for s in transcript["segments"]).split() == expected[u.id].split()


def test_an_index_of_segments_is_a_corpus(micro_model, tmp_path):
    burst = 0.3 * np.sin(np.arange(32_000) / 16_000 * 2 * np.pi * 300)
    folder = tmp_path / "corpus"
    write_wav(folder / "long.wav", np.concatenate([np.concatenate([burst, np.zeros(16_000)])] * 12), 16_000)
    line = {"audio_filepath": "long.wav", "duration": 36.0, "text": "one two three four five six"}
    (folder / "index.jsonl").write_text(json.dumps(line) + "\n")
    assert invoke(segment, folder, "--model", micro_model).exit_code == 0
    made = read_corpus(folder / "segmented.jsonl")
    assert " ".join(u.text for u in made.utterances) == line["text"]
    assert all(u.duration <= 30 for u in made.utterances)
    assert "--overwrite" in str(invoke(segment, folder, "--model", micro_model).exception)
    assert "own index" in str(invoke(segment, folder, folder / "index.jsonl", "--model", micro_model).exception)
    assert invoke(segment, folder, tmp_path / "other", "--model", micro_model).exit_code == 0
    moved = read_corpus(tmp_path / "other")
    assert [(u.id, u.text) for u in moved.utterances] == [(u.id, u.text) for u in made.utterances]
    assert all(moved.path(u).is_file() for u in moved.utterances)
