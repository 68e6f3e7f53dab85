"""Records of runs: what is said where a run lacks a stage."""

import pytest

from common.errors import DataError
from common.pipeline.runs import stage_folders
from common.storage import open_store
from tests.factories import run_record


@pytest.mark.parametrize(
    ("status", "message"),
    [("done", "has no stage asr: its configuration needs cluster, exp"), ("running", "asr yet: `moe-asr run`")],
)
def test_a_finished_run_without_a_stage_is_not_to_be_continued(tmp_path, status, message):
    with pytest.raises(DataError, match=message):
        stage_folders(open_store(tmp_path), run_record(status=status), "asr", tmp_path)
