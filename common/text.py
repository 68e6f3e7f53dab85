"""Normalisation of texts for comparison: Whisper's normaliser, languages without spaces, hallucination loops."""

import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

# Written without spaces between words: each character counts as a word, as in Whisper's paper.
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})
# A loop is a phrase of at most this many words, this often in a row.
LOOP_WORDS, LOOP_REPEATS = 12, 4
# Or, within one word, at most this many characters, this often in a row.
LOOP_CHARS, LOOP_CHAR_REPEATS = 8, 8
MAX_CHARACTERS_PER_SECOND = 40  # twice the rate of a fast speaker

# What people and programs type for an apostrophe: curly quotes, accents, primes, modifier letters, full-width.
APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u2032\u00b4\u0060\u02bb\u02bc\uff07\u055a\ua78c"), "'")
QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\uff02"), '"')
WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5B) if chr(code).isalnum()}  # letters and digits alone
LIGATURES = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)}
# Soft hyphen, zero-width space, marks of direction, word joiner, byte order mark. U+200C and U+200D are spelling.
INVISIBLE = dict.fromkeys(
    (0xAD, 0x200B, 0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF)
)
# Letters that look or mean the same in one language, by language code.
_TURKISH = {ord("I"): "\u0131", ord("\u0130"): "i"}
_PERSIAN = {ord("\u064a"): "\u06cc", ord("\u0649"): "\u06cc", ord("\u0643"): "\u06a9", 0x200C: " "}
LETTERS: dict[str, Mapping[int, str]] = {
    "tr": _TURKISH,
    "az": _TURKISH,
    "ro": {ord(old): new for old, new in zip("\u015e\u015f\u0162\u0163", "\u0218\u0219\u021a\u021b", strict=True)},
    "fa": _PERSIAN,
    "ur": _PERSIAN,
}
ODD_FORMS: dict[str, Mapping[int, object]] = {
    "curly or other apostrophes": APOSTROPHES,
    "curly quotes": QUOTES,
    "full-width letters or digits": WIDE,
    "ligatures": LIGATURES,
    "invisible characters": INVISIBLE,
}
_ELLIPSIS = re.compile(r"\u2026|\.{2,}")
_INVISIBLE = re.compile("[" + "".join(map(chr, INVISIBLE)) + "]")
_POINTS = re.compile("[\u0640\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]")  # Arabic, Hebrew


def normalise(text: str, language: str = "en", *, published: bool = False) -> str:
    """A text normalised for comparison: by `unify`, then by Whisper's English or basic normaliser.

    In scripts that write vowels as marks (Hindi, Thai, …), the marks are kept, which the published normaliser treats as
    punctuation.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C.

    Args:
        text: reference or hypothesis.
        language: code of the language, such as "en"; a region after it ("en-GB", "en_us") is ignored.
        published: Whisper's normaliser alone, as in published figures.
    """
    return _normalise(text, _base(language), published)


def unify(text: str, language: str = "en") -> str:
    """A text in which characters with several written forms and the same pronunciation have one form.

    NFKC (full-width letters, ligatures, composed accents), straight apostrophes, ASCII digits; no invisible characters,
    no ellipses, no points of Arabic and Hebrew vowels; the casing of Turkish and Azerbaijani; cedillas of Romanian;
    Arabic letters in Persian and Urdu.

    Args:
        language: code of the language, with or without a region.
    """
    if text.isascii() and "`" not in text and _base(language) not in LETTERS:
        return _ELLIPSIS.sub(" ", text)
    return _unify(text, _base(language))


def _unify(text: str, language: str) -> str:
    text = unicodedata.normalize("NFC", text).translate(LETTERS.get(language, {}))
    text = _POINTS.sub("", unicodedata.normalize("NFKC", _ELLIPSIS.sub(" ", text.translate(APOSTROPHES))))
    text = text.translate(APOSTROPHES).replace("\u0130", "I").replace("i\u0307", "i")
    return "".join(map(_plain, text))


@lru_cache(maxsize=1 << 12)
def _plain(character: str) -> str:
    """A digit of any script as an ASCII digit; nothing for an invisible character."""
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return "" if category in ("Cf", "Cc") and not character.isspace() else character


def mend(text: str) -> str:
    """A training text in the form that Whisper writes, without changes that affect the pronunciation.

    Composed (NFC), straight apostrophes and quotes, full-width letters and digits as ASCII, ligatures apart, plain
    spaces, no invisible characters except the joiners that some scripts need. Punctuation of other scripts is kept.
    """
    text = unicodedata.normalize("NFC", text).translate(APOSTROPHES | QUOTES | WIDE | LIGATURES)
    return " ".join(_INVISIBLE.sub("", text).split())


def odd_forms(text: str) -> list[str]:
    """Names of the changes that `mend` would make in a text, except spaces at its ends and between words."""
    if text.isascii() and "`" not in text:
        return []
    return [name for name, table in ODD_FORMS.items() if not set(map(ord, text)).isdisjoint(table)] + (
        [] if unicodedata.is_normalized("NFC", text) else ["decomposed accents"]
    )


def lone_surrogate(text: str) -> str:
    """The code of the first half of a surrogate pair in a text, as four hex digits; empty without one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{ord(text[error.start]):04x}"
    return ""


def printable(text: str) -> str:
    """A text that can be written as UTF-8: other parts (as of a Latin-1 file name) are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def unspaced(language: str) -> bool:
    """Whether a language is written without spaces between words."""
    return _base(language) in UNSPACED_LANGUAGES


def _base(language: str) -> str:
    """A language's code without the region after it: "en" of "en-GB" and "en_us"."""
    return language.replace("_", "-").split("-")[0].lower()


@lru_cache(maxsize=1 << 16)  # references come again with every evaluation
def _normalise(text: str, language: str, published: bool) -> str:
    plain = text if published else unify(text, language)
    return _normaliser(language, published)(plain).strip()


@lru_cache(maxsize=8)
def _normaliser(language: str, published: bool) -> Callable[[str], str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an escape in the package's docstrings, when it is compiled
        warnings.simplefilter("ignore", DeprecationWarning)  # the same in Python 3.11
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    english: Callable[[str], str] = EnglishTextNormalizer()
    basic: Callable[[str], str] = BasicTextNormalizer(
        split_letters=language in UNSPACED_LANGUAGES, preserve_marks=not published
    )
    return english if language == "en" else basic


def is_hallucination_loop(hypothesis: str, reference: str) -> bool:
    """Whether a hypothesis repeats a phrase in a row far more often than the reference, and so inserts words.

    True if some phrase of up to 12 words occurs at least 4 times in a row (or, within a word, up to 8 characters at
    least 8 times), at least twice as often as in the reference, and the hypothesis is the longer text.

    Args:
        hypothesis, reference: as `normalise` gives them.
    """
    if len(hypothesis) <= len(reference):
        return False
    said, meant = hypothesis.split(), reference.split()
    if len(said) > len(meant):
        repeats = _most_repeats(said, LOOP_WORDS)
        if repeats >= max(LOOP_REPEATS, 2 * _most_repeats(meant, LOOP_WORDS)):
            return True
    long_words = [word for word in said if len(word) >= 2 * LOOP_CHAR_REPEATS and word not in meant]
    return any(_most_repeats(word, LOOP_CHARS) >= LOOP_CHAR_REPEATS for word in long_words)


def _most_repeats(items: Sequence[str], longest: int) -> int:
    """The maximum number of times that a phrase of up to `longest` items occurs in a row."""
    most = min(len(items), 1)
    for period in range(1, min(longest, len(items) // 2) + 1):
        run = best = 0
        for earlier, later in zip(items, items[period:], strict=False):
            run = run + 1 if earlier == later else 0
            best = max(best, run)
        most = max(most, best // period + 1)
    return most
