"""A reply of an S3 server that is cut off at any byte is never taken for an answer: the right one comes, by a retry."""

import shutil

import pytest

from common.data.sources import download_folder
from common.errors import StoreError
from common.files import NotFound
from common.storage import open_store
from common.storage.artifacts import inspect
from tests.common.storage.test_artifacts import KEY, keys, make

BODY = b"0123456789"
# What a reply of this server has beside the fields that the store reads: without it the test is shorter.
HIDDEN = frozenset(
    ("date", "server", "accept-ranges", "content-type", "x-amz-request-id", "x-amz-id-2", "last-modified", "vary")
)


@pytest.fixture
def store(bucket, proxy, impatient, monkeypatch, tmp_path):
    """A store behind the proxy with a file in it; parts of a large file are tiny."""
    monkeypatch.setattr("common.storage.s3.STREAM_PAUSES", (0,) * 4)
    monkeypatch.setattr("common.storage.s3_parts.PART_BYTES", 4)
    monkeypatch.setattr("common.storage.s3_parts.MOST_PARTS", 1)
    proxy.hidden = HIDDEN
    store = open_store(f"s3://{bucket}/p", endpoint_url=proxy.endpoint)
    for key in ("a", "f/a"):
        store.write(key, BODY)
    (tmp_path / "small").write_bytes(BODY[:8])
    (tmp_path / "large").write_bytes(BODY)
    return store


def absent(ask):
    """Whether a question finds nothing."""
    with pytest.raises(NotFound):
        ask()
    return True


def fetched(store, folder):
    store.get("a", folder / "got")
    return (folder / "got").read_bytes()


def put_once(store):
    store.delete("new")
    return store.put_if_absent("new", BODY), store.read("new")


def taken(store):
    return store.put_if_absent("a", b"other"), store.read("a")


def moved(store):
    store.write("m", BODY)
    return store.move_aside("m", "m.aside", BODY) or absent(lambda: store.read("m")), store.read("m.aside")


def put(store, path):
    store.put("put", path)
    return store.read("put")


def brought(store, folder):
    shutil.rmtree(folder / "folder", ignore_errors=True)
    download_folder(store, folder / "folder")
    return (folder / "folder" / "f" / "a").read_bytes()


def stored(store, folder):
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / "f").write_bytes(BODY[:8])
    store.put_folder(folder / "in", "folder/")
    return store.read("folder/f")


def written(store):
    store.write("w", BODY)
    return store.read("w")


def deleted(store):
    store.write("d", BODY)
    store.delete("d")
    return store.size("d")


# name → (which of its requests, by method and a part of the path, is cut; what it does)
OPERATIONS = {
    "read": ("GET", "/p/a", lambda store, folder: store.read("a")),
    "read a range": ("GET", "/p/a", lambda store, folder: store.read_range("a", 2, 5)),
    "read what is absent": ("GET", "/p/no", lambda store, folder: absent(lambda: store.read("no"))),
    "size": ("HEAD", "/p/a", lambda store, folder: store.size("a")),
    "size of what is absent": ("HEAD", "/p/no", lambda store, folder: store.size("no")),
    "get, and in parts": ("GET", "/p/a", fetched),
    "list": ("GET", "list-type", lambda store, folder: [entry.key for entry in store.list("")]),
    "list nothing": ("GET", "list-type", lambda store, folder: list(store.list("none/"))),
    "leftovers": ("GET", "uploads", lambda store, folder: list(store.leftovers())),
    "write": ("PUT", "/p/w", lambda store, folder: written(store)),
    "put": ("PUT", "/p/put", lambda store, folder: put(store, folder / "small")),
    "begin an upload": ("POST", "uploads", lambda store, folder: put(store, folder / "large")),
    "put a part": ("PUT", "partNumber", lambda store, folder: put(store, folder / "large")),
    "complete an upload": ("POST", "uploadId", lambda store, folder: put(store, folder / "large")),
    "put if absent": ("PUT", "/p/new", lambda store, folder: put_once(store)),
    "put what is taken": ("PUT", "/p/a", lambda store, folder: taken(store)),
    "move aside: look": ("GET", "/p/m", lambda store, folder: moved(store)),
    "move aside: copy": ("PUT", "/p/m.aside", lambda store, folder: moved(store)),
    "move aside: delete": ("DELETE", "/p/m", lambda store, folder: moved(store)),
    "delete": ("DELETE", "/p/d", lambda store, folder: deleted(store)),
    "get a folder": ("GET", "/p/f/a", brought),
    "put a folder": ("PUT", "folder/f", stored),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_reply_that_is_cut_at_any_byte_is_asked_for_again(store, proxy, tmp_path, tally, name):
    method, path, act = OPERATIONS[name]
    proxy.hidden = HIDDEN - ({"last-modified"} if "folder" in name else set())
    right = act(store, tmp_path)
    cut = proxy.break_next("cut", 10**9, method=method, path=path)  # cuts nothing, but shows which reply it would be
    assert act(store, tmp_path) == right
    step = 1 if method in ("GET", "HEAD") else 5  # of a write's reply, the body is read for errors alone
    places = [*range(cut.head), *range(cut.head, cut.length, step)]
    lost: list[tuple[int, object]] = []
    for at in places:
        fault = proxy.break_next("cut", at, method=method, path=path)
        try:
            outcome = act(store, tmp_path)
        except Exception as error:
            outcome = error
        if outcome != right:
            lost.append((at, outcome))
        proxy.faults.remove(fault)
    assert lost == []
    tally(len(places))


def test_a_listing_that_is_cut_makes_no_finished_artifact_again(bucket, proxy, impatient, monkeypatch, tmp_path, tally):
    monkeypatch.setattr("common.storage.s3.STREAM_PAUSES", (0,) * 4)
    store = open_store(f"s3://{bucket}", endpoint_url=proxy.endpoint)
    make(store, tmp_path / "scratch")
    before = keys(store)
    cuts = range(0, 300, 10)
    for at in cuts:
        proxy.break_next("cut", at, method="GET", path="list-type", times=2)
        assert inspect(store, KEY).status == "done"
    assert keys(store) == before
    tally(len(cuts))


@pytest.mark.parametrize("page", [b"", b"<html>sign in</html>", b"<ListBucketResult></ListBucketResult>"])
def test_a_page_of_something_else_is_no_empty_listing(store, proxy, page):
    proxy.instead = page
    with pytest.raises(StoreError, match="does not answer like an S3 server"):
        list(store.list(""))


def test_a_listing_without_an_end_is_refused(store, monkeypatch):
    page = {"IsTruncated": True, "NextContinuationToken": "again", "ResponseMetadata": {}}
    monkeypatch.setattr(store._client, "list_objects_v2", lambda **_: page)
    with pytest.raises(StoreError, match="does not come to an end"):
        list(store.list(""))
