"""The README.md of exported folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.markdown import escape, one_line, shell_word

CHOICE = """
## Which expert for which utterance

`gate/` holds the gate: a small MLP over the pooled embedding of the base encoder, with no adapter on
(layer {layer}, {pooling} over the utterance's own frames). Its outputs are `{first}` … `{last}`, in the
order of `routing.json`. The model was trained with `mixture: {mixture}`, top {top_k}.
"""

BLEND = """
One adapter per utterance (the gate's first choice) is not what was trained: each layer added the {top_k} best
adapters, weighted by the gate. PEFT makes that sum exactly, for the utterances that share a routing:

```python
model.add_weighted_adapter(["{first}", "{last}"], [0.7, 0.3], "blend", combination_type="cat")
model.set_adapter("blend")
```

`moe-asr transcribe` and `moe-asr evaluate` do all of this by themselves.
"""

PEFT = """# LoRA adapters of {base}

Made by `moe-asr export --to peft`. Load them with PEFT, from this folder:

```python
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

base = WhisperForConditionalGeneration.from_pretrained({base_text})
model = PeftModel.from_pretrained(base, "{first}", adapter_name="{first}")
{more}model.set_adapter("{first}")
```

The experts heard audio of `context: {context}` with a margin of {margin} encoder positions; 30 s of padded audio
is something else to them, and is worth a measurement before it is used.
"""

VLLM = """# LoRA adapters of {base} for vLLM

Made by `moe-asr export --to vllm`, whose developers have not run them on vLLM. It serves LoRA adapters of Whisper since
version 0.18 (vllm-project/vllm#29856); from this folder:

```sh
vllm serve {base_word} --enable-lora --max-loras {count} --max-lora-rank {max_rank} \\
  --lora-modules {modules}
```

A request names its adapter as its model:

```sh
curl -s localhost:8000/v1/audio/transcriptions -F model={first} -F language={language} -F file=@speech.wav
```

Before you rely on it:

- One adapter per request: the gate's first choice. `routing.json` maps the gate's outputs to the adapters' names.
- vLLM pads audio to 30 s; these adapters heard `context: {context}`. Measure.
{encoder}"""

ENCODER = """- These adapters change the encoder too. We found no documentation that vLLM applies LoRA to Whisper's
  encoder: compare its texts with those of `moe-asr transcribe`, or train with `lora.modules: decoder`.
"""


def peft_page(table: Mapping[str, Any]) -> str:
    """README.md of `--to peft`; `table` is routing.json."""
    names = table["adapters"]
    more = "".join(f'model.load_adapter("{name}", adapter_name="{name}")\n' for name in names[1:])
    return PEFT.format(**_words(table), more=more) + _choice(table)


def vllm_page(table: Mapping[str, Any], max_rank: int) -> str:
    """README.md of `--to vllm`.

    Args:
        max_rank: the lowest --max-lora-rank that holds the adapters.
    """
    names = table["adapters"]
    page = VLLM.format(
        **_words(table),
        count=len(names),
        max_rank=max_rank,
        modules=" ".join(f"{name}={name}" for name in names),
        encoder=ENCODER if table["encoder_adapted"] else "",
    )
    return page + _choice(table)


def _choice(table: Mapping[str, Any]) -> str:
    if len(table["adapters"]) < 2:
        return ""
    page = CHOICE + (BLEND if table["top_k"] > 1 else "")
    return page.format(**_words(table), mixture=table["mixture"], top_k=table["top_k"], **table["embedding"])


def _words(table: Mapping[str, Any]) -> dict[str, Any]:
    names = table["adapters"]
    return {
        "base": escape(table["base"]),
        "base_text": json.dumps(one_line(table["base"]), ensure_ascii=False),
        "base_word": shell_word(table["base"]),
        "first": names[0],
        "last": names[-1],
        "language": shell_word(table["language"]),
        **table["audio"],
    }
