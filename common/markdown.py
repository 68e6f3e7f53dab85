"""Escapes text from a corpus, a configuration or a record, so that Markdown shows it as plain text.

`Markdown` marks text that is already Markdown; `escape` treats all other values as plain text.
"""

import re
import shlex
import unicodedata

# Those that begin emphasis, code, links, mentions, HTML, entities, formulas and cells in CommonMark, GFM or on the hub.
_ACTIVE = re.compile(r"[\\`*_\[\]<>|~@&$!#]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_UNSEEN = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0xFEFF)))  # bidi controls


class Markdown(str):
    """Trusted Markdown, which is not escaped."""

    __slots__ = ()


def escape(value: object) -> Markdown:
    """A value as Markdown that shows its text on one line; `Markdown` values are returned unchanged."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_ACTIVE.sub(r"\\\g<0>", one_line(str(value))))


def code(text: str) -> Markdown:
    """Any text as a code span."""
    text = one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text else ""
    return Markdown(f"{fence}{space}{text}{space}{fence}" if text.strip() else "(empty)")


def shell_word(text: str) -> Markdown:
    """Text as one word of a command line, for a fenced block."""
    return Markdown(shlex.quote(one_line(text)))


def one_line(text: str) -> str:
    """The text on one line: white space as single spaces, control characters and direction marks as �."""
    return "".join("�" if _is_control(c) else c for c in " ".join(text.split()))


def _is_control(character: str) -> bool:
    return character in _UNSEEN or unicodedata.category(character) in ("Cc", "Cs")
