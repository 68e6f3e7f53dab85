"""The trained model: Whisper, the mixture in its layers and the gate, in one module.

Shape letters: B utterances, K experts per utterance, E experts, D embedding width, T encoder positions, N table rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from common.data.augment import Augmentation
from common.data.batches import Batch
from common.data.features import log_mel
from common.model.gate import Gate
from common.model.mixture import mixture_layers
from common.model.routing import (
    Routing,
    RoutingSlot,
    balance_loss,
    draw_rows,
    route,
    route_to,
    router_entropy,
    rows_by_added,
)
from common.model.whisper import encode, pool, token_losses

Mixture = Literal["blend", "loss", "hard"]


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """Options of the assignment of utterances to experts; names as in `common.sections.AsrConfig`."""

    mixture: Mixture = "blend"
    top_k: int = 2
    balance_weight: float = 0.0
    entropy_weight: float = 0.0
    routed_dropout: float = 0.0

    @property
    def active(self) -> int:
        """K at inference: one routed expert, unless the outputs of several are blended."""
        return self.top_k if self.mixture == "blend" else 1


class Recogniser(nn.Module):
    """Whisper with an optional mixture of experts.

    Args:
        whisper: the base; its linear layers may be mixtures (`mixture.add_mixture`).
        slot: slot of these mixtures; None for a model without mixtures (full fine-tune, or the base itself).
        gate: chooses among several routed experts; None without routed experts, or with routing by a table.
        embeddings_ND: pooled embeddings of the frozen encoder for `Batch.row_B`; never trained.
        options: options of the router.
        gradient_checkpointing: recompute encoder blocks in the backward pass.
        augmentation: augmentation of the audio during training.
        orthogonality: AdaLoRA's penalty and its weight; added to the loss per token during training.
    """

    embeddings_ND: Tensor | None
    logits_NE: Tensor | None
    known_N: Tensor | None
    added_N: Tensor | None
    draw: Tensor  # of the rows that `RouterOptions.routed_dropout` leaves to the shared expert; another one each step

    def __init__(
        self,
        whisper: WhisperForConditionalGeneration,
        *,
        slot: RoutingSlot | None = None,
        gate: Gate | None = None,
        embeddings_ND: Tensor | None = None,
        options: RouterOptions | None = None,
        gradient_checkpointing: bool = False,
        augmentation: Augmentation | None = None,
        orthogonality: tuple[Callable[[nn.Module], Tensor], float] | None = None,
    ) -> None:
        super().__init__()
        self.whisper, self.slot, self.gate = whisper, slot, gate
        self.gradient_checkpointing = gradient_checkpointing
        self.options = options or RouterOptions()
        self.augmentation = augmentation or Augmentation()
        self.orthogonality = orthogonality
        self.register_buffer("embeddings_ND", embeddings_ND, persistent=False)
        self.register_buffer("logits_NE", None, persistent=False)
        self.register_buffer("known_N", None, persistent=False)
        self.register_buffer("added_N", None, persistent=False)
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def num_experts(self) -> int:
        """E, the number of routed experts; 0 for a dense adapter or without adapters."""
        return next((layer.num_experts for _, layer in mixture_layers(self.whisper)), 0)

    def choose_by(
        self,
        *,
        embeddings_ND: Tensor | None = None,
        logits_NE: Tensor | None = None,
        known_N: Tensor | None = None,
        added_N: Tensor | None = None,
    ) -> None:
        """Sets how experts are chosen for the utterances `Batch.row_B`: by the gate's embeddings, or by fixed logits.

        Args:
            embeddings_ND: input of the gate, which is then trained with the experts.
            logits_NE: logits to use instead of the gate's, for routing by speakers or by a table.
            known_N: false for utterances for which the router abstains, which use the shared expert alone; None: it
                abstains for none.
            added_N: number of the added expert that each utterance uses instead of routed experts, -1 for none; None:
                no utterance uses an added expert.
        """
        device = self.whisper.device
        self.embeddings_ND, self.logits_NE, self.known_N, self.added_N = (
            None if value is None else value.to(device) for value in (embeddings_ND, logits_NE, known_N, added_N)
        )

    @property
    def mel_bands(self) -> int:
        """M of the base model: 80, or 128 for large-v3."""
        return int(self.whisper.config.num_mel_bins)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of a batch: its tokens' cross-entropy plus the router's penalties times its tokens.

        Returns:
            (loss, {"ce": …, "balance": …, "entropy": …}), all summed over tokens.
        """
        mel_BMF = self._spectrogram(batch)
        logits_BE = self.gate_logits(batch.row_B)
        if logits_BE is None:
            self.set_routing(None, len(batch), added_B=self.added(batch.row_B))
            loss_B, count_B = self._losses(mel_BMF, batch.inputs_BU, batch.labels_BU)
            ce = loss_B.sum()
            if self.orthogonality is None or not self.training:
                return ce, {"ce": ce.detach()}
            penalty, weight = self.orthogonality
            distance = count_B.sum() * penalty(self.whisper)
            return ce + weight * distance, {"ce": ce.detach(), "orthogonality": distance.detach()}
        if self.options.mixture == "loss":
            ce, count_B, ids_BK = self._loss_mixture(mel_BMF, batch, logits_BE)
        else:
            routing = self.set_routing(logits_BE, len(batch), self.known(batch.row_B), self.added(batch.row_B))
            loss_B, count_B = self._losses(mel_BMF, batch.inputs_BU, batch.labels_BU)
            ce, ids_BK = loss_B.sum(), routing.topk_ids_BK
        tokens = count_B.sum()
        balance, entropy = balance_loss(logits_BE, ids_BK), router_entropy(logits_BE)
        loss = ce + tokens * (self.options.balance_weight * balance + self.options.entropy_weight * entropy)
        return loss, {
            "ce": ce.detach(),
            "balance": balance.detach() * tokens,
            "entropy": entropy.detach() * tokens,
        }

    def _spectrogram(self, batch: Batch) -> Tensor:
        """mel_BMF of a batch, augmented while training."""
        if not self.training:
            return log_mel(batch.audio_BS, self.mel_bands)
        audio_BS, valid_B = self.augmentation.audio(batch.audio_BS, batch.valid_B)
        return self.augmentation.mel(log_mel(audio_BS, self.mel_bands), 2 * valid_B)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles each block of encoder and decoder; equal blocks share their compiled code."""
        for block in (*self.whisper.model.encoder.layers, *self.whisper.model.decoder.layers):
            block.compile(dynamic=True, backend=backend)

    def _losses(self, mel_BMF: Tensor, inputs_BU: Tensor, labels_BU: Tensor, copies: int = 1) -> tuple[Tensor, Tensor]:
        recompute = self.gradient_checkpointing and self.training
        hidden_BTD = encode(self.whisper, mel_BMF, gradient_checkpointing=recompute, copies=copies)
        return token_losses(self.whisper, hidden_BTD, inputs_BU, labels_BU)

    def _loss_mixture(self, mel_BMF: Tensor, batch: Batch, logits_BE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each of the top-k experts alone, as one batch of B·K rows; losses weighted by routing probability.

        Rows of utterances for which the router abstains use the shared expert alone.
        """
        routing = route(logits_BE, self.options.top_k)
        topk = routing.topk_ids_BK.shape[1]
        ids_N1 = routing.topk_ids_BK.reshape(-1, 1)
        assert self.slot is not None
        known_B = self.known(batch.row_B)
        used_N1 = torch.ones_like(ids_N1) if known_B is None else known_B.repeat_interleave(topk)[:, None]
        self.slot.routing = Routing(ids_N1, used_N1.float())
        inputs_NU, labels_NU = (t.repeat_interleave(topk, 0) for t in (batch.inputs_BU, batch.labels_BU))
        loss_N, count_N = self._losses(mel_BMF, inputs_NU, labels_NU, copies=topk)
        loss_BK = loss_N.reshape(-1, topk) * routing.topk_weights_BK
        return loss_BK.sum(), count_N.reshape(-1, topk)[:, 0], routing.topk_ids_BK

    def all_choices(self) -> tuple[Tensor | None, Tensor | None]:
        """(logits_NE, known_N) of all rows that the model currently routes; None if there is no choice of experts."""
        if self.logits_NE is None and (self.gate is None or self.embeddings_ND is None):
            return None, None
        size = len(self.logits_NE if self.logits_NE is not None else self.embeddings_ND)  # type: ignore[arg-type]
        rows_N = torch.arange(size, device=self.whisper.device)
        with torch.no_grad():
            return self.gate_logits(rows_N), self.known_N

    def utterance_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss_B, tokens_B): each utterance's summed cross-entropy and its number of labelled tokens."""
        self._route(batch)
        return self._losses(log_mel(batch.audio_BS, self.mel_bands), batch.inputs_BU, batch.labels_BU)

    def known(self, row_B: Tensor) -> Tensor | None:
        """The rows that use routed experts; None if all rows do.

        These are those for which the router does not abstain. In training, a share of them uses the shared expert alone
        (`RouterOptions.routed_dropout`), so that it learns to work without routed experts.
        """
        known_B = None if self.known_N is None else self.known_N[row_B]
        if not self.training or not self.options.routed_dropout:
            return known_B
        kept_B = ~draw_rows(row_B, self.draw, self.options.routed_dropout)
        return kept_B if known_B is None else known_B & kept_B

    def added(self, row_B: Tensor) -> Tensor | None:
        """Numbers of the added experts of rows, -1 for none; None if no row uses an added expert."""
        return None if self.added_N is None else self.added_N[row_B]

    def gate_logits(self, row_B: Tensor) -> Tensor | None:
        """Logits over routed experts for rows of the table; None if there is no choice of experts."""
        if self.logits_NE is not None:
            return self.logits_NE[row_B]
        if self.gate is None:
            return None
        assert self.embeddings_ND is not None, "a gate needs embeddings"
        logits_BE: Tensor = self.gate(self.embeddings_ND[row_B])
        return logits_BE

    def set_routing(
        self, logits_BE: Tensor | None, rows: int, known_B: Tensor | None = None, added_B: Tensor | None = None
    ) -> Routing:
        """Puts the routing of a batch into the slot: by logits, or to the single routed expert, if there is one.

        A mixture trained with `loss` uses one expert at a time, so it decodes with the most probable expert. Rows with
        an added expert use only the shared expert and the added expert, and a single routed expert, which has learnt
        what all utterances have in common.
        """
        device, single = self.whisper.device, self.num_experts == 1
        if added_B is not None and single:
            known_B = None if known_B is None else known_B | (added_B >= 0)
        elif added_B is not None:
            known_B = added_B < 0 if known_B is None else known_B & (added_B < 0)
        if logits_BE is None:
            routing = route_to(0 if single else None, rows, device)
        else:
            routing = route(logits_BE, self.options.active, known_B)
        if added_B is not None:
            routing = replace(routing, added=rows_by_added(added_B))
            routing = replace(routing, unrouted=routing.all_added and not single)
        if self.slot is not None:
            self.slot.routing = routing
        return routing

    def _route(self, batch: Batch) -> None:
        """Sets the routing of a batch by the table, the gate and the added experts of its rows."""
        row_B = batch.row_B
        self.set_routing(self.gate_logits(row_B), len(batch), self.known(row_B), self.added(row_B))

    def encode_batch(self, batch: Batch, *, base: bool = False) -> Tensor:
        """Sets the routing of a batch, or none for the `base`, and returns its encoder output: hidden_BTD."""
        if not base:
            self._route(batch)
        elif self.slot is not None:
            self.slot.routing = None
        return encode(self.whisper, log_mel(batch.audio_BS, self.mel_bands))

    def frozen_embedding(self, batch: Batch, *, layer: int, pooling: str) -> Tensor:
        """pooled_BD: embeddings of a batch by the base encoder without experts."""
        if self.slot is not None:
            self.slot.routing = None
        hidden_BTD = encode(self.whisper, log_mel(batch.audio_BS, self.mel_bands), layer=layer)
        return pool(hidden_BTD, batch.valid_B.to(hidden_BTD.device), pooling)
