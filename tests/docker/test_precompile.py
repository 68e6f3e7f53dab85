"""The list of modules that the images compile beforehand is complete."""

import json
import subprocess
import sys

from tests.docker.test_dockerfiles import ROOT

# Imports the list, then runs every import in the sources of a package that is in the images: none may load more.
CODE = """
import ast, importlib, json, pathlib, re, runpy, sys
from importlib.metadata import packages_distributions

locked = set(re.findall(r"^([\\w.-]+)==", pathlib.Path("docker/requirements.txt").read_text(), re.MULTILINE))
packages = {
    package
    for package, names in packages_distributions().items()
    if locked & {re.sub(r"[-_.]+", "-", name).lower() for name in names}
}
wanted = set()
for file in (file for folder in ("common", "stages", "argo", "cli") for file in pathlib.Path(folder).rglob("*.py")):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if all(module.split(".")[0] in packages for module in modules):
                wanted.add(ast.unparse(node))
for module in runpy.run_path("docker/dependencies/precompile.py")["IMPORTED"]:
    importlib.import_module(module)
missing = {}
for statement in sorted(wanted):
    before = set(sys.modules)
    exec(statement)
    if new := sorted(set(sys.modules) - before):
        missing[statement] = new
print(json.dumps([len(wanted), missing]))
"""


def test_modules_that_the_stages_import_are_compiled_into_the_images():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statements, missing = json.loads(done.stdout.splitlines()[-1])
    assert statements > 50
    assert missing == {}
