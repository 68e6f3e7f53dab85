"""The sections of the configuration: every setting with its type, bounds, default and what it is.

Sections that a stage reads decide its key (`common.pipeline.contract`); `runtime` never does, since nothing in it may
change a result. `docs/reference/config.md` is made of this file.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from common.section_base import Section, refuse_credentials


def text_language(language: str, task: str) -> str:
    """The language of a model's texts: Whisper translates to English only."""
    return "en" if task == "translate" else language


class CorpusConfig(Section):
    """Training corpus."""

    path: str = Field("data/corpus", description="Folder or s3://bucket/prefix that contains index.jsonl.")

    _no_credentials = field_validator("path")(refuse_credentials)


class ModelConfig(Section):
    """The base model: any Whisper checkpoint."""

    name: str = Field(
        "openai/whisper-large-v2", description="Hub name, local folder or store address of the base model."
    )
    revision: str | None = Field(None, description="Commit of a hub model. Pin it for reproducible results.")
    language: str = Field("en", description="Language code of the speech, for multilingual models.")
    task: Literal["transcribe", "translate"] = Field("transcribe", description="Transcribe, or translate into English.")

    _no_credentials = field_validator("name")(refuse_credentials)

    @property
    def text_language(self) -> str:
        """The language of its texts."""
        return text_language(self.language, self.task)


class AudioConfig(Section):
    """How audio becomes encoder input; the same in training, evaluation and transcription."""

    context: Literal["dynamic", "30s"] = Field(
        "dynamic", description="Encoder input: the utterance's own length, or padded to 30 s."
    )
    margin: int = Field(64, ge=64, description="Encoder positions (20 ms each) of silence after the last sample.")
    long_audio: Literal["error", "drop", "segment"] = Field(
        "error",
        description="Treatment of utterances over 30 s or 448 tokens: refuse the corpus, leave them out, or cut them "
        "at pauses.",
    )


class AugmentConfig(Section):
    """Augmentation of training audio, applied on the device. Evaluation audio is not changed."""

    speeds: tuple[float, ...] = Field((), description="Speed factors to draw from, such as [0.9, 1.0, 1.1].")
    time_masks: int = Field(0, ge=0, description="SpecAugment: time masks per utterance.")
    time_width: float = Field(
        0.05, gt=0, le=1, description="SpecAugment: longest time mask, as a share of the utterance."
    )
    mel_masks: int = Field(0, ge=0, description="SpecAugment: frequency masks per utterance.")
    mel_width: int = Field(27, gt=0, description="SpecAugment: widest frequency mask, in mel bands.")

    @field_validator("speeds")
    @classmethod
    def _plausible(cls, speeds: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.5 <= speed <= 2 for speed in speeds):
            raise ValueError("speed factors must lie between 0.5 and 2")
        return speeds


class SubsetsConfig(Section):
    """Nested, stratified parts of the training split, in percent or as a number of utterances."""

    embeddings_percent: float = Field(10, gt=0, le=100, description="Share of train that is clustered, in percent.")
    embeddings_samples: int | None = Field(None, gt=0, description="Number of utterances, in place of the percentage.")
    experts_percent: float = Field(
        15, gt=0, le=100, description="Share of train that pre-trains the experts, in percent."
    )
    experts_samples: int | None = Field(None, gt=0, description="Number of utterances, in place of the percentage.")
    asr_percent: float = Field(100, gt=0, le=100, description="Share of train for joint training, in percent.")
    asr_samples: int | None = Field(None, gt=0, description="Number of utterances, in place of the percentage.")
    dev_samples: int | None = Field(
        None, gt=0, description="Number of dev utterances that are evaluated. All when unset."
    )
    test_samples: int | None = Field(
        None, gt=0, description="Number of test utterances that are scored. All when unset."
    )


class ExtractConfig(Section):
    """Pooled embeddings of the frozen encoder."""

    layer: int = Field(
        -1,
        ge=-1,
        description="Encoder layer: -1 for the last one after its norm, 0 for the convolutions, n for the n-th block.",
    )
    pooling: Literal["mean", "max", "meanstd"] = Field("mean", description="Pooling over the utterance's own frames.")
    shard_size: int = Field(20_000, gt=0, description="Utterances per shard.")
    checkpoint_every: int = Field(100, gt=0, description="Utterances between two checkpoints of the extraction.")
    clear_cache: bool = Field(False, description="Empty the device's memory cache after each checkpoint.")


class ClusterConfig(Section):
    """Groups of similar speech."""

    algorithm: Literal["hdbscan", "spectral", "etiology"] = Field(
        "hdbscan",
        description="Clustering algorithm. hdbscan finds the number of clusters, spectral takes num_experts of them, "
        "etiology takes the corpus's own groups.",
    )
    reduce: Literal["none", "pca", "umap"] = Field("pca", description="Dimensionality reduction before clustering.")
    reduce_dim: int = Field(50, gt=0, description="Number of dimensions after the reduction.")
    min_cluster_size: int = Field(
        5, ge=2, description="Smallest cluster of HDBSCAN. It is lowered while fewer clusters than experts are found."
    )
    min_samples: int = Field(5, ge=1, description="Number of neighbours that make a point dense, for HDBSCAN.")
    reduce_experts: bool = Field(True, description="Accept fewer clusters than experts.")
    plot: Literal["umap", "pca", "tsne", "none"] = Field("umap", description="Projection for the cluster map.")


class LoraConfig(Section):
    """Rank, scale and targets of the LoRA experts."""

    rank: int = Field(16, gt=0, description="Rank of each routed expert.")
    alpha: float = Field(32, gt=0, description="Scale of every expert's output: alpha / rank.")
    shared_rank: int = Field(48, gt=0, description="Rank of the shared expert, which every utterance uses.")
    magnitude: bool = Field(True, description="Learn a magnitude per rank. A saved adapter has it in its weights.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the input of each expert.")
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "proj_out"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        min_length=1,
        description="Names of the linear layers that are adapted.",
    )
    modules: Literal["all", "encoder", "decoder"] = Field("all", description="Part of the model that is adapted.")

    @model_validator(mode="after")
    def _present(self) -> LoraConfig:
        if self.modules != "all" and "proj_out" in self.targets:
            raise ValueError("proj_out is outside the blocks of encoder and decoder: adapt it with modules: all")
        return self


class AdaloraConfig(Section):
    """AdaLoRA: one adapter whose ranks are allocated by importance (`asr.adapt: adalora`). `lora` has the rest."""

    init_rank: int | None = Field(None, gt=0, description="Rank of each layer at the start. Default: 1.5 × target.")
    target_rank: int | None = Field(None, gt=0, description="Mean rank over layers at the end. lora.rank when unset.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of all steps before the first rank is removed.")
    final: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="Share of all steps after the last rank is removed. Checkpoints are selected among these.",
    )
    interval: int = Field(10, gt=0, description="Optimiser steps between two allocations of ranks.")
    orthogonality: float = Field(0.5, ge=0, description="Weight of the penalty that keeps P and Q orthonormal.")
    value_rate: float = Field(
        20, gt=0, description="Learning rate of the singular values, as a multiple of asr.learning_rate."
    )

    @model_validator(mode="after")
    def _plausible(self) -> AdaloraConfig:
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final leave no step in between to remove ranks")
        return self


class TrainConfig(Section):
    """What one run of the training loop needs."""

    epochs: int = Field(10, gt=0, description="Maximum number of epochs. Early stopping can end training sooner.")
    max_steps: int | None = Field(None, gt=0, description="Maximum number of optimiser steps.")
    batch_size: int = Field(4, gt=0, description="Utterances per batch.")
    gradient_accumulation_steps: int = Field(1, gt=0, description="Batches per optimiser step, over all processes.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="Share of all steps in which the learning rate rises.")
    max_grad_norm: float = Field(1.0, gt=0, description="Maximum gradient norm. Larger gradients are clipped to it.")
    patience: int = Field(3, gt=0, description="Evaluations without improvement before training stops early.")
    eval_every_n_epochs: int = Field(
        1, gt=0, description="Epochs between two full evaluations. The other epochs evaluate the loss only."
    )
    select_by: Literal["wer", "loss"] = Field(
        "loss", description="Metric on dev that selects the checkpoint and stops training early."
    )
    average: int = Field(
        1,
        gt=0,
        description="Number of evaluated weights to average at the end. The average is kept unless the best "
        "checkpoint is better.",
    )
    average_of: Literal["best", "last"] = Field(
        "best", description="Which evaluations are averaged: the best ones or the last ones."
    )


class SpeechTrainConfig(TrainConfig):
    """The same for what trains on audio and text."""

    batch_seconds: float | None = Field(
        None, gt=0, description="Padded seconds of audio per batch, in place of batch_size."
    )
    batch_tokens: int | None = Field(
        None, gt=0, description="Maximum number of padded text tokens per batch, together with batch_seconds."
    )
    compile: bool = Field(
        False,
        description="Compile the blocks of the model with torch.compile. Needs a C++ compiler on a CPU and a C "
        "compiler on a GPU.",
    )


class GatingConfig(TrainConfig):
    """The gate: an MLP from embedding to group."""

    target: Literal["cluster", "etiology", "severity", "speaker"] = Field(
        "cluster",
        description="Groups that the gate learns to tell apart, one routed expert each: clusters, or the values of a "
        "column of the corpus.",
    )
    batch_size: int = Field(256, gt=0, description="Utterances per batch.")
    epochs: int = Field(20, gt=0, description="Maximum number of epochs. Early stopping can end training sooner.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    hidden: int = Field(256, gt=0, description="Width of the gate's hidden layer.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability on the gate's hidden layer.")
    class_weights: bool = Field(True, description="Weight each group by the inverse of its size.")
    select_by: Literal["loss"] = Field(
        "loss", description="Metric on dev that selects the checkpoint and stops training early."
    )


class ExpertsConfig(SpeechTrainConfig):
    """Pre-training of one expert per cluster, and of the shared one before them with `asr.pretrain: experts`."""

    shared_max_steps: int | None = Field(
        None, gt=0, description="Maximum number of optimiser steps of the shared expert, with asr.pretrain: experts."
    )
    epochs: int = Field(3, gt=0, description="Maximum number of epochs. Early stopping can end training sooner.")
    learning_rate: float = Field(
        5e-4,
        gt=0,
        description="Peak learning rate of AdamW. It is scaled by rank as asr.learning_rate is, and multiplied by "
        "asr.routed_rate for routed experts on top of a shared one.",
    )
    select_by: Literal["loss"] = Field(
        "loss", description="Metric on dev that selects the checkpoint and stops training early."
    )


class AsrConfig(SpeechTrainConfig):
    """Joint training and its regime."""

    epochs: int = Field(5, gt=0, description="Maximum number of epochs. Early stopping can end training sooner.")
    learning_rate: float = Field(
        2e-4,
        gt=0,
        description="Peak learning rate of a shared expert of rank 48 at alpha / rank = 2, or of all weights. It is "
        "scaled for other ranks.",
    )
    gate_learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of a gate that was not pre-trained.")
    select_by: Literal["wer", "loss"] = Field(
        "wer", description="Metric that selects the checkpoint: decoded WER of a part of dev, or dev loss."
    )
    pretrain: Literal["gate", "experts", "alone", "none"] = Field(
        "gate",
        description="Training before joint training. gate: the gate on clusters; experts: the gate, the shared expert, "
        "and on top one routed expert per cluster; alone: the gate and each expert alone on its cluster; or none.",
    )
    adapt: Literal["lora", "adalora", "full"] = Field(
        "lora",
        description="Weights that are trained: a mixture of LoRA experts, one adapter with ranks by importance, or "
        "all weights.",
    )
    mixture: Literal["blend", "loss", "hard"] = Field(
        "blend",
        description="How experts are combined: their outputs in each layer, their losses, or the most probable one "
        "alone.",
    )
    top_k: int = Field(2, gt=0, description="Routed experts per utterance.")
    route_by: Literal["utterance", "speaker", "table"] = Field(
        "utterance",
        description="Routing decision: by the gate for each utterance, by the gate for all utterances of a speaker "
        "in a split together, or by a column of the corpus.",
    )
    route_column: Literal["etiology", "severity", "speaker", "none", "shuffled"] = Field(
        "etiology",
        description="Column of the corpus for route_by: table. Each value in train gets a routed expert. If it is also "
        "gating.target, the gate routes utterances without a value. Two values are controls: none is one "
        "group for all speakers, shuffled draws one of num_experts groups for each speaker.",
    )
    shared_expert: bool = Field(True, description="Train an expert that every utterance uses beside routed experts.")
    routed_rate: float = Field(
        0.3,
        gt=0,
        description="Learning rate of routed experts beside a shared one, as a multiple of the shared expert's.",
    )
    magnitude_rate: float = Field(30, gt=0, description="Learning rate of magnitudes, as a multiple of their expert's.")
    routed_dropout: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Share of training utterances that use the shared expert alone, so that it works without others.",
    )
    abstain: bool = Field(
        True, description="Use the shared expert alone for utterances unlike all groups. The limit is set on dev."
    )
    drop_experts: bool = Field(True, description="Drop routed experts that do not lower the loss on dev.")
    balance_weight: float = Field(0.01, ge=0, description="Weight of the load-balance loss.")
    entropy_weight: float = Field(
        0.0, ge=0, description="Weight of the router's entropy in the loss. A positive value makes routing sharper."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    select_samples: int = Field(
        200, gt=0, description="Number of dev utterances that are decoded to select the checkpoint."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AsrConfig:
        if self.pretrain == "experts" and not self.shared_expert:
            raise ValueError("pretrain: experts trains routed experts on a shared one, and shared_expert is off")
        return self


class DecodeConfig(Section):
    """How text is decoded, in the selection of checkpoints, in evaluation and in transcription."""

    batch_size: int = Field(16, gt=0, description="Number of utterances that are decoded at once.")
    max_new_tokens: int = Field(224, gt=0, le=443, description="Maximum number of tokens of a transcript.")
    num_beams: int = Field(1, gt=0, le=64, description="Number of beams. 1 decodes greedily.")
    length_penalty: float = Field(1.0, description="Exponent of the length by which beam scores are divided.")
    temperatures: tuple[float, ...] = Field(
        (0.0,),
        min_length=1,
        description="Sampling temperatures: the first, then those to fall back to, such as [0, 0.2, 0.4, 0.6, 0.8, 1].",
    )
    timestamps: bool = Field(False, description="Decode with Whisper's timestamp tokens.")
    normaliser: Literal["unified", "published"] = Field(
        "unified",
        description="Normalisation of texts for scoring: published is Whisper's normaliser alone, unified brings "
        "apostrophes, full-width letters, digits and the like to one form before it.",
    )

    @field_validator("temperatures")
    @classmethod
    def _none_negative(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if min(temperatures) < 0:
            raise ValueError("temperatures must be 0 or more")
        return temperatures


class RuntimeConfig(Section):
    """Settings that do not affect results and are not part of any key."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="Device: auto, cpu, cuda or one GPU as cuda:1."
    )
    num_workers: int = Field(4, ge=0, description="Number of loader processes.")
    log_file: str | None = Field(None, description="File that log lines are also written to.")
    save_every_n_epochs: int = Field(5, gt=0, description="Maximum number of epochs between two checkpoints.")
    checkpoint_minutes: float = Field(10, gt=0, description="Maximum number of minutes between two checkpoints.")
    save_only_best: bool = Field(
        False,
        description="Write a checkpoint after an epoch only if it is the best so far. Timed checkpoints and the final "
        "one are still written.",
    )
    audio_cache_bytes: int = Field(
        20_000_000_000, ge=0, description="Maximum size of the local cache for audio from a remote corpus, in bytes."
    )
    extract_batch_seconds: float = Field(
        240, gt=0, description="Padded seconds of audio per batch of the frozen encoder."
    )
    parallel_experts: int | None = Field(
        None, gt=0, description="Number of experts that are trained at once. One per GPU when unset."
    )
    processes: int = Field(
        1, gt=0, description="Number of processes of joint training, one per GPU. They share the batches of each step."
    )
    plots: bool = Field(True, description="Write plots beside the results of the stages.")
    quiet: bool = Field(False, description="Show no progress bars.")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port for Prometheus metrics. 0 takes any free port."
    )
    metrics_host: str | None = Field(
        None, description="Interface for Prometheus metrics. Loopback by default, all interfaces in Kubernetes."
    )
    metrics_linger_seconds: float = Field(
        20, ge=0, description="Seconds to wait for a last scrape at the end, if there was one before."
    )
