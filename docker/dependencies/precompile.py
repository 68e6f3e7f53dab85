"""Compiles the modules that the stages import, and only those. A test compares the list with the sources' imports.

A container with a read-only root cannot keep bytecode: without this every pod compiles them at its start. All of
site-packages would be another quarter of a gigabyte.
"""

import importlib
import py_compile
import sys
from pathlib import Path

IMPORTED = (
    "accelerate",
    "av",
    "boto3",
    "botocore.session",
    "click.shell_completion",
    "hdbscan",
    "hera.workflows",
    "jinja2",
    "matplotlib.pyplot",
    "packaging.requirements",
    "peft",
    "prometheus_client.core",
    "pydantic.type_adapter",
    "rapidfuzz",
    "s3transfer.manager",
    "safetensors.torch",
    "scipy.sparse.csgraph",
    "sklearn.cluster",
    "sklearn.manifold",
    "sklearn.metrics",
    "soundfile",
    "soxr",
    "tokenizers",
    "torch.distributed.launcher.api",
    "torch.utils.data",
    "tqdm",
    "transformers.models.whisper.modeling_whisper",
    "umap",
    "whisper_normalizer.english",
    "yaml",
)


def main() -> None:
    """Imports, then compiles with hashes that are not checked: layers may change the files' times."""
    for name in IMPORTED:
        importlib.import_module(name)
    files = {getattr(module, "__file__", None) or __file__ for module in sys.modules.values()}
    for source in sorted(map(Path, files - {__file__})):
        if source.suffix == ".py" and source.is_file():
            py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


if __name__ == "__main__":
    main()
