"""Finding what a run starts from."""

from common.data.sources import locate_model
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
