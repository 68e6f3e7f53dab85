"""Sentences for synthetic speech: an open vocabulary in committed patterns, with splits that share no phrase.

A small closed grammar would be memorised in one epoch. Here the content words come from a frequency list, and every
pair of neighbouring content words belongs to exactly one split (by its hash), so that no sentence and no phrase of two
or more content words of dev or test occurs in training, for any size of the corpus.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from common.errors import DataError
from common.text import normalise

# Shares of the pair space. Only disjointness needs them; how many sentences each split gets is the caller's choice.
BASE_WORDS = 9000  # the most frequent words, which may be base forms
KNOWN_WORDS = 20_000  # count as existing when inflected forms are looked up
_PAIR_SHARES = (("train", 0.7), ("dev", 0.85), ("test", 1.0))

# Content slots: n noun, p plural noun, v verb in the past tense, a adjective, d adverb; at least three in a pattern.
# Closed slots: D and E determiners of one and of several, S subject, P preposition, M modal verb, T time.
PATTERNS = (
    "i think that {D} {n} {M} be a {a} {n} {T}",
    "there was nothing in {D} {n} that {S} could say about the {a} {n}",
    "{S} {v} {D} {n} {P} the {n} {T}",
    "when {S} came back to the {n} {E} {a} {p} were gone",
    "do you know why {D} {n} {v} the {a} {n}",
    "{S} did not want to talk about {D} {n} or the {a} {p}",
    "if {S} went {P} the {n} we would see {E} {a} {p}",
    "it is not easy to find {a} {p} for {D} {n}",
    "{S} said that the {n} {v} {P} {D} {n}",
    "{T} {S} {d} {v} {D} {n} and the {p}",
    "all of the {a} {p} had to wait for {D} {n}",
    "please put {D} {n} and the {a} {n} here",
    "what would you do with {D} {a} {n} and the {n}",
    "{S} had never seen so many {p} {P} {D} {a} {n}",
    "{D} {n} was more {a} than the {p} we knew",
    "after that {S} {v} some {p} and went {P} {D} {n}",
    "you can see the {a} {n} and {E} {p} from there",
    "how long will it take until {D} {n} and the {p} are {a}",
    "{D} {a} {n} looked like a {n} to me",
    "everyone {P} the {n} {d} {v} {E} {p}",
    "{S} should ask for {D} {n} before {E} {a} {p} come",
    "that was the {n} which {S} {v} with {D} {n}",
    "both of them {v} because {D} {n} was so {a}",
    "who told you that {E} {p} {v} the {n}",
    "{T} there were {p} and a {n} {P} {D} {n}",
    "no one {M} have thought that {a} {p} {v} {D} {n}",
    "let me show you where the {n} {d} {v} {D} {n}",
    "{D} {n} {M} help us with the {n} and some {p} {T}",
    "we took the {a} {p} {P} {D} {n} and left",
    "as soon as the {n} {v} {S} called {D} {n}",
    "only a few of the {p} were {d} {a} {T}",
    "it {M} be the {n} or {D} {a} {n} that you heard",
)
# Patterns of the benchmark: short, and mostly content words.
SHORT_PATTERNS = (
    "{D} {a} {n} {v} the {p}",
    "{S} {d} {v} {D} {n}",
    "{E} {p} {v} a {a} {n}",
    "{S} {v} the {n} {P} {D} {n}",
    "{a} {p} {M} help {D} {n}",
    "the {n} and the {p} {v} {T}",
    "{D} {n} {P} the {a} {n}",
    "{T} the {n} {v} {E} {p}",
    "was {D} {n} as {a} as the {n}",
    "a {n} of {a} {p}",
)
_CLOSED_SLOTS = {
    slot: words.split("|")
    for slot, words in {
        "D": "the|this|that|my|your|his|her|our|their|another|every|each",
        "E": "the|these|those|my|your|his|her|our|their|some|many|all the",
        "S": "she|he|they|we|you|i|nobody|someone|everybody|people|my friends|the others",
        "P": "near|behind|before|after|under|with|without|inside|across|around|from|above",
        "M": "will|could|should|might|would|must|may|cannot",
        "T": "today|tonight|tomorrow|yesterday|again|this morning|last week|every day|right now",
    }.items()
}
_CONTENT_SLOTS = {"n": "nouns", "p": "plurals", "v": "verbs", "a": "adjectives", "d": "adverbs"}
_SLOT = re.compile(r"\{([a-zA-Z])\}")
FUNCTION_WORDS = frozenset(
    " ".join(
        ["an", re.sub(_SLOT, " ", " ".join(PATTERNS)), *(" ".join(words) for words in _CLOSED_SLOTS.values())]
    ).split()
)

# "an" goes by sound: "a university", "a user", "a european", but "an hour", "an honest".
_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou]|hour|hon(?:est|or))(?!uni|use|usu|util|eu|one)")

# Beginnings of words that do not belong into a corpus to be shown to anybody.
_UNWANTED = re.compile(
    "anal|arous|ass$|asses$|assault|bastard|bitch|bomb|breast|chink|cock|corpse|crap|cunt|damn|dick|drug|dyke|erect|erotic"
    "|execut|fag|fat$|fuck|gay|genocid|gun|hell$|hells$|homo|hooker|islam|jew|kill|lesbian|massacr|masturb|murder|muslim"
    "|nazi|negro|nigg|nud|orgasm|penis|piss|porn|prostitut|puss|queer|racis|racial|rap(e|es|ed|ist|ists)$|semen|sex|shit"
    "|shoot|slav|slut|sperm|suicid|terror|tit$|tits$|tortur|vagina|virgin|whore|cum$|cums$|abort|boob|nipple|molest"
)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Content words by part of speech, most frequent first."""

    nouns: tuple[str, ...]
    plurals: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]


@cache
def build_lexicon() -> Lexicon:
    """Sort frequent English words into parts of speech by which inflected forms are frequent as well.

    A word with a past tense and a present participle is a verb; one with an adverb in -ly is an adjective; one with a
    plural and neither of these is a noun. Words without such forms, such as names and abbreviations, are omitted.

    Raises:
        DataError: the package `wordfreq` is not installed.
    """
    try:
        from wordfreq import top_n_list, zipf_frequency
    except ImportError as error:
        raise DataError("the vocabulary needs the package wordfreq: `pip install moe-asr[demo]`") from error
    ranked = top_n_list("en", KNOWN_WORDS)
    known = set(ranked)
    base = [word for word in ranked[:BASE_WORDS] if _is_plain(word)]
    verbs = [word for word in base if {past(word), participle(word)} <= known]
    taken = set(verbs)
    adjectives = [word for word in base if word not in taken and adverb(word) in known and not word.endswith("ly")]
    taken |= set(adjectives)
    nouns = [
        word
        for word in base
        if word not in taken
        and plural(word) in known
        and not {past(word), participle(word), participle(word + word[-1])} & known
        # A name's plural is rare compared with the name itself.
        and zipf_frequency(word, "en") - zipf_frequency(plural(word), "en") < 1.3
    ]
    return Lexicon(
        nouns=tuple(nouns),
        plurals=tuple(filter(_is_plain, map(plural, nouns))),
        verbs=tuple(filter(_is_plain, map(past, verbs))),
        adjectives=tuple(adjectives),
        adverbs=tuple(filter(_is_plain, map(adverb, adjectives))),
    )


def _is_plain(word: str) -> bool:
    """Whether a word is a plain content word: only letters, inoffensive, and unchanged by Whisper's normaliser."""
    letters = word.isascii() and word.isalpha() and 5 <= len(word) <= 11
    return letters and word not in FUNCTION_WORDS and not _UNWANTED.match(word) and normalise(word) == word


def plural(word: str) -> str:
    """The regular plural of a noun."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if _ends_in_consonant_y(word) else word + "s"


def past(word: str) -> str:
    """The regular past tense of a verb."""
    if word.endswith("e"):
        return word + "d"
    return word[:-1] + "ied" if _ends_in_consonant_y(word) else word + "ed"


def participle(word: str) -> str:
    """The regular present participle of a verb."""
    return (word[:-1] if word.endswith("e") and not word.endswith("ee") else word) + "ing"


def adverb(word: str) -> str:
    """The regular adverb of an adjective."""
    if word.endswith("y"):
        return word[:-1] + "ily"
    if word.endswith("le"):
        return word[:-1] + "y"
    return word + ("ally" if word.endswith("ic") else "ly")


def _ends_in_consonant_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


def pair_split(first: str, second: str) -> str:
    """The only split in which `second` may be the next content word after `first`."""
    digest = hashlib.blake2b(f"{first} {second}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return next(name for name, upper in _PAIR_SHARES if share < upper)


def held_out(word: str) -> bool:
    """Whether a word is excluded from training: about one in five."""
    return hashlib.blake2b(word.encode(), digest_size=1).digest()[0] < 51


@cache
def training_lexicon() -> Lexicon:
    """The words that may occur in training if some are held out."""
    whole = build_lexicon()
    return Lexicon(*(tuple(w for w in getattr(whole, kind) if not held_out(w)) for kind in _CONTENT_SLOTS.values()))


def make_sentence(rng: random.Random, split: str, lexicon: Lexicon, patterns: Sequence[str] = PATTERNS) -> str:
    """A sentence, capitalised and with its full stop, all of whose content pairs belong to the split.

    Args:
        rng: random number generator.
        split: train, dev or test.
        lexicon: the words to draw from.
        patterns: of sentences.
    """
    previous: str | None = None

    def fill(slot: re.Match[str]) -> str:
        nonlocal previous
        if slot[1] in _CLOSED_SLOTS:
            return rng.choice(_CLOSED_SLOTS[slot[1]])
        words: tuple[str, ...] = getattr(lexicon, _CONTENT_SLOTS[slot[1]])
        word = rng.choice(words)
        while previous is not None and (word == previous or pair_split(previous, word) != split):
            word = rng.choice(words)
        previous = word
        return word

    sentence = re.sub(_SLOT, fill, rng.choice(patterns))
    sentence = _BEFORE_VOWEL.sub("an ", sentence)
    return sentence[0].upper() + sentence[1:] + "."
