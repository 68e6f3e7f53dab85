"""What `doctor` finds out about a machine."""

import os

import pytest

from common.pipeline import machine_checks
from common.pipeline.machine_checks import check_machine


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return {check.name: check for check in check_machine(tmp_path_factory.mktemp("cache") / "not" / "there" / "yet")}


def test_a_machine_that_runs_the_tests_has_nothing_that_stops_a_run(checks):
    assert [check for check in checks.values() if check.state == "fail"] == []


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3"])
def test_formats_are_decoded_without_any_program_of_the_system(monkeypatch, form):
    monkeypatch.setenv("PATH", "")
    assert machine_checks._decoding(form, None).state == "ok"


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    assert machine_checks._disk(tmp_path / "a" / "b").state in ("ok", "note")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_stops_runs(tmp_path):
    tmp_path.chmod(0o500)
    assert machine_checks._disk(tmp_path / "cache").state == "fail"


def test_little_disk_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks, "LOW_DISK", 2**62)
    check = machine_checks._disk(tmp_path)
    assert (check.state, "MOE_ASR_CACHE" in check.detail) == ("fail", True)


def test_a_package_out_of_range_stops_runs_and_is_named(monkeypatch):
    monkeypatch.setattr(
        machine_checks, "requires", lambda name: ["click>=999", "no-such-package-anywhere", 'av; extra == "x"']
    )
    check = machine_checks._packages()
    assert check.state == "fail"
    assert "click" in check.detail and ">=999" in check.detail and "no-such-package-anywhere is missing" in check.detail
    assert "av" not in check.detail.split()


def test_no_compiler_is_a_note_since_only_one_option_needs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = machine_checks._compiler()
    assert (check.state, "asr.compile" in check.detail) == ("note", True)
