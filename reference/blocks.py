"""Generated parts of pages that are otherwise written by hand: what stands between two marks."""

from collections.abc import Sequence


def fill(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with `lines` between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the page lacks the marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, opened, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"the page lacks the marks {begin.strip()} … {end}")
    body = "".join(f"{line}\n" for line in lines)
    return f"{before}{begin}{body}{end}{after}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; a bar in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines]
