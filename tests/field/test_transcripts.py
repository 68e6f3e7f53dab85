"""`transcribe` on what people name on its command line, and what it does with texts that nobody said."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cli.transcribe import decoding_of, transcribe
from common.decoding.alignment import Word
from common.decoding.decode import Decoded, Decoding
from common.decoding.pauses import Window
from common.errors import DataError, UsageError
from common.inference.recordings import LoadedRecording, find_recordings, printable
from common.inference.transcribe import WindowTranscript
from tests.factories import write_wav
from tests.field.audio_files import hurt, sound_file, tone

RECORDING = find_recordings([Path("a.wav")])[0]
OPTIONS = ("--set", "decode.max_new_tokens=6", "--no-fall-back", "--quiet")


def invoke(model, *words, **options):
    """The finished command; an error is in `exception`."""
    done = CliRunner().invoke(transcribe, [*map(str, words), "--model", str(model), *OPTIONS], **options)
    known = UsageError | DataError | SystemExit | None
    assert isinstance(done.exception, known), done.exception
    return done


def test_standard_input_and_pipes_are_read_once(micro_model, tmp_path):
    """m-bain/whisperX#403, openai/whisper#131: recordings that come from another program."""
    write_wav(tmp_path / "a.wav", tone(2))
    content = (tmp_path / "a.wav").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    done = invoke(micro_model, "-", tmp_path / "pipe", tmp_path / "a.wav", "--format", "json", input=content)
    writer.join()
    transcripts = [json.loads("{" + text) for text in done.stdout.split("{\n ") if text]
    assert [transcript["file"] for transcript in transcripts] == [
        "standard input",
        f"{tmp_path}/pipe",
        f"{tmp_path}/a.wav",
    ]
    assert transcripts[0]["segments"] == transcripts[1]["segments"] == transcripts[2]["segments"]
    assert invoke(micro_model, "-", input=b"").exit_code
    assert "device" in str(invoke(micro_model, "/dev/zero").exception)


def test_a_folder_is_all_of_its_recordings(micro_model, tmp_path):
    """alphacep/vosk-api#2061 and others take a folder; other programs' files in it are none (kind: `._take.wav`)."""
    for name in ("b.wav", "day 2/a.WAV", "._b.wav", ".cache/c.wav", "notes.txt"):
        write_wav(tmp_path / "in" / name, tone(1))
    done = invoke(micro_model, tmp_path / "in", "--out", tmp_path / "out", "--format", "all")
    assert done.exit_code == 0
    assert "8 files written, of 2 recordings" in done.stderr
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert names == {f"{stem}.{kind}" for stem in ("b", "day 2/a") for kind in ("txt", "srt", "vtt", "json")}
    (tmp_path / "empty").mkdir()
    assert "contains no recording" in str(invoke(micro_model, tmp_path / "empty").exception)


def test_paths_are_checked_before_a_model_is_loaded(tmp_path):
    done = invoke(tmp_path / "no model", tmp_path / "gone.wav", tmp_path / "gone too.wav")
    assert "2 of 2 recordings could not be transcribed" in str(done.exception)


def test_names_that_cannot_be_printed(micro_model, tmp_path):
    """Kind: file names in Latin-1, or with a line feed or an escape sequence; nothing was written of any file."""
    names = [b"caf\xe9.wav", b"two\nlines \x1b[31m.wav"]
    for name in names:
        write_wav(tmp_path / os.fsdecode(name), tone(1))
    done = invoke(micro_model, tmp_path, "--out", tmp_path / "out", "--format", "json")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out").iterdir())) == 2
    for path in (tmp_path / "out").iterdir():
        assert json.loads(path.read_bytes())["file"].isprintable()
    done = invoke(micro_model, tmp_path)
    assert "caf\\xe9.wav" in done.stdout and "two\\nlines \\x1b[31m.wav" in done.stdout


def test_text_that_a_terminal_cannot_show_ends_nothing(micro_model, tmp_path):
    """Kind: an ASCII terminal, or a log that is one."""
    write_wav(tmp_path / "é.wav", tone(1))
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "cli.main", "transcribe", *("--model", str(micro_model), *OPTIONS)]
    done = subprocess.run([*command, tmp_path / "é.wav", tmp_path], capture_output=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert b"\\xe9.wav <==" in done.stdout


def test_what_is_damaged_is_transcribed_and_said(micro_model, tmp_path):
    """Kind: a damaged moment of a recording cost all of it, and a lost one was lost unsaid."""
    (tmp_path / "a.flac").write_bytes(hurt(sound_file(tone(4), "FLAC")))
    write_wav(tmp_path / "half.wav", tone(4))
    content = (tmp_path / "half.wav").read_bytes()
    (tmp_path / "half.wav").write_bytes(content[: len(content) // 2])
    done = invoke(micro_model, tmp_path, "--out", tmp_path / "out", "--format", "json")
    assert done.exit_code == 0
    assert "is damaged: " in done.stderr and "it was cut short" in done.stderr
    assert "damaged" in json.loads((tmp_path / "out" / "a.json").read_text())["notes"][0]


def window(text: str, *, loop: bool = False, start: float = 0.0, **decoded) -> WindowTranscript:
    words = tuple(Word(word, start + number / 10, start + number / 10) for number, word in enumerate(text.split()))
    result = replace(Decoded(text, (), -0.2, 0.0), **decoded)
    return WindowTranscript(Window(start, start + 10, start, start + 10, True), words, result, (), (), loop)


@pytest.mark.parametrize(
    ("loops", "texts"), [("cut", ["good day", "so on"]), ("keep", ["good day", "so on " * 30]), ("drop", ["good day"])]
)
def test_loops_do_not_reach_the_subtitles(loops, texts):
    """openai/whisper#2795, SYSTRAN/faster-whisper#394: dozens of cues at one instant."""
    loaded = LoadedRecording(RECORDING, np.zeros(1, np.float32))
    windows = [window("good day"), window("so on " * 30, loop=True, start=10)]
    kept = loaded.treated(windows, loops, None, "en")
    assert [" ".join(word.text for word in window.words) for window in kept] == [text.strip() for text in texts]
    assert len(loaded.notes) == 1 and "10.0 to 20.0 s: a phrase in a loop" in loaded.notes[0]
    assert [window.loop for window in kept] == [False, True][: len(kept)], "JSON marks what remains"


def test_guesses_on_silence_are_dropped_on_demand():
    """Kind: a sentence on noise; Whisper's own threshold, for those who want it."""
    loaded = LoadedRecording(RECORDING, np.zeros(1, np.float32))
    silence = window("Thank you.", mean_log_probability=-1.3, no_speech_probability=0.8)
    quiet = window("I am here.", mean_log_probability=-0.4, no_speech_probability=0.8)
    assert loaded.treated([silence, quiet], "cut", None, "en") == [silence, quiet]
    assert loaded.treated([silence, quiet], "cut", 0.6, "en") == [quiet]
    assert "probably no speech" in loaded.notes[0]


def test_fallback_is_whispers_unless_told_otherwise():
    decoding = Decoding(batch_size=4, max_new_tokens=9)
    assert decoding_of(decoding, fall_back=True, no_speech=None).temperatures == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert decoding_of(decoding, fall_back=False, no_speech=None).temperatures == (0.0,)
    own = replace(decoding, temperatures=(0.3, 0.5))
    assert decoding_of(own, fall_back=True, no_speech=0.6).temperatures == (0.3, 0.5)


def test_printable_names():
    assert printable(Path("naïve 文.wav")) == "naïve 文.wav"
