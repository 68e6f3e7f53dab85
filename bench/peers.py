"""The alternatives of the measurements, each with the settings that its documentation recommends for speed.

All run on SDPA attention, in the precision and with the batch of ours. Their spectrograms are made beforehand and not
timed (ours are made in the step), except where making them is what is measured.

Shape letters: B utterances, M mel bands, F mel frames, T encoder positions, U text tokens, E experts.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)

from bench.setting import TARGETS, Setting
from common.data.batches import Batch, Example
from common.data.tokens import IGNORED
from common.model.adapters import expert_matrices
from common.model.gate import Gate
from common.model.recogniser import Recogniser
from common.model.routing import route

# Options of Seq2SeqTrainer with which it does nothing but train: no evaluation, no saving, no logging.
TRAINING_ONLY: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "remove_unused_columns": False,
    "label_names": ["labels"],
}


def features_of(batch: Batch, device: torch.device) -> Tensor:
    """Hugging Face's spectrograms of a batch's audio, padded to 30 s: features_BMF."""
    clips = [
        audio_S[: 320 * int(valid)].cpu().numpy() for audio_S, valid in zip(batch.audio_BS, batch.valid_B, strict=True)
    ]
    extractor = WhisperFeatureExtractor()
    features: Tensor = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    return features.to(device)


# ---- joint training by PEFT ----


def peft_experts(whisper: WhisperForConditionalGeneration, experts: int, rank: int) -> PeftModel:
    """A base model with adapters named 0, 1, …: `get_peft_model`, then `add_adapter`."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    model = get_peft_model(whisper, config, adapter_name="0")
    for expert in range(1, experts):
        model.add_adapter(str(expert), config)
    for name, parameter in model.named_parameters():  # `set_adapter` switches all others off, the optimiser wants all
        parameter.requires_grad_(".lora_" in name)
    return model


def copy_into_peft(recogniser: Recogniser, model: PeftModel, experts: int) -> None:
    """Gives PEFT's adapters the weights of our experts."""
    for expert in range(experts):
        named = {
            f"base_model.model.{layer}.lora_{letter}.{expert}.weight": matrix
            for layer, matrices in expert_matrices(recogniser.whisper, expert).items()
            for letter, matrix in zip("AB", matrices, strict=True)
        }
        unknown = model.load_state_dict(named, strict=False).unexpected_keys
        assert not unknown, unknown


def loop_backward(
    model: PeftModel, gate: Gate, features_BMF: Tensor, batch: Batch, top_k: int, *, all_rows: bool
) -> Tensor:
    """One pass per expert with `set_adapter`, losses weighted by the gate's probabilities; leaves gradients.

    Args:
        all_rows: each expert on the whole batch, as in the original system's first version; otherwise each on the
            utterances that the gate gives to it, as in its second.

    Returns:
        The loss per token.
    """
    with torch.no_grad(), model.disable_adapter():  # the gate's input: a pass of the frozen encoder
        hidden_BTD = model.get_base_model().model.encoder(features_BMF).last_hidden_state
    routing = route(gate(hidden_BTD.float().mean(1)), top_k)
    weights_BE = torch.zeros(len(batch), gate.num_experts, device=features_BMF.device)
    weights_BE = weights_BE.scatter(1, routing.topk_ids_BK, routing.topk_weights_BK)
    leaf_BE = weights_BE.detach().requires_grad_()  # the gate's gradient is gathered here and sent back once
    total = torch.zeros((), device=features_BMF.device)
    for expert in range(gate.num_experts):
        rows_N = torch.arange(len(batch)) if all_rows else (routing.topk_ids_BK == expert).any(1).nonzero()[:, 0].cpu()
        if len(rows_N):
            model.set_adapter(str(expert))
            loss_N = utterance_losses(model, features_BMF[rows_N], batch.inputs_BU[rows_N], batch.labels_BU[rows_N])
            loss = (loss_N * leaf_BE[rows_N, expert]).sum() / batch.weight
            torch.autograd.backward(loss)
            total += loss.detach()
    torch.autograd.backward(weights_BE, leaf_BE.grad)
    return total


def utterance_losses(model: Any, features_BMF: Tensor, inputs_BU: Tensor, labels_BU: Tensor) -> Tensor:
    """Summed cross-entropy of each utterance, by the model's own forward: loss_B."""
    logits_BUV = model(input_features=features_BMF, decoder_input_ids=inputs_BU, use_cache=False).logits
    logits_NV = logits_BUV.float().reshape(labels_BU.numel(), -1)
    loss_N = F.cross_entropy(logits_NV, labels_BU.reshape(-1), reduction="none", ignore_index=IGNORED)
    return loss_N.reshape(labels_BU.shape).sum(1)


def lora_backward(model: PeftModel, features_BMF: Tensor, batch: Batch) -> Tensor:
    """One plain LoRA adapter: no gate, no routing. Leaves gradients, returns the loss per token."""
    loss_B = utterance_losses(model, features_BMF, batch.inputs_BU, batch.labels_BU)
    loss = loss_B.sum() / batch.weight
    torch.autograd.backward(loss)
    return loss.detach()


# ---- dense fine-tuning by Seq2SeqTrainer ----


def trainer_dataset(examples: Sequence[Example], mel_bands: int) -> list[dict[str, Any]]:
    """Its usual recipe maps audio to `input_features` and `labels` before training; here even into memory.

    Args:
        mel_bands: M of the model: 80, or 128 for large-v3.
    """
    extractor = WhisperFeatureExtractor(feature_size=mel_bands)
    rows = []
    for example in examples:
        features = extractor(example.read(), sampling_rate=16_000).input_features[0]
        rows.append({"input_features": features, "decoder_input_ids": example.inputs, "labels": example.labels})
    return rows


def collate_padded(rows: Sequence[Mapping[str, Any]], *, end: int) -> dict[str, Tensor]:
    """Its usual collator: stacks features of 30 s, pads labels with -100."""
    longest = max(len(row["labels"]) for row in rows)
    labels_BU = torch.full((len(rows), longest), IGNORED)
    inputs_BU = torch.full((len(rows), longest), end)
    for i, row in enumerate(rows):
        labels_BU[i, : len(row["labels"])] = torch.tensor(row["labels"])
        inputs_BU[i, : len(row["labels"])] = torch.tensor(row["decoder_input_ids"])
    features_BMF = torch.from_numpy(np.stack([row["input_features"] for row in rows]))
    return {"input_features": features_BMF, "decoder_input_ids": inputs_BU, "labels": labels_BU}


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes when each of the trainer's steps ended."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The trainer's hook."""
        self.setting.synchronize()
        self.times.append(time.perf_counter())


def make_trainer(
    model: Any, rows: Sequence[Mapping[str, Any]], setting: Setting, folder: Path
) -> tuple[Seq2SeqTrainer, StepClock]:
    """A trainer for one epoch, with nothing but training in it."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=setting.dense_batch,
        num_train_epochs=1,
        learning_rate=1e-5,
        warmup_steps=0,
        optim="adamw_torch_fused",
        bf16=setting.precision == "bf16",
        tf32=True if setting.on_gpu else None,
        gradient_checkpointing=False,
        predict_with_generate=False,
        disable_tqdm=True,
        dataloader_num_workers=setting.workers,
        dataloader_pin_memory=setting.on_gpu,
        use_cpu=not setting.on_gpu,
        **TRAINING_ONLY,
    )
    end = int(model.config.eos_token_id)
    clock = StepClock(setting)
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=lambda batch: collate_padded(batch, end=end),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)  # it prints among our lines
    return trainer, clock


# ---- encoding and decoding by transformers ----


def embed_padded(
    model: WhisperForConditionalGeneration, examples: Sequence[Example], setting: Setting
) -> npt.NDArray[np.float32]:
    """Feature extractor, encoder at 30 s, mean over all positions, batch by batch: embeddings_ND.

    Args:
        model: in `setting.dtype`.
    """
    extractor = WhisperFeatureExtractor()
    means = []
    for start in range(0, len(examples), setting.encode_batch):
        clips = [example.read() for example in examples[start : start + setting.encode_batch]]
        features = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            hidden_BTD = model.model.encoder(features.to(setting.device, setting.dtype)).last_hidden_state
        means.append(hidden_BTD.float().mean(1).cpu().numpy())
    return np.concatenate(means)


def make_pipeline(
    model: WhisperForConditionalGeneration, tokenizer: Any, setting: Setting
) -> Callable[[Sequence[Any], Mapping[str, Any]], list[str]]:
    """(clips, generation options) → texts, by the `automatic-speech-recognition` pipeline in batches."""
    recognise = pipeline(
        "automatic-speech-recognition",
        model=copy.deepcopy(model).to(setting.dtype),
        tokenizer=tokenizer,
        feature_extractor=WhisperFeatureExtractor(),
        device=setting.device,
        batch_size=setting.encode_batch,
    )

    def run(clips: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
        inputs = [{"raw": clip, "sampling_rate": 16_000} for clip in clips]
        return [str(out["text"]).strip() for out in recognise(inputs, generate_kwargs=dict(options))]

    return run
