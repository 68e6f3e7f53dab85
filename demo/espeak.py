"""espeak-ng's voices through its C interface, one utterance at a time, in memory."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import soxr
from numpy.typing import NDArray

from common.data.audio import SAMPLE_RATE, Samples
from common.errors import DataError

ESPEAK_RATE = 22050  # Hz, of all of espeak-ng's voices

# Numbers of espeak-ng's C interface (speak_lib.h).
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT_ON_ERROR = 0x8000
_CHARS_UTF8 = 1
_PHONEMES = 0x100
_RATE, _PITCH, _PITCH_RANGE, _WORD_GAP = 1, 3, 4, 7

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_callbacks: list[Any] = []  # kept alive here: the library calls them as long as it lives


def speak(
    text: str,
    *,
    variant: str,
    rate: int,
    pitch: int,
    word_gap: int,
    seed: int,
    tract: float = 1.0,
    replace: Callable[[str], str] | None = None,
) -> Samples:
    """Say a text with one of espeak-ng's American voices.

    Args:
        variant: of the voice, as in `espeak-ng --voices=variant`; empty for the plain voice.
        rate: words per minute, 80 to 450.
        pitch: 0 to 99.
        word_gap: pause between words, in units of about 10 ms.
        seed: of the voice's noise.
        tract: length of the vocal tract against that of the voice; a longer one has lower formants.
        replace: changes the text's phonemes (`|` between them, spaces between words) into those to be said.

    Returns:
        samples (T,) at 16 kHz, in [-1, 1].

    Raises:
        DataError: espeak-ng is not installed, or has no such voice.
    """
    library, blocks = _load_espeak()
    # espeak-ng itself takes an unknown variant for the plain voice, without a word.
    known = not variant or (_voice_data() / "voices" / "!v" / variant).is_file()
    if not known or library.espeak_SetVoiceByName(f"en-us+{variant}".rstrip("+").encode()) != 0:
        raise DataError(f"espeak-ng has no voice variant {variant!r}: choose another")
    for parameter, value in ((_RATE, round(rate * tract)), (_PITCH, pitch), (_PITCH_RANGE, 50), (_WORD_GAP, word_gap)):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    blocks.clear()
    said = text if replace is None else f"[[{replace(_phonemes(library, text))}]]"
    flags = _CHARS_UTF8 if replace is None else _CHARS_UTF8 | _PHONEMES
    content = said.encode()
    library.espeak_Synth(content, ctypes.c_size_t(len(content) + 1), 0, _CHARS_UTF8, 0, flags, None, None)
    if not blocks:
        raise DataError(f"espeak-ng says nothing for {text!r}: give it words")
    samples = np.concatenate(blocks).astype(np.float32) / 32768
    return np.asarray(soxr.resample(samples, ESPEAK_RATE / tract, SAMPLE_RATE), np.float32)


def _phonemes(library: ctypes.CDLL, text: str) -> str:
    """The phonemes of a text in the current voice."""
    rest, clauses = ctypes.c_char_p(text.encode()), []
    while rest.value:
        clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), _CHARS_UTF8, ord("|") << 8).decode())
    return " ".join(clauses)


def require_espeak() -> ModuleType:
    """The package that contains espeak-ng.

    Raises:
        DataError: it is not installed.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise DataError("synthesis needs espeak-ng: `pip install moe-asr[demo]`") from error
    return cast(ModuleType, espeakng_loader)


def _voice_data() -> Path:
    return Path(require_espeak().get_data_path())


@cache
def _load_espeak() -> tuple[ctypes.CDLL, list[NDArray[np.int16]]]:
    """The initialised library, and the list to which it appends what it speaks."""
    blocks: list[NDArray[np.int16]] = []

    def collect(samples: Any, count: int, _events: int | None) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library = ctypes.CDLL(str(require_espeak().get_library_path()))
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    data = str(_voice_data()).encode()
    if library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _DONT_EXIT_ON_ERROR) != ESPEAK_RATE:
        raise DataError(f"espeak-ng does not start with the voices in {_voice_data()}: install espeakng-loader again")
    _callbacks.append(_Callback(collect))
    library.espeak_SetSynthCallback(_callbacks[-1])
    return library, blocks
