"""extend: an expert for a new speaker or group, added to an unchanged model.

It is not a stage of a run: `moe-asr extend` makes it for a finished model. It is executed like a stage, with a key,
checkpoints, and a manifest that names the model's artifact.
"""

from common.pipeline.contract import Contract

CONTRACT = Contract(
    name="extend",
    summary="an expert for a new speaker or group, beside a model that stays as it is",
    output="added",
    inputs=("parent",),
    sources=("corpus",),
    format=7,  # auto compares other methods
    gpus=1,
)
