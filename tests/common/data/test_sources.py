"""Finding what a run starts from."""

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from common.data.sources import is_hub_name, locate_model
from common.errors import DataError
from common.storage import open_store


def test_weights_that_were_replaced_in_a_bucket_leave_nothing_of_the_old_ones(s3_server, bucket, micro_model, tmp_path):
    url, place = f"s3://{bucket}/model", {"endpoint_url": s3_server.endpoint}
    store = open_store(url, **place)
    store.put_folder(micro_model, "")
    assert (locate_model(url, tmp_path, **place) / "model.safetensors").is_file()
    store.delete("model.safetensors")
    store.write("model-00001-of-00001.safetensors", b"other")
    names = {path.name for path in locate_model(url, tmp_path, **place).iterdir()}
    assert names == {path.name for path in micro_model.iterdir()} - {"model.safetensors"} | {
        "model-00001-of-00001.safetensors"
    }


@pytest.mark.parametrize("name", ["../x", "a--b/c", "-x/y", "a/b.git", "a/.b", "a./b", "a/b\n", "a/" + 97 * "b"])
def test_what_the_hub_would_not_take_is_no_hub_name(name, tmp_path):
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    with pytest.raises(DataError, match="is neither a folder nor a hub name"):
        locate_model(name, tmp_path)


@pytest.mark.parametrize("name", ["openai/whisper-tiny.en", "a/b", "_a/b_", "a-b/c.git.d", "a" * 96 + "/" + "b" * 96])
def test_a_hub_name_is_one_that_the_hub_takes(name):
    validate_repo_id(name)
    assert is_hub_name(name)
