"""What each option of training does to a step: with it (ours) against without it, all else equal.

A ratio below 1 is a cost: gradient checkpointing costs time and saves memory, augmentation costs time and improves the
weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from bench.inputs import make_batch, short_lengths
from bench.joint import make_contest, ours_backward, whole_step
from bench.measure import TRAINS_SHORT, Measurement, rounds, row
from bench.setting import Setting
from common.data.augment import Augmentation
from common.data.batches import Batch
from common.model.recogniser import Recogniser
from common.training.batch_search import peak_memory

Step = Callable[[], object]


def rows(setting: Setting) -> list[Measurement]:
    """A row for each option that this device has."""
    recogniser = make_contest(setting).blend
    lengths = short_lengths(setting.batch)
    short, padded = (make_batch(setting.model, lengths, setting.device, context=c) for c in ("dynamic", "30s"))
    note = setting.words(
        f"{setting.model}, joint step of {setting.batch} × 3–12 s, {short.audio_BS.shape[1] // 320} positions"
    )

    def pair(option: str, with_it: Step, without: Step, note: str = note) -> Measurement:
        taken = rounds({"with": with_it, "without": without}, setting)
        return row(option, taken["with"], taken["without"], unit="s/step", target=None, note=note)

    def step(changed: Recogniser, batch: Batch = short) -> Step:
        return whole_step(partial(ours_backward, changed, batch), [changed], setting)

    plain = step(recogniser)
    checkpointed = changed(recogniser, gradient_checkpointing=True)
    measurements = [
        pair("audio_context: dynamic, against 30s", plain, step(recogniser, padded)) | TRAINS_SHORT,
        pair("gradient_checkpointing: time", step(checkpointed), plain),
        memory_row(step(checkpointed, padded), step(recogniser, padded), setting),
        pair("augment: speed and SpecAugment", step(augmented(recogniser)), plain),
        *precision_rows(pair, recogniser, short, setting),
    ]
    if setting.name != "quick":  # the compiler takes longer than all other rows at micro sizes
        measurements.append(pair("compile: true", step(compiled(recogniser)), plain))
    return measurements


def changed(
    recogniser: Recogniser, *, gradient_checkpointing: bool = False, augmentation: Augmentation | None = None
) -> Recogniser:
    """The same weights and gate with other options."""
    return Recogniser(
        recogniser.whisper,
        slot=recogniser.slot,
        gate=recogniser.gate,
        embeddings_ND=recogniser.embeddings_ND,
        options=recogniser.options,
        gradient_checkpointing=gradient_checkpointing,
        augmentation=augmentation,
    ).train()


def augmented(recogniser: Recogniser) -> Recogniser:
    """With every augmentation on every batch."""
    return changed(recogniser, augmentation=Augmentation(speeds=(0.9, 1.0, 1.1), time_masks=2, mel_masks=2))


def compiled(recogniser: Recogniser) -> Recogniser:
    """A copy with compiled blocks."""
    if recogniser.slot is not None:
        recogniser.slot.routing = None  # of the last step, whose graph cannot be copied
    other = copy.deepcopy(recogniser)
    other.compile_blocks()
    return other


def memory_row(with_it: Step, without: Step, setting: Setting) -> Measurement:
    """Peak memory of a step at 30 s."""
    without()  # what the first step alone allocates
    figures = [peak_memory(run, setting.device) / 2**30 for run in (with_it, without)]
    note = setting.words(f"{setting.model}, joint step of {setting.batch} × 30 s, peak of the process")
    return row("gradient_checkpointing: memory", *figures, unit="GiB", target=None, note=note)


def precision_rows(
    pair: Callable[..., Measurement], recogniser: Recogniser, batch: Batch, setting: Setting
) -> list[Measurement]:
    """bf16 and, on a GPU, fp16 and TF32, each against full fp32."""

    fp32 = replace(setting, precision="fp32")  # so that the step itself adds no autocast

    def step(precision: Callable[[], AbstractContextManager[object]]) -> Step:
        def backward() -> None:
            with precision():
                ours_backward(recogniser, batch)

        return whole_step(backward, [recogniser], fp32)

    kinds: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "bf16": partial(torch.autocast, setting.device.type, torch.bfloat16)
    }
    if setting.on_gpu:
        kinds |= {"fp16": partial(torch.autocast, "cuda", torch.float16), "TF32": tf32}
    full = step(nullcontext)
    return [pair(f"precision: {name}, against fp32", step(kind), full) for name, kind in kinds.items()]


@contextmanager
def tf32() -> Iterator[None]:
    """Products of fp32 numbers with ten bits of mantissa."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
