"""Opens a PEFT adapter that another program made: its settings are checked, and PEFT merges it into the base."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import WhisperForConditionalGeneration

from common.errors import DataError
from common.json_files import read_object
from common.model.adapters import CONFIG as ADAPTER
from common.model.adapters import check_patterns, read_adapter
from common.model.mixture import untie
from common.tensors import check_weights

PEFT_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3")  # matrices that become part of the base's weights
MAX_SETTING = 16_384  # of a number in adapter_config.json: a rank above Whisper's widest layer only takes memory
TIED = ("proj_out", "embed_tokens")  # layers that share one weight


def adapter_settings(folder: Path) -> Mapping[str, Any]:
    """The settings in adapter_config.json.

    Raises:
        DataError: the file cannot be read, describes an unsupported kind of adapter, or would make PEFT import a
            module.
    """
    settings = read_object(folder / ADAPTER, "save the adapter with PEFT again")
    if (kind := settings.get("peft_type")) not in PEFT_TYPES:
        raise DataError(f"{folder / ADAPTER}: peft_type {kind!r} is not one of {', '.join(PEFT_TYPES)}")
    if settings.get("megatron_config"):
        raise DataError(f"{folder / ADAPTER}: megatron_config is not supported")
    patterns = [settings.get(name) for name in ("rank_pattern", "alpha_pattern")]
    for values in (settings, *(pattern for pattern in patterns if isinstance(pattern, dict))):
        for name, value in values.items():
            if isinstance(value, int | float) and not -MAX_SETTING <= value <= MAX_SETTING:
                raise DataError(f"{folder / ADAPTER}: {name} {value} is not valid")
    check_patterns(settings, folder / ADAPTER)
    return settings


def with_adapter(whisper: WhisperForConditionalGeneration, folder: Path) -> WhisperForConditionalGeneration:
    """The dense model of a base and a PEFT adapter, merged by PEFT."""
    from peft import PeftModel, get_peft_model_state_dict

    wanted = set(read_adapter(folder))  # also refuses what PEFT would take a pickle for
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*missing adapter keys.*")  # an error below, with a name
            # What it says of tied and of embedding layers is done right below.
            warnings.filterwarnings("ignore", message=".*(save_embedding_layers|tie_word_embeddings).*")
            model = PeftModel.from_pretrained(whisper, str(folder))
            known = set(get_peft_model_state_dict(model))
    except Exception as error:  # PEFT raises errors of many types for an adapter_config.json that makes no sense
        raise DataError(f"adapter {folder} does not fit its base: {' '.join(str(error).split())[:300]}") from None
    if odd := sorted(wanted ^ known):
        raise DataError(f"adapter {folder} does not fit its base: {odd[0]} is in one of them only")
    if any(part in name.split(".") for name in wanted for part in TIED):
        untie(whisper, list(whisper.modules()))
    merged = model.merge_and_unload()
    assert isinstance(merged, WhisperForConditionalGeneration)
    check_weights(merged.state_dict(), f"base with adapter {folder}")
    return merged
