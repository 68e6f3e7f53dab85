"""Rows of joint training: the blend and the batched losses against loops over PEFT adapters, and against one LoRA.

Shape letters: B utterances, M mel bands, F mel frames, N table rows, D embedding width.
"""

import copy
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from bench.inputs import make_batch, short_lengths
from bench.measure import TRAINS_SHORT, Measurement, rounds, row
from bench.peers import copy_into_peft, features_of, loop_backward, lora_backward, peft_experts
from bench.setting import TARGETS, Setting, make_whisper
from common.data.batches import Batch
from common.model.gate import Gate
from common.model.mixture import add_mixture
from common.model.recogniser import Recogniser, RouterOptions

SHORT_BATCHES = 3  # of different lengths, as the sampler's buckets give them
SHARED_RANK, ROUTED_RANK = 48, 8  # of the default mixture
SMALL_RATIOS = 15  # rounds for ratios that differ by a few percent


@dataclass(frozen=True, slots=True)
class Contest:
    """One batch of 30 s and the same base model, gate and experts in each of the ways to train them.

    Attributes:
        blend, loss: ours; they share all weights.
        peft: one adapter per expert.
        lora: one adapter.
        features_BMF: the batch's spectrograms for the peers.
    """

    blend: Recogniser
    loss: Recogniser
    peft: PeftModel
    lora: PeftModel
    gate: Gate
    batch: Batch
    features_BMF: Tensor


def make_contest(setting: Setting) -> Contest:
    """Builds them; the peers' experts equal ours."""
    batch = make_batch(setting.model, [30.0] * setting.batch, setting.device)
    whisper = make_whisper(setting.model, setting.device)
    rank, experts = setting.rank, setting.experts
    slot = add_mixture(whisper, targets=TARGETS, num_experts=experts, rank=rank, alpha=2 * rank)
    with torch.no_grad(), setting.autocast():
        embeddings_ND = Recogniser(whisper, slot=slot).frozen_embedding(batch, layer=-1, pooling="mean")
    torch.manual_seed(1)
    gate = Gate(embeddings_ND.shape[1], 64, experts).to(setting.device)
    gate.fit_scale(embeddings_ND)
    ours = {
        mixture: Recogniser(
            whisper, slot=slot, gate=gate, embeddings_ND=embeddings_ND, options=RouterOptions(mixture, setting.top_k)
        ).train()
        for mixture in ("blend", "loss")
    }
    peft = peft_experts(make_whisper(setting.model, setting.device), experts, rank)
    copy_into_peft(ours["blend"], peft, experts)
    lora = peft_experts(make_whisper(setting.model, setting.device), 1, rank)
    return Contest(
        blend=ours["blend"],
        loss=ours["loss"],
        peft=peft.train(),
        lora=lora.train(),
        gate=copy.deepcopy(gate),
        batch=batch,
        features_BMF=features_of(batch, setting.device),
    )


def ours_backward(recogniser: Recogniser, batch: Batch) -> Tensor:
    """Our forward and backward as `common.training.train` does them; returns the loss per token."""
    summed, _ = recogniser(batch)
    loss: Tensor = summed / batch.weight
    torch.autograd.backward(loss)
    return loss.detach()


def whole_step(backward: Callable[[], object], modules: Iterable[nn.Module], setting: Setting) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, the same for all."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        with setting.autocast():
            backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows(setting: Setting) -> list[Measurement]:
    """Five rows on audio of 30 s and of 3–12 s."""
    contest = make_contest(setting)
    steps = make_steps(contest, setting)
    taken = rounds(steps, setting, cold=() if setting.on_gpu else ("before", "after"))
    used = len(set(route_of(contest, setting)))
    size = f"{setting.model}, {setting.batch} × 30 s, {used} of {setting.experts} experts in use, rank {setting.rank}"
    note = setting.words(size, "forward, backward, clipping, AdamW")
    target = setting.target
    joint = f"joint step, {setting.experts} experts, top-{setting.top_k}, 30 s: blend against"

    def result(name: str, ours: str, peer: str, target: float | None) -> Measurement:
        return row(name, taken[ours], taken[peer], unit="s/step", target=target, note=note)

    return [
        result(f"{joint} each expert on the whole batch", "blend", "before", target(6, 7)),
        result(f"{joint} loop over PEFT adapters and gate pass", "blend", "after", target(2, 2.5)),
        result("mixture: loss: one batch of B·k rows against the loop", "loss", "after", target(1.3, 1.3)),
        result("cost of routing: blend against one plain PEFT LoRA", "blend", "lora", target(1 / 1.25, 1 / 1.1)),
    ]


def route_of(contest: Contest, setting: Setting) -> list[int]:
    """The experts that the batch uses."""
    logits_BE = contest.blend.gate_logits(contest.batch.row_B)
    assert logits_BE is not None
    return [int(e) for e in logits_BE.topk(setting.top_k, 1).indices.reshape(-1)]


def make_steps(contest: Contest, setting: Setting) -> dict[str, Callable[[], None]]:
    """One whole step of each."""
    c, top_k = contest, setting.top_k
    peft = (c.peft, c.gate)

    loop = partial(loop_backward, c.peft, c.gate, c.features_BMF, c.batch, top_k)
    return {
        "blend": whole_step(partial(ours_backward, c.blend, c.batch), [c.blend], setting),
        "before": whole_step(partial(loop, all_rows=True), peft, setting),
        "after": whole_step(partial(loop, all_rows=False), peft, setting),
        "loss": whole_step(partial(ours_backward, c.loss, c.batch), [c.loss], setting),
        "lora": whole_step(partial(lora_backward, c.lora, c.features_BMF, c.batch), [c.lora], setting),
    }


def short_rows(setting: Setting) -> list[Measurement]:
    """The blend at the batch's own length against the loop at 30 s, on utterances of 3–12 s."""
    contest = make_contest(setting)
    lengths = sorted(short_lengths(SHORT_BATCHES * setting.batch))
    parts = [lengths[i : i + setting.batch] for i in range(0, len(lengths), setting.batch)]
    ours = [make_batch(setting.model, part, setting.device, context="dynamic") for part in parts]
    padded = [make_batch(setting.model, part, setting.device) for part in parts]
    features = [features_of(batch, setting.device) for batch in padded]
    cold = () if setting.on_gpu else ("loop",)
    c, top_k = contest, setting.top_k
    times = []
    for short, long, features_BMF in zip(ours, padded, features, strict=True):
        loop = partial(loop_backward, c.peft, c.gate, features_BMF, long, top_k, all_rows=False)
        steps = {
            "blend": whole_step(partial(ours_backward, c.blend, short), [c.blend], setting),
            "loop": whole_step(loop, [c.peft, c.gate], setting),
        }
        times.append(rounds(steps, setting, cold=cold))
    note = setting.words(
        f"{setting.model}, mean of {len(parts)} batches of {setting.batch} × 3–12 s, padded to "
        f"{'/'.join(str(b.audio_BS.shape[1] // 320) for b in ours)} positions of 20 ms against 1500"
    )
    return [
        row(
            "joint step, 3–12 s: blend and dynamic context against the loop at 30 s",
            statistics.mean(taken["blend"] for taken in times),
            statistics.mean(taken["loop"] for taken in times),
            unit="s/step",
            target=setting.target(5, 6),
            note=note,
        )
        | TRAINS_SHORT
    ]


def adapter_rows(setting: Setting) -> list[Measurement]:
    """What the default mixture costs beside one adapter of as many active ranks, and what magnitudes cost."""
    lengths = sorted(short_lengths(setting.batch))
    batch = make_batch(setting.model, lengths, setting.device, context="dynamic")
    active = SHARED_RANK + setting.top_k * ROUTED_RANK
    ways = {
        "mixture": _adapted(setting, batch, setting.experts, SHARED_RANK),
        "dense": _adapted(setting, batch, 0, active),
        "plain": _adapted(setting, batch, 0, active, magnitude=False),
    }
    steps = {name: whole_step(partial(ours_backward, way, batch), [way], setting) for name, way in ways.items()}
    taken = rounds(steps, replace(setting, repetitions=setting.repetitions * SMALL_RATIOS // 3))
    ranks = f"shared rank {SHARED_RANK}, {setting.experts} experts of {ROUTED_RANK}"
    size = f"{setting.model}, {setting.batch} × 3–12 s, {ranks}"
    note = setting.words(size, "forward, backward, clipping, AdamW")
    names = {
        "mixture": f"cost of the default mixture: one adapter of rank {active} against it",
        "dense": "cost of magnitudes",
    }
    return [
        row(names["mixture"], taken["mixture"], taken["dense"], unit="s/step", target=1 / 1.15, note=note),
        row(names["dense"], taken["dense"], taken["plain"], unit="s/step", target=1 / 1.03, note=note),
    ]


def _adapted(setting: Setting, batch: Batch, experts: int, shared_rank: int, *, magnitude: bool = True) -> Recogniser:
    whisper = make_whisper(setting.model, setting.device)
    slot = add_mixture(
        whisper,
        targets=TARGETS,
        num_experts=experts,
        rank=ROUTED_RANK,
        alpha=2 * ROUTED_RANK,
        shared_rank=shared_rank,
        magnitude=magnitude,
    )
    recogniser = Recogniser(whisper, slot=slot, options=RouterOptions("blend", setting.top_k)).train()
    if experts:  # a trained gate that is frozen, as in the default
        torch.manual_seed(1)
        recogniser.choose_by(logits_NE=torch.randn(len(batch), experts, device=setting.device))
    return recogniser
