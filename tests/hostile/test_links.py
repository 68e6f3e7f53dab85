"""Links, pipes and devices in a folder that others write to: nothing outside is deleted or written, nothing hangs."""

import os
import time

import pytest
from click.testing import CliRunner

from cli.main import cli
from common.data.sources import download_folder
from common.errors import StoreError
from common.files import NotFound
from common.storage import open_store
from common.storage.artifacts import inspect, new_attempt
from common.storage.garbage import garbage
from common.storage.store import remove_all
from tests.common.storage.test_artifacts import KEY, make

LONG_AGO = time.time() - 100 * 3600


@pytest.fixture
def home(tmp_path):
    """A folder of somebody with files that must stay, all of them old; also with names that our own have."""
    folder = tmp_path / "home"
    for name in (
        "a.txt",
        ".tmp-mine",
        "checkpoints/000000001-x/manifest.json",
        "parts/p",
        "manifest.json",
        "logs/run.log",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
        os.utime(folder / name, (LONG_AGO, LONG_AGO))
    yield folder
    assert {path.read_text() for path in folder.rglob("*") if path.is_file()} == {"precious"}
    assert sum(path.is_file() for path in folder.rglob("*")) == 6


@pytest.fixture
def store(tmp_path):
    """A store with a finished artifact, old."""
    store = open_store(tmp_path / "store")
    make(store, tmp_path)
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return store


PLACES = ("evil", "artifacts/evil", "artifacts/asr/evil", f"{KEY.prefix}evil", f"{KEY.prefix}checkpoints", "demo")


@pytest.mark.parametrize("place", PLACES)
def test_garbage_of_a_store_is_in_the_store(store, home, place):
    link = store.root / place
    link.symlink_to(home)
    os.utime(link, (LONG_AGO, LONG_AGO), follow_symlinks=False)
    done = CliRunner().invoke(cli, ["gc", "--delete", "--store", str(store.root)])
    assert done.exit_code == 0, done.output
    assert not list(garbage(store))
    assert link.is_symlink() == (not place.startswith(KEY.prefix))  # below a key, a link is garbage itself
    assert inspect(store, KEY, deep=True).status == "done"


@pytest.mark.parametrize("folder", ["checkpoints", "parts"])
@pytest.mark.parametrize("above", ["", "artifacts", "artifacts/asr"])
def test_what_a_finished_stage_clears_away_lies_in_the_store(tmp_path, home, folder, above):
    store = open_store(tmp_path / "store")
    link = store.root / (above or f"{KEY.prefix}{folder}")
    link.parent.mkdir(parents=True)
    link.symlink_to(home)
    remove_all(store, f"{KEY.prefix}{folder}/")
    remove_all(store, "")
    assert not link.is_symlink()


def test_checkpoints_behind_a_link_are_left_alone(tmp_path, home):
    from common.storage.checkpoint import Checkpointer

    store = open_store(tmp_path / "store")
    (store.root / "c").parent.mkdir(parents=True)
    (store.root / "c").symlink_to(home / "checkpoints")
    checkpointer = Checkpointer(store, "c/", scratch=tmp_path / "scratch")
    checkpointer.clear()
    with pytest.raises(StoreError, match="is a link"):
        checkpointer.save(1, {}, {}, wait=True)


def test_bringing_a_folder_exactly_deletes_no_file_behind_a_link(tmp_path, home):
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "link").symlink_to(home)
    (tmp_path / "into" / "stray").touch()
    (tmp_path / "store").mkdir()
    download_folder(open_store(tmp_path / "store"), tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


@pytest.mark.parametrize("place", ["artifacts", "artifacts/asr", KEY.prefix.rstrip("/")])
def test_nothing_is_written_through_a_link(tmp_path, home, place):
    store = open_store(tmp_path / "store")
    (store.root / place).parent.mkdir(parents=True, exist_ok=True)
    (store.root / place).symlink_to(home)
    acts = (
        lambda: store.write(f"{KEY.prefix}x", b"1"),
        lambda: store.put_if_absent(f"{KEY.prefix}new", b"1"),
        lambda: store.put(f"{KEY.prefix}x", home / "a.txt"),
        lambda: store.delete(f"{KEY.prefix}manifest.json"),
        lambda: store.move_aside(f"{KEY.prefix}manifest.json", f"{KEY.prefix}aside", b"precious"),
        lambda: new_attempt(store, KEY, tmp_path),
    )
    for act in acts:
        with pytest.raises(StoreError, match="is a link"):
            act()


def test_a_file_that_is_a_link_is_replaced_and_not_written_to(tmp_path, home):
    store = open_store(tmp_path / "store")
    store.write("demo/x", b"")
    (store.root / "demo" / "run.json").symlink_to(home / "a.txt")
    store.write("demo/run.json", b"ours")
    assert store.read("demo/run.json") == b"ours"


@pytest.mark.parametrize("place", ["micro", "micro/logs", "micro/logs/run.log"])
def test_the_log_of_a_run_goes_through_no_link(tmp_path, home, place, micro_model, tones):
    from stages.local_runner import run_pipeline
    from tests.stages.test_local_runner import micro_config

    link = tmp_path / "store" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(home / "logs/run.log" if place.endswith("log") else home)
    with pytest.raises(StoreError, match="is a link"):
        run_pipeline(micro_config(tmp_path / "store", micro_model, tones))


# What never ends


def test_pipes_and_devices_are_no_files(tmp_path):
    store = open_store(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    store.write("file", b"1")
    assert [entry.key for entry in store.list("")] == ["file"]
    for key in ("pipe", "zero", "self"):
        assert store.size(key) is None
        for act in (
            lambda key=key: store.read(key),
            lambda key=key: store.read_range(key, 0, 1),
            lambda key=key: store.get(key, tmp_path / "got"),
        ):
            with pytest.raises((NotFound, StoreError)):
                act()


def test_a_maze_of_links_comes_to_an_end(tmp_path, monkeypatch):
    """Each folder is reached by three links from the one before: 3**20 ways to the last."""
    monkeypatch.setattr("common.storage.local.MOST_LINKS", 50)
    for level in range(21):
        (tmp_path / f"d{level}").mkdir()
    for level in range(20):
        for name in "abc":
            (tmp_path / f"d{level}" / name).symlink_to(tmp_path / f"d{level + 1}")
    with pytest.raises(StoreError, match="more than 50 links"):
        list(open_store(tmp_path).list(""))
    assert list(open_store(tmp_path).list("", follow=False))  # as links


def test_two_folders_that_link_to_each_other_are_listed_once(tmp_path):
    store = open_store(tmp_path)
    for name, other in (("a", "b"), ("b", "a")):
        store.write(f"{name}/f", b"")
        (tmp_path / name / "to").symlink_to(tmp_path / other)
    assert [entry.key for entry in store.list("")] == ["a/f", "a/to/f", "b/f", "b/to/f"]
