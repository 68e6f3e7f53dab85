"""Programs and schemas that judge the chart: helm, Kubernetes' own Pod Security checks, and the schemas of all kinds.

They are built or read from Go modules once and kept in the user's cache. A string instead of a path is the reason why
something cannot be had.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from tests.golang import CACHE, cached, go, installed

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "moe-asr"

HELM = "v3.22.0"
KUBERNETES = "v1.33.13"
ARGO = "v4.0.2"
OPERATOR = "v0.85.0"

# Where each module keeps the definitions that are read from it.
CORE = (f"k8s.io/kubernetes@{KUBERNETES}", "api/openapi-spec/swagger.json")
CRDS = (
    (f"github.com/argoproj/argo-workflows/v4@{ARGO}", "manifests/base/crds/full/argoproj.io_{kind}s.yaml"),
    (
        f"github.com/prometheus-operator/prometheus-operator@{OPERATOR}",
        "example/prometheus-operator-crd/monitoring.coreos.com_{kind}s.yaml",
    ),
)
KINDS = (("workflowtemplate", "cronworkflow"), ("podmonitor", "prometheusrule"))


@functools.cache
def helm_program() -> Path | str:
    """helm, built by `go install` (minutes, once)."""

    flags = f"-s -w -X helm.sh/helm/v3/internal/version.version={HELM}"
    return installed(f"helm-{HELM}", f"helm.sh/helm/v3/cmd/helm@{HELM}", "-trimpath", "-ldflags", flags)


@functools.cache
def pod_security_program() -> Path | str:
    """The program of tests/helm/podsecurity."""
    sources = Path(__file__).parent / "podsecurity"
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.iterdir()))).hexdigest()[:12]

    def make(path: Path) -> str:
        done = go(["build", "-trimpath", "-ldflags", "-s -w", "-o", path, "."], sources)
        return done.stderr if done.returncode else ""

    return cached(f"podsecurity-{digest}", make)


@functools.cache
def schemas_file() -> Path | str:
    """JSON Schemas of Kubernetes' kinds and of the custom ones, made from the modules of their projects."""

    def make(path: Path) -> str:
        try:
            core = json.loads(_module_file(*CORE))
            schemas = {"definitions": core_definitions(core["definitions"]), "kinds": core_kinds(core["definitions"])}
            for (module, file), kinds in zip(CRDS, KINDS, strict=True):
                for kind in kinds:
                    definition = yaml.load(_module_file(module, file.format(kind=kind)), yaml.CSafeLoader)
                    name, schema = custom_schema(definition)
                    schemas["kinds"][name] = name.replace("/", ".")
                    schemas["definitions"][name.replace("/", ".")] = schema
        except OSError as error:
            return str(error)
        path.write_text(json.dumps(schemas), encoding="utf-8")
        return ""

    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return cached(f"schemas-{source}.json", make)


def _module_file(module: str, file: str) -> str:
    done = go(["mod", "download", "-json", module], CACHE)
    if done.returncode:
        raise OSError(f"{module}: {done.stdout or done.stderr}")
    return (Path(json.loads(done.stdout)["Dir"]) / file).read_text(encoding="utf-8")


# Kubernetes writes some types more narrowly than it reads them.
LOOSE = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["integer", "string"]},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["number", "string"]},
}


def core_definitions(definitions: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes' definitions, which name all properties there are."""
    return {name: LOOSE.get(name) or strict(definition) for name, definition in definitions.items()}


def core_kinds(definitions: dict[str, Any]) -> dict[str, str]:
    """`apiVersion/kind` → name of its definition."""
    return {
        "/".join(filter(None, (kind["group"], kind["version"], kind["kind"]))): name
        for name, definition in definitions.items()
        for kind in definition.get("x-kubernetes-group-version-kind", [])
        if not name.startswith("io.k8s.apimachinery")
    }


def custom_schema(definition: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(`apiVersion/kind`, schema) of a CustomResourceDefinition; its metadata are those of any object."""
    spec = definition["spec"]
    version = next(version for version in spec["versions"] if version["storage"])
    schema = strict(version["schema"]["openAPIV3Schema"])
    meta = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
    schema["properties"]["metadata"] = {"$ref": f"#/definitions/{meta}"}
    return f"{spec['group']}/{version['name']}/{spec['names']['kind']}", schema


def strict(schema: Any) -> Any:
    """A schema that refuses properties which it does not name, and takes what the API server takes."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key not in ("description", "properties")}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    elif schema.get("nullable"):
        made["type"] = [schema["type"], "null"]
    return made
