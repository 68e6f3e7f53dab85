"""Makes the copied sources importable and gives them their command, as an installer would.

No build backend is needed for that: it would be a dependency outside the lock.
"""

import sys
import sysconfig
import tomllib
from pathlib import Path

USER = "moe-asr:x:65532:65532::/scratch:/usr/sbin/nologin\n"
COMMAND = "#!{python}\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"


def main(sources: Path) -> None:
    """Writes path file, metadata, commands and the user's entry; makes /scratch."""
    project = tomllib.loads((sources / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = Path(sysconfig.get_path("purelib"))
    name = project["name"].replace("-", "_")
    (packages / f"{name}.pth").write_text(f"{sources}\n", encoding="utf-8")
    metadata = packages / f"{name}-{project['version']}.dist-info"
    metadata.mkdir()
    fields = {"Metadata-Version": "2.4", "Name": project["name"], "Version": project["version"]}
    fields |= {"Summary": project["description"], "License-Expression": project["license"]}
    text = "".join(f"{field}: {value}\n" for field, value in fields.items())
    (metadata / "METADATA").write_text(text, encoding="utf-8")
    for command, target in project["scripts"].items():
        module, function = target.split(":")
        file = Path(sysconfig.get_path("scripts")) / command
        file.write_text(COMMAND.format(python=sys.executable, module=module, function=function), encoding="utf-8")
        file.chmod(0o755)
    with Path("/etc/passwd").open("a", encoding="utf-8") as file:
        file.write(USER)
    scratch = Path("/scratch")
    scratch.mkdir()
    scratch.chmod(0o1777)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
