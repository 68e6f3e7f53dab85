"""A hook of MkDocs: pages that lie outside of docs/, and links to files that the site does not hold."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"helm/moe-asr/README.md": "reference/chart-values.md"}  # file of the project → page of the site
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from elsewhere."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ go to such a page, or become the text alone."""
    here = ROOT / "docs" / Path(page.file.src_uri).parent

    def mended(link: re.Match[str]) -> str:
        target = (here / link["target"]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        path = target.relative_to(ROOT).as_posix()
        up = "../" * page.file.src_uri.count("/")
        return f"[{link['text']}]({up}{PAGES[path]})" if path in PAGES else link["text"]

    return LINK.sub(mended, markdown)
