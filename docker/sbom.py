"""Writes a CycloneDX bill of materials for an image: its Python distributions and its Debian packages.

python docker/sbom.py --engine podman --output dist/sbom moe-asr/base:0.1.0 moe-asr/asr:0.1.0
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

# Runs inside the image, whose own Python knows best what it would import.
INVENTORY = """
import json, subprocess
from importlib.metadata import distributions
query = ["dpkg-query", "-W", "-f", "${db:Status-Status}\\t${Package}\\t${Version}\\t${Architecture}\\n"]
rows = [line.split("\\t") for line in subprocess.check_output(query, text=True).splitlines()]
python = [[d.name, d.version, d.metadata.get("License-Expression") or ""] for d in distributions()]
print(json.dumps({"python": python, "debian": [row[1:] for row in rows if row[0] == "installed"]}))
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("docker", "podman", "buildah"), default="docker")
    parser.add_argument("--output", type=Path, default=Path("dist/sbom"), help="folder for <name>.cdx.json")
    parser.add_argument("images", nargs="+")
    arguments = parser.parse_args()
    write(arguments.engine, arguments.images, arguments.output)


def write(engine: str, images: Sequence[str], folder: Path) -> None:
    """Writes <folder>/<name>.cdx.json for each image."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        path = folder / f"{image.rpartition('/')[2].partition(':')[0]}.cdx.json"
        path.write_text(bill_of_materials(image, inventory(engine, image)), encoding="utf-8")
        print(path)


def inventory(engine: str, image: str) -> dict[str, list[list[str]]]:
    """What is installed in an image: `python` rows of name, version, licence; `debian` rows of name, version, arch."""
    if engine == "buildah":
        container = _output("buildah", "from", image)
        try:
            text = _output("buildah", "run", "--isolation", "chroot", container, "--", "python", "-c", INVENTORY)
        finally:
            _output("buildah", "rm", container)
    else:
        isolated = ["--rm", "--network", "none", "--read-only", "--cap-drop", "all"]
        text = _output(engine, "run", *isolated, "--entrypoint", "python", image, "-c", INVENTORY)
    found: dict[str, list[list[str]]] = json.loads(text)
    return found


def bill_of_materials(image: str, found: dict[str, list[list[str]]]) -> str:
    """CycloneDX 1.6 as JSON."""
    repository, _, tag = image.rpartition(":")
    bom = Bom()
    bom.metadata.component = Component(type=ComponentType.CONTAINER, name=repository, version=tag, bom_ref=image)
    components = [python_component(*row) for row in found["python"]] + [
        debian_component(*row) for row in found["debian"]
    ]
    bom.components.update(components)
    bom.register_dependency(bom.metadata.component, components)
    return str(JsonV1Dot6(bom).output_as_string(indent=1)) + "\n"


def python_component(name: str, version: str, licence: str) -> Component:
    """A distribution from a Python package index."""
    url = PackageURL("pypi", name=name.lower().replace("_", "-"), version=version)
    return _component(name, version, url, {"moe-asr:license-expression": licence} if licence else {})


def debian_component(name: str, version: str, architecture: str) -> Component:
    """A package of Debian."""
    url = PackageURL("deb", namespace="debian", name=name, version=version, qualifiers={"arch": architecture})
    return _component(name, version, url, {})


def _component(name: str, version: str, url: PackageURL, properties: dict[str, str]) -> Component:
    extra: Any = [Property(name=key, value=value) for key, value in properties.items()]
    return Component(
        type=ComponentType.LIBRARY, name=name, version=version, purl=url, bom_ref=str(url), properties=extra
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
