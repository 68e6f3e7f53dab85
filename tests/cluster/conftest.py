"""The cluster, its images, a micro corpus and a micro model in its S3 server: once for all cluster tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from argo.parameters import Installation
from common import __version__
from common.storage import open_store
from tests.cluster import image
from tests.cluster.lab import (
    BUCKET,
    NAMESPACE,
    STAGES,
    TOOL,
    Lab,
    NoClusterError,
    command,
    install_template,
    kubectl,
    running_cluster,
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory, micro_model, tones) -> Iterator[Lab]:
    """Everything installed; brought down at the end if it was brought up here."""
    with running_cluster():
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        upload(endpoint, micro_model, tones)
        make_secret()
        registry, tag = images(tmp_path_factory.mktemp("image"))
        template = install_template(Installation(registry, tag))
        wrong = install_template(Installation(registry, tag, store_secret="wrong-store"), "-wrong-store")
        yield Lab(endpoint, registry, tag, template, wrong, tmp_path_factory.mktemp("kept"))


def upload(endpoint: str, model: Path, corpus: Path) -> None:
    """Corpus and model go into an emptied bucket."""
    from common.storage.s3 import make_client

    client = make_client(endpoint)
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    store = open_store(f"s3://{BUCKET}", endpoint_url=endpoint)
    for entry in list(store.list("")):
        store.delete(entry.key)
    for name, folder in (("corpus", corpus), ("model", model)):
        open_store(f"s3://{BUCKET}/{name}", endpoint_url=endpoint).put_folder(folder, "")


def make_secret() -> None:
    """The store's credentials, as a user would create them."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    entries = [f"--from-literal={name}={os.environ[name]}" for name in names if name in os.environ]
    for secret, values in (("moe-asr-store", entries), ("wrong-store", [e + "x" for e in entries])):
        made = kubectl("create", "secret", "generic", secret, *values, "--dry-run=client", "-o", "yaml")
        kubectl("apply", "-n", NAMESPACE, "-f", "-", text=made)


def images(folder: Path) -> tuple[str, str]:
    """Registry and tag of the stages' images.

    Those that $MOE_ASR_TEST_REGISTRY and $MOE_ASR_TEST_TAG name; or one stand-in for all of them, made of this
    environment.
    """
    if registry := os.environ.get("MOE_ASR_TEST_REGISTRY"):
        return registry, os.environ.get("MOE_ASR_TEST_TAG", __version__)
    if not Path(TOOL).is_file():
        raise NoClusterError("no images for this cluster: set MOE_ASR_TEST_REGISTRY and MOE_ASR_TEST_TAG")
    made = folder / "image.tar"
    image.main(str(made), *(f"moe-asr.local/{stage}:test" for stage in STAGES))
    command(TOOL, "load-image", made, timeout=1800)
    made.unlink()
    return "moe-asr.local", "test"
