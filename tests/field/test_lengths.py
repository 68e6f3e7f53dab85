"""How long a recording is: what can be decoded, whatever its header says; what was lost is found."""

import os

import numpy as np
import pytest

from common.data.audio import audio_info, measure_audio, read_audio
from common.data.audit import audit
from common.data.corpus import Utterance, read_corpus, write_index
from common.data.headers import header_fault
from common.errors import DataError
from tests.field.audio_files import (
    RATE,
    av_file,
    bursts,
    hurt,
    sound_file,
    tone,
    with_data_size,
    with_id3,
    with_total_samples,
)

WAV, FLAC = sound_file(tone(4)), sound_file(tone(4), "FLAC")
MP3, AAC = av_file(bursts(4), "mp3", "libmp3lame", write_xing="0"), av_file(tone(4), "adts", "aac")
M4A = av_file(tone(4), "mp4", "aac", movflags="faststart")
OPUS, VORBIS = sound_file(bursts(4), "OGG", "OPUS"), sound_file(bursts(4), "OGG", "VORBIS")
INT16_IN_FLOAT = sound_file(32768 * tone(4), "WAV", "FLOAT")


def seconds(content: bytes) -> float:
    """As import measures it; reading gives as much."""
    length = audio_info(content).duration
    assert len(read_audio(content)) / RATE == pytest.approx(length, abs=0.001)
    return length


def kinds(folder, content: bytes, duration: float = 4.0, **changes) -> list[str]:
    """What audit finds in a corpus of one file."""
    (folder / "a").write_bytes(content)
    write_index(folder, [Utterance("a", "a", duration, "some text", speaker="s", **changes)])
    return [finding.kind for finding in audit(read_corpus(folder))]


def test_mp3_without_a_xing_header():
    """DSheirer/sdrtrunk#1377, Borewit/music-metadata#190: the length is estimated from the first frame's bit rate."""
    assert seconds(MP3) == pytest.approx(4.0, abs=0.15)


def test_mp3_behind_a_large_picture():
    """An estimate by the file's size takes a cover for audio (kind: JamesHeinrich/getID3#41)."""
    assert seconds(with_id3(MP3, 300_000)) == pytest.approx(seconds(MP3), abs=0.05)


@pytest.mark.parametrize("content", [av_file(bursts(4), "mp3", "libmp3lame"), MP3, AAC, OPUS, VORBIS], ids=len)
def test_joined_files_are_as_long_as_their_parts(content):
    """JamesHeinrich/getID3#120: the first file's header is taken for that of all."""
    assert seconds(content + content) == pytest.approx(2 * seconds(content), abs=0.2)


def test_flac_with_an_unknown_number_of_samples():
    """libsndfile/libsndfile#1038, Borewit/music-metadata#543: 0 stands for a length that was not known yet."""
    unknown = with_total_samples(FLAC, 0)
    assert seconds(unknown) == 4.0
    assert np.array_equal(read_audio(unknown, offset=1, duration=0.5), read_audio(FLAC, offset=1, duration=0.5))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000], ids=hex)
def test_wav_that_was_written_to_a_pipe(tmp_path, size):
    """rs1729/RS#39, kkroening/ffmpeg-python#118: the size was not known when the header was written."""
    assert seconds(with_data_size(WAV, size)) == 4.0
    assert kinds(tmp_path, with_data_size(WAV, size)) == []


def test_wav_whose_header_is_of_an_earlier_moment(tmp_path):
    """Kind: a recorder that was stopped before it wrote the final size; all after the old one would be lost unsaid."""
    assert kinds(tmp_path, with_data_size(WAV, 32_000), 1.0) == ["cut-short"]


@pytest.mark.parametrize(
    "content",
    [WAV, sound_file(tone(4), "AIFF"), sound_file(tone(4), "AU"), sound_file(tone(4), "RF64"), M4A],
    ids=["wav", "aiff", "au", "rf64", "m4a"],
)
def test_a_file_of_which_half_is_missing_is_found(tmp_path, content):
    """Kind: a copy that was interrupted; NativeInstruments/ni-media#62 has WAV files like that."""
    half = content[: len(content) // 2]
    assert "cut-short" in kinds(tmp_path, half, audio_info(half).duration)
    assert kinds(tmp_path, content, audio_info(content).duration) == []


def test_an_mp3_of_which_half_is_missing_is_found_by_its_xing_header(tmp_path):
    content = av_file(bursts(4), "mp3", "libmp3lame")
    assert "cut-short" in kinds(tmp_path, content[: len(content) // 2], 2.0)
    assert header_fault(content, "a", 4.0) is None


def test_a_flac_of_which_half_is_missing_is_damaged(tmp_path):
    """xiph/flac#257: truncated, and nothing was said."""
    assert "unreadable-audio" in kinds(tmp_path, FLAC[: len(FLAC) // 2])


@pytest.mark.parametrize("content", [OPUS, VORBIS], ids=["opus", "vorbis"])
def test_an_ogg_file_without_its_last_page_is_doubted(tmp_path, content):
    half = content[: content.rfind(b"OggS")]
    assert "unended-audio" in kinds(tmp_path, half, measure_audio(half).seconds)


def test_joined_wav_and_flac_files_are_found(tmp_path):
    """Kind: `cat` of files whose header has one length; the rest would be lost unsaid."""
    assert kinds(tmp_path, WAV + WAV) == ["cut-short"]
    assert kinds(tmp_path, FLAC + FLAC) == ["cut-short"]


@pytest.mark.parametrize(("offset", "duration"), [(3.5, 1.0), (0.0, 5.0)])
def test_a_stretch_past_the_end_is_an_error(tmp_path, offset, duration):
    """Kind: an offset and a duration of another recording; the stretch kept its whole text."""
    assert kinds(tmp_path, WAV, duration, offset=offset) == ["past-the-end"]


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_a_lost_page_is_said_and_silent(subtype):
    """Kind: decoders skip a page whose checksum is wrong, and the rest moves forward."""
    damaged = hurt(sound_file(bursts(20), "OGG", subtype))
    for read in (audio_info, read_audio):
        with pytest.raises(DataError, match="damaged"):
            read(damaged)
    notes: list[str] = []
    assert len(read_audio(damaged, on_damage=notes.append)) == pytest.approx(20 * RATE, abs=RATE * 0.1)
    assert len(notes) == 1 and "cannot be decoded" in notes[0]


def test_a_damaged_last_page_is_found(tmp_path):
    damaged = VORBIS[:-20] + bytes(20)
    assert "cut-short" in kinds(tmp_path, damaged, measure_audio(damaged).seconds)


@pytest.mark.parametrize("content", [M4A, FLAC], ids=["m4a", "flac"])
def test_a_damaged_moment_does_not_cost_the_rest(content):
    """Kind: one packet that cannot be decoded refused a whole recording."""
    notes: list[str] = []
    assert len(read_audio(hurt(content), on_damage=notes.append)) == pytest.approx(4 * RATE, abs=0.2 * RATE)
    assert notes


def test_formats_that_open_other_files_are_no_audio(tmp_path):
    """Kind: FFmpeg takes a playlist for a recording, and reads what it names."""
    (tmp_path / "secret.wav").write_bytes(WAV)
    playlists = [
        f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n",
    ]
    for number, text in enumerate(playlists):
        (tmp_path / f"{number}.wav").write_text(text)
        with pytest.raises(DataError, match="cannot be decoded"):
            read_audio(tmp_path / f"{number}.wav")


def test_a_stretch_of_a_long_mp3_is_that_part_of_it():
    """PyAV seeks inexactly: the stretch is found by timestamps, and begins with the right sample."""
    content = av_file(bursts(60), "mp3", "libmp3lame", write_xing="0")
    whole = read_audio(content)
    part = read_audio(content, offset=45.25, duration=2.0)
    assert len(part) == 2 * RATE
    assert np.abs(part - whole[round(45.25 * RATE) :][: 2 * RATE]).max() < 1e-4
    joined = read_audio(OPUS * 20, offset=70.5, duration=1.0)
    assert np.abs(joined - read_audio(OPUS * 20)[round(70.5 * RATE) :][:RATE]).max() < 0.05


def test_a_name_that_is_no_text_can_be_read(tmp_path):
    """Kind: names in Latin-1, as old archives have them."""
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    path.write_bytes(WAV)
    assert audio_info(path).duration == 4.0
    with pytest.raises(DataError, match="no file can have this name"):
        read_audio(tmp_path / "a\0b.wav")
