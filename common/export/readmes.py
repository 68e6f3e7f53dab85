"""README.md files of exported folders."""

import json
from collections.abc import Mapping
from typing import Any

from common.data.features import BUCKETS, MAX_POSITIONS
from common.markdown import escape, one_line, shell_word
from common.model.audio_context import EDGE, STAND_INS

WHOSE_ONE = "The texts are those of the run's own score (greedy, in fp32)."
WHOSE_MANY = (
    "The texts are those of the adapter that is set; the run's own score chose experts for each utterance (below)."
)
MAX_NEW_TOKENS = 224  # of a text, as decoding has it by default

CHOICE = """
## Which expert for which utterance
"""

TABLE = """
Each adapter belongs to one value of the corpus's column `{column}`: `groups` in `routing.json` names them in the order
of `adapters`.
"""

UNKNOWN = """
Where the group is not known, the gate chooses.
"""

GATE = """
`gate/` holds the gate: a small MLP over the pooled embedding of the base encoder, with no adapter on
(layer {layer}, {pooling} over the utterance's own frames). Its outputs are `{first}` … `{last}`, in the
order of `routing.json`. The model was trained with `mixture: {mixture}`, top {top_k}.
"""

SHARED = """
An utterance that belongs to no group uses no routed expert: it gets the adapter `{shared}`, the shared expert alone
(load it like the others).
"""

ADDED = """
## Added experts

{names}: one adapter for each speaker or group that was added after training, with the shared expert in it. Who gets
which is in `routing.json`, under `added`.
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

## From audio to text

The adapters were trained and scored with `context: {context}`{margin_text}.
{whose}
{code}"""

OWN_WINDOW = """
```python
import soundfile
import soxr
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor

whisper = model.get_base_model().eval()
tokenizer = AutoTokenizer.from_pretrained({base_text})
extract = WhisperFeatureExtractor(feature_size=whisper.config.num_mel_bins)


@torch.inference_mode()
def transcribe(path):  # a recording of up to 30 s
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = soxr.resample(samples.mean(1), rate, 16_000)
    mel = extract(samples, sampling_rate=16_000, return_tensors="pt").input_features
    ids = whisper.generate(mel, {generate}max_new_tokens={max_new_tokens}, num_beams=1, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip()


print(transcribe("speech.wav"))
```
"""

SHORT_CONTEXT = """
The encoder runs at the length of the recording and its margin here too, and {stand_ins} positions stand for the silence
up to 30 s. At 30 s, as in most tools, the adapters give the same texts but for a few words.

```python
import math

import soundfile
import soxr
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, WhisperFeatureExtractor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

whisper = model.get_base_model().eval()
encoder = whisper.get_encoder()
embeddings = encoder.embed_positions.weight.detach().clone()
tokenizer = AutoTokenizer.from_pretrained({base_text})
extract = WhisperFeatureExtractor(feature_size=whisper.config.num_mel_bins)
LENGTHS = {lengths}  # encoder positions of 20 ms
WINDOW, STAND_INS = {window}, {stand_ins}


def attend(module, query, key, value, mask, **options):  # a stand-in counts as often as it has positions
    keys = key.shape[2]
    if not module.is_causal and keys < WINDOW:
        mask = query.new_zeros(1, 1, 1, keys)
        mask[..., -STAND_INS:] = math.log((WINDOW - keys + STAND_INS) / STAND_INS)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def add_stand_ins(module, inputs, output):  # silence, as at the end of the recording
    missing = encoder.embed_positions.num_embeddings - output.shape[2]
    return torch.cat([output, output[..., -{edge}:{after_edge}].expand(-1, -1, missing)], 2)


AttentionInterface.register("short_context", attend)
AttentionMaskInterface.register("short_context", sdpa_mask)
whisper.set_attn_implementation("short_context")
encoder.conv2.register_forward_hook(add_stand_ins)


@torch.inference_mode()
def transcribe(path):  # a recording of up to 30 s
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = soxr.resample(samples.mean(1), rate, 16_000)
    wanted = -(-len(samples) // 320) + {margin}
    length = next((n for n in LENGTHS if n >= wanted), WINDOW)
    count = min(STAND_INS, WINDOW - length)
    chosen = [*range(length), *(length + (2 * i + 1) * (WINDOW - length) // (2 * count) for i in range(count))]
    whisper.config.max_source_positions = encoder.config.max_source_positions = length
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(embeddings[chosen])
    mel = extract(samples, sampling_rate=16_000, max_length=320 * length, return_tensors="pt").input_features
    ids = whisper.generate(mel, {generate}max_new_tokens={max_new_tokens}, num_beams=1, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip()


print(transcribe("speech.wav"))
```
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
- vLLM pads audio to 30 s; these adapters were trained with `context: {context}`. Measure.
{encoder}"""

ENCODER = """- These adapters change the encoder too. We found no documentation that vLLM applies LoRA to Whisper's
  encoder: compare its texts with those of `moe-asr transcribe`, or train with `lora.modules: decoder`.
"""


def served(table: Mapping[str, Any]) -> list[str]:
    """Names of all adapters that a request may use: those of the gate's outputs, then added experts."""
    return list(dict.fromkeys([*table["adapters"], *table["added"]]))


def peft_page(table: Mapping[str, Any]) -> str:
    """README.md of `--to peft`; `table` is routing.json."""
    names = served(table)
    more = "".join(f'model.load_adapter("{name}", adapter_name="{name}")\n' for name in names[1:])
    return PEFT.format(**_words(table), **_audio_words(table), more=more) + _choice(table)


def vllm_page(table: Mapping[str, Any], max_rank: int) -> str:
    """README.md of `--to vllm`.

    Args:
        max_rank: the lowest --max-lora-rank that is sufficient for the adapters.
    """
    names = served(table)
    page = VLLM.format(
        **_words(table),
        count=len(names),
        max_rank=max_rank,
        modules=" ".join(f"{name}={name}" for name in names),
        encoder=ENCODER if table["encoder_adapted"] else "",
    )
    return page + _choice(table)


def _choice(table: Mapping[str, Any]) -> str:
    added = ADDED.format(names=", ".join(table["added"])) if table["added"] else ""
    return added + _gate_choice(table)


def _gate_choice(table: Mapping[str, Any]) -> str:
    if len(table["adapters"]) < 2:
        return ""
    gate, by_table = table["gate"], bool(table["groups"])
    parts = {
        CHOICE: True,
        TABLE: by_table,
        UNKNOWN: by_table and gate,
        GATE: gate,
        SHARED: table["shared"],
        BLEND: gate and table["top_k"] > 1,
    }
    values = {name: table[name] for name in ("shared", "mixture", "top_k", "column")}
    page = "".join(text for text, needed in parts.items() if needed)
    return page.format(**_words(table), **values, **table["embedding"])


def _audio_words(table: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the README's part from audio to text."""
    dynamic = table["audio"]["context"] == "dynamic"
    wanted = f"language={json.dumps(table['language'])}, task={json.dumps(table['task'])}, "
    values = {
        "base_text": _quoted(table["base"]),
        "lengths": BUCKETS,
        "window": MAX_POSITIONS,
        "stand_ins": STAND_INS,
        "edge": EDGE,
        "after_edge": 1 - EDGE,
        "margin": table["audio"]["margin"],
        "generate": wanted if table["multilingual"] else "",
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return {
        "margin_text": f" and a margin of {table['audio']['margin']} encoder positions" if dynamic else "",
        "whose": WHOSE_ONE if len(table["adapters"]) == 1 else WHOSE_MANY,
        "code": (SHORT_CONTEXT if dynamic else OWN_WINDOW).format(**values),
    }


def _quoted(base: str) -> str:
    return json.dumps(one_line(base), ensure_ascii=False)


def _words(table: Mapping[str, Any]) -> dict[str, Any]:
    names = table["adapters"]
    return {
        "base": escape(table["base"]),
        "base_text": _quoted(table["base"]),
        "base_word": shell_word(table["base"]),
        "first": names[0],
        "last": names[-1],
        "language": shell_word(table["language"]),
        **table["audio"],
    }
