"""What of the chart is made from other files: `make generate` writes it, a test compares it.

- `files/moe-asr.yaml`, `files/moe-asr-extend.yaml`: the workflow templates
- `values.schema.json`: the definitions of `config`, from the pipeline's own models, so that helm refuses its typos too
- `README.md`: the table of values, from the comments in values.yaml
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from argo import extend, workflow
from common.config import Config
from reference.blocks import fill, table

CHART = Path(__file__).parent / "moe-asr"
OWN = "config."  # prefix of the definitions that come from the models
PLACES = ("store", "endpoint_url")  # the chart has values for them
COMMENT = re.compile(r"^ *# -- (?P<text>.+)$")
KEY = re.compile(r"^(?P<indent> *)(?P<name>[A-Za-z0-9_-]+):")


@dataclass(frozen=True, slots=True)
class Value:
    """One documented value: its path with dots, its default, and what it is."""

    path: str
    default: Any
    text: str


def generated() -> dict[Path, str]:
    """Path → text of every generated file."""
    return {
        CHART / "files" / "moe-asr.yaml": workflow.to_text(),
        CHART / "files" / "moe-asr-extend.yaml": extend.to_text(),
        CHART / "values.schema.json": schema_text((CHART / "values.schema.json").read_text(encoding="utf-8")),
        CHART / "README.md": readme_text((CHART / "README.md").read_text(encoding="utf-8")),
    }


def documented_values(text: str) -> Iterator[Value]:
    """The values of a values file that have a comment `# -- …` above them, in their order."""
    tree = yaml.safe_load(text)
    parents: list[tuple[int, str]] = []
    comment = ""
    for line in text.splitlines():
        if match := COMMENT.match(line):
            comment = match["text"]
        elif match := KEY.match(line):
            depth = len(match["indent"])
            parents = [parent for parent in parents if parent[0] < depth] + [(depth, match["name"])]
            if comment:
                names = [name for _, name in parents]
                yield Value(".".join(names), _at(tree, names), comment)
            comment = ""


def _at(tree: Any, names: list[str]) -> Any:
    for name in names:
        tree = tree[name]
    return tree


def readme_text(text: str) -> str:
    """The README with its table of values made anew."""
    values = documented_values((CHART / "values.yaml").read_text(encoding="utf-8"))
    rows = [(f"`{v.path}`", f"`{json.dumps(v.default, ensure_ascii=False)}`", v.text) for v in values]
    return fill(text, "values", table(("value", "default", "what it is"), rows))


def schema_text(text: str) -> str:
    """The schema with the definitions of `config` made anew from the pipeline's models."""
    schema = json.loads(text)
    made = json.loads(json.dumps(Config.model_json_schema()).replace("#/$defs/", f"#/$defs/{OWN}"))
    definitions = {name: d for name, d in schema["$defs"].items() if not name.startswith(OWN)}
    definitions |= {f"{OWN}{name}": _plain(d) for name, d in sorted(made.pop("$defs").items())}
    made["properties"] = {name: p for name, p in made["properties"].items() if name not in PLACES}
    schema["$defs"] = definitions
    schema["properties"]["config"] = _plain(made)
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _plain(schema: Any) -> Any:
    """Without titles and defaults: helm applies none, and they would be a second place that says them."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    properties = schema.get("properties", {})
    kept = {name: _plain(part) for name, part in schema.items() if name not in ("title", "default", "properties")}
    return kept | ({"properties": {name: _plain(part) for name, part in properties.items()}} if properties else {})
