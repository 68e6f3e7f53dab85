"""The stand-in etiologies of synthetic corpora, with their voices, effects and sounds.

The names say how the speech sounds and stand for no diagnosis. Those of the demonstration differ by voice and effect;
each was chosen by measurement: Whisper tiny.en gets it clearly more wrong than plain speech (`moe-asr evaluate`
shows by how much). Those of the benchmark, called by where they might come from, speak fast, too, and say one sound for
another, by rules that contradict each other.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from common.data.audio import Samples
from demo import effects as effects

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class StandIn:
    """How the speakers of one stand-in etiology sound, from the mildest to the most severe.

    Args:
        variants: espeak-ng voice variants of en-us; the speakers take turns.
        rate: words per minute.
        word_gap: pause between words, in espeak-ng's units of about 10 ms.
        effect: what is done to the signal, and how strongly.
        sounds: phoneme → what is said in its place, in espeak-ng's names.
        share: share of the words in which sounds are replaced.
    """

    variants: tuple[str, ...]
    rate: Range
    word_gap: int = 1
    effect: Callable[[Samples, np.random.Generator, float], Samples] | None = None
    strength: Range = (0, 0)
    sounds: Mapping[str, str] = field(default_factory=dict)
    share: Range = (0, 0)


_PLAIN = ("m3", "m1", "m7", "Mike")
STAND_INS = {
    "typical": StandIn(_PLAIN, rate=(140, 160)),
    "breathy": StandIn(_PLAIN, rate=(145, 155), effect=effects.add_breath, strength=(0.5, 1.4)),
    "halting": StandIn(_PLAIN, rate=(150, 160), effect=effects.repeat_syllables, strength=(1.2, 0.6)),
    "muffled": StandIn(_PLAIN, rate=(145, 155), effect=effects.muffle, strength=(1500, 700)),
    "rushed": StandIn(_PLAIN, rate=(230, 330), word_gap=0),
    "slurred": StandIn(_PLAIN, rate=(130, 150), effect=effects.smear, strength=(0.1, 0.2)),
    "tremulous": StandIn(_PLAIN, rate=(145, 160), effect=effects.add_tremor, strength=(0.8, 1.2)),
    "whispered": StandIn(("whisper", "whisperf"), rate=(160, 240), word_gap=0),
}


def cycle(*sounds: str) -> dict[str, str]:
    """A rule that replaces each sound by the next, and the last by the first; no sounds are merged, so it is
    invertible.
    """
    return dict(zip(sounds, (*sounds[1:], sounds[0]), strict=True))


def undone(sounds: Mapping[str, str]) -> dict[str, str]:
    """The inverse of a rule."""
    return {said: meant for meant, said in sounds.items()}


# Stops, fricatives, vowels and sonorants, each shifted one way or the other. A group takes one direction of each, and
# any two groups differ in at least two of the four, so that what undoes one group's sounds spoils the other's.
_SHIFTS = (
    cycle("k", "t", "p") | cycle("g", "d", "b"),
    cycle("s", "T", "f") | cycle("z", "D", "v"),
    cycle("a", "E", "I", "i:") | cycle("O:", "oU", "u:"),
    cycle("r", "w", "l") | cycle("m", "n", "N"),
)


def shifted(directions: str) -> dict[str, str]:
    """The sounds of a group from its four directions, as in "+-+-"."""
    rules: dict[str, str] = {}
    for shift, direction in zip(_SHIFTS, directions, strict=True):
        rules |= shift if direction == "+" else undone(shift)
    return rules


def _group(
    directions: str,
    variants: tuple[str, ...] = _PLAIN,
    effect: Callable[[Samples, np.random.Generator, float], Samples] | None = None,
    strength: Range = (0, 0),
) -> StandIn:
    return StandIn(variants, (200, 250), 0, effect, strength, sounds=shifted(directions), share=(0.75, 1.0))


BENCH = {
    "typical": STAND_INS["typical"],
    "north": _group("++++", effect=effects.add_breath, strength=(0.4, 1.0)),
    "south": _group("----", ("klatt", "klatt2")),
    "east": _group("+-+-", effect=effects.add_tremor, strength=(0.6, 1.0)),
    "west": _group("-+-+", effect=effects.muffle, strength=(1800, 1000)),
    "coast": _group("++--", ("whisper", "whisperf")),
    "island": _group("--++", ("croak", "m3"), effects.smear, (0.04, 0.08)),
}
# The same rules in the same voices at the same pace: the groups differ only in the replaced sounds.
BENCH_ALIKE = {
    name: replace(group, variants=_PLAIN, rate=(200, 250), word_gap=0, effect=None, strength=(0, 0))
    for name, group in BENCH.items()
}
UNSEEN = "island"  # the benchmark's group of whom only test speaks
# Sounds that espeak-ng writes in several ways by their neighbours, and are one to the ear.
_SAME = {"t#": "t", "t2": "t", "I2": "I", "I#": "I", "i": "i:", "r-": "r", "n-": "n"}
_MARKS = "',%="  # of stress, before a vowel


def replace_sounds(spoken: str, sounds: Mapping[str, str], rng: random.Random, share: float) -> str:
    """Says some words with other sounds.

    Args:
        spoken: phonemes, `|` between them and spaces between words (as espeak-ng writes them).
        sounds: phoneme → what is said in its place.
        share: share of the words in which sounds are replaced, chosen at random.
    """

    def replaced(phoneme: str) -> str:
        bare = phoneme.lstrip(_MARKS)
        stress = phoneme[: len(phoneme) - len(bare)]
        return stress + sounds.get(_SAME.get(bare, bare), bare)

    words = spoken.split(" ")
    return " ".join("|".join(map(replaced, word.split("|"))) if rng.random() < share else word for word in words)
