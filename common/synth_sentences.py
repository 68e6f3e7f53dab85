"""Sentences for synthetic speech: an open vocabulary in committed patterns, with splits that share no phrase.

A small closed grammar would be learned by heart in one epoch. Here the content words come from a frequency list, and
every pair of neighbouring content words belongs to exactly one split (by its hash), so that no sentence and no phrase
of two or more content words of dev or test is ever heard in training, whatever the size of the corpus.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

from common.errors import DataError

# Shares of the pair space. Only disjointness needs them; how many sentences each split gets is the caller's choice.
_PAIR_SHARES = (("train", 0.7), ("dev", 0.85), ("test", 1.0))

# n noun, p plural noun, v past tense, a adjective, d adverb. At least three content words each.
PATTERNS = (
    "the {a} {n} {v} the {n}",
    "a {n} and a {a} {n} {v} here",
    "she {d} {v} the {a} {p}",
    "they {v} the {n} with {a} {p}",
    "the {p} {d} {v} every {n}",
    "he {v} a {n} near the {a} {n}",
    "we {v} the {n} before the {p} {v} it",
    "the {n} of the {n} {v} {d}",
    "my {a} {n} {v} some {p}",
    "you {d} {v} her {n} and his {p}",
    "the {n} {v} when the {a} {n} {v}",
    "{a} {p} {v} the {n} after the {n}",
    "no {n} ever {v} such {a} {p}",
    "it was a {a} {n} without {p} or a {n}",
    "the {p} in the {n} were {d} {a}",
    "their {n} {v} between the {p} and the {n}",
    "this {n} {v} because the {p} were {a}",
    "she {v} that the {n} was {d} {a}",
    "where the {a} {n} {v} the {p} {v}",
    "all {p} from the {n} {v} the {a} {n}",
)

_SLOT_KINDS = {"n": "nouns", "p": "plurals", "v": "verbs", "a": "adjectives", "d": "adverbs"}
_SLOT = re.compile(r"\{([npvad])\}")
FUNCTION_WORDS = frozenset(re.sub(_SLOT, " ", " ".join(PATTERNS)).split())

# Beginnings of words that do not belong into a corpus to be shown to anybody.
_UNWANTED = re.compile(
    "anal|arous|ass$|asses$|assault|bastard|bitch|bomb|breast|chink|cock|corpse|crap|cunt|damn|dick|drug|dyke|erect|erotic"
    "|execut|fag|fat$|fuck|gay|genocid|gun|hell$|hells$|homo|hooker|islam|jew|kill|lesbian|massacr|masturb|murder|muslim"
    "|nazi|negro|nigg|nud|orgasm|penis|piss|porn|prostitut|puss|queer|racis|racial|rap(e|es|ed|ist|ists)$|semen|sex|shit"
    "|shoot|slav|slut|sperm|suicid|terror|tit$|tits$|tortur|vagina|virgin|whore|cum$|cums$|abort|boob|nipple|molest"
)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Content words by what they can do in a sentence, most frequent first."""

    nouns: tuple[str, ...]
    plurals: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]


@cache
def build_lexicon(base_words: int = 9000, known_words: int = 20000) -> Lexicon:
    """Sort frequent English words into parts of speech by which inflected forms are frequent as well.

    A word with a past tense and a present participle is a verb; one with an adverb in -ly is an adjective; one with a
    plural and neither of these is a noun. What has no such forms, such as names and abbreviations, drops out.

    Args:
        base_words: how many of the most frequent words may be base forms.
        known_words: how many words count as existing when inflected forms are looked up.

    Raises:
        DataError: the package `wordfreq` is not installed.
    """
    try:
        from wordfreq import top_n_list, zipf_frequency
    except ImportError as error:
        raise DataError("the vocabulary needs the package wordfreq: `pip install moe-asr[demo]`") from error
    ranked = top_n_list("en", known_words)
    known, plain = set(ranked), _PlainWord()
    base = [word for word in ranked[:base_words] if plain(word)]
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
        # A name's plural is rare beside the name itself.
        and zipf_frequency(word, "en") - zipf_frequency(plural(word), "en") < 1.3
    ]
    return Lexicon(
        nouns=tuple(nouns),
        plurals=tuple(filter(plain, map(plural, nouns))),
        verbs=tuple(filter(plain, map(past, verbs))),
        adjectives=tuple(adjectives),
        adverbs=tuple(filter(plain, map(adverb, adjectives))),
    )


class _PlainWord:
    """Whether a word is a plain content word: of letters, inoffensive, and left alone by Whisper's normaliser."""

    def __init__(self) -> None:
        from whisper_normalizer.english import EnglishTextNormalizer

        self._normalise = EnglishTextNormalizer()

    def __call__(self, word: str) -> bool:
        plain = word.isascii() and word.isalpha() and 4 <= len(word) <= 11
        return plain and word not in FUNCTION_WORDS and not _UNWANTED.match(word) and self._normalise(word) == word


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


def content_pairs(sentence: str) -> list[tuple[str, str]]:
    """Neighbouring content words of a sentence, function words skipped."""
    words = [word for word in sentence.lower().rstrip(".").split() if word not in FUNCTION_WORDS]
    return list(zip(words, words[1:], strict=False))


def make_sentence(rng: random.Random, split: str, lexicon: Lexicon) -> str:
    """A sentence, capitalised and with its full stop, all of whose content pairs belong to the split.

    Args:
        rng: where chance comes from.
        split: train, dev or test.
        lexicon: the words to draw from.
    """
    pattern = rng.choice(PATTERNS)
    previous: str | None = None

    def fill(slot: re.Match[str]) -> str:
        nonlocal previous
        words: tuple[str, ...] = getattr(lexicon, _SLOT_KINDS[slot[1]])
        word = rng.choice(words)
        while previous is not None and (word == previous or pair_split(previous, word) != split):
            word = rng.choice(words)
        previous = word
        return word

    sentence = re.sub(_SLOT, fill, pattern)
    sentence = re.sub(r"\ba (?=[aeiou])", "an ", sentence)
    return sentence[0].upper() + sentence[1:] + "."
