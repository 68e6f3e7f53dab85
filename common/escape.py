"""Escapes untrusted text for output: no control characters and no passwords reach a terminal or a log."""

import re

# All but tab and line feed; separators of lines and marks that turn the order of writing; halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"<>]*@")


def escaped(text: str, *, one_line: bool = False) -> str:
    """The text with control characters as `\\u001b`, which JSON reads back, and without user and password in addresses.

    Args:
        one_line: escape line feeds too, as `\\n`.
    """
    shown = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", _CREDENTIALS.sub(r"\1***@", text))
    return shown.replace("\n", "\\n") if one_line else shown
