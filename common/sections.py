"""The sections of the configuration: every setting with its type, bounds, default and what it is.

Sections that a stage reads decide its key (`common.pipeline.contract`); `runtime` never does, since nothing in it may
change a result. `docs/reference/config.md` is made of this file.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def text_language(language: str, task: str) -> str:
    """The language of a model's texts: Whisper translates to English only."""
    return "en" if task == "translate" else language


class Section(BaseModel):
    """One frozen section; an unknown name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CorpusConfig(Section):
    """What to train on."""

    path: str = Field("data/corpus", description="folder or s3://bucket/prefix that holds index.jsonl")


class ModelConfig(Section):
    """The base model: any Whisper checkpoint."""

    name: str = Field("openai/whisper-large-v2", description="hub name, local folder or store URI")
    revision: str | None = Field(None, description="commit of a hub model; pin it for results that can be repeated")
    language: str = Field("en", description="language token of multilingual models")
    task: Literal["transcribe", "translate"] = Field(
        "transcribe", description="what Whisper is asked to do; translate goes to English"
    )

    @property
    def text_language(self) -> str:
        """The language of its texts."""
        return text_language(self.language, self.task)


class AudioConfig(Section):
    """How audio becomes encoder input; the same in training, evaluation and transcription."""

    context: Literal["dynamic", "30s"] = Field(
        "dynamic", description="encode the utterance's own length, or pad to 30 s"
    )
    margin: int = Field(64, ge=64, description="encoder positions (20 ms each) of silence after the last sample")
    long_audio: Literal["error", "drop", "segment"] = Field(
        "error", description="utterances over 30 s or 448 tokens: refuse, leave out, or cut at pauses"
    )


class AugmentConfig(Section):
    """What is done to training audio, on the device; evaluation hears it as it is."""

    speeds: tuple[float, ...] = Field((), description="speed factors to draw from, as [0.9, 1.0, 1.1]")
    time_masks: int = Field(0, ge=0, description="SpecAugment: stripes of time per utterance")
    time_width: float = Field(0.05, gt=0, le=1, description="the longest, as a share of the utterance")
    mel_masks: int = Field(0, ge=0, description="SpecAugment: stripes of mel bands per utterance")
    mel_width: int = Field(27, gt=0, description="the widest, in bands")

    @field_validator("speeds")
    @classmethod
    def _plausible(cls, speeds: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.5 <= speed <= 2 for speed in speeds):
            raise ValueError("speed factors lie between 0.5 and 2")
        return speeds


class SubsetsConfig(Section):
    """Nested, stratified parts of the training split, in percent or as a number of utterances."""

    embeddings_percent: float = Field(10, gt=0, le=100, description="utterances that are clustered")
    embeddings_samples: int | None = Field(None, gt=0, description="the same as a number of utterances")
    experts_percent: float = Field(15, gt=0, le=100, description="utterances that pre-train the experts")
    experts_samples: int | None = Field(None, gt=0, description="the same as a number of utterances")
    asr_percent: float = Field(100, gt=0, le=100, description="utterances of the joint training")
    asr_samples: int | None = Field(None, gt=0, description="the same as a number of utterances")
    dev_samples: int | None = Field(None, gt=0, description="utterances of dev that are looked at; all when unset")
    test_samples: int | None = Field(None, gt=0, description="utterances of test that are scored; all when unset")


class ExtractConfig(Section):
    """Pooled embeddings of the frozen encoder."""

    layer: int = Field(
        -1, ge=-1, description="encoder layer: -1 the last after its norm, 0 the convolutions, n the n-th block"
    )
    pooling: Literal["mean", "max", "meanstd"] = Field("mean", description="over the utterance's own frames")
    keep_frames: bool = Field(False, description="also write fp16 embeddings of every valid frame")
    shard_size: int = Field(20_000, gt=0, description="utterances per shard of the fan-out")
    checkpoint_every: int = Field(100, gt=0, description="utterances between two resumable parts")
    clear_cache: bool = Field(False, description="empty the device cache after each part")


class ClusterConfig(Section):
    """Groups of similar speech."""

    algorithm: Literal["hdbscan", "spectral", "etiology"] = Field(
        "hdbscan",
        description="HDBSCAN finds the number of clusters, spectral clustering is told it; etiology takes the corpus's "
        "own groups",
    )
    reduce: Literal["none", "pca", "umap"] = Field("pca", description="how embeddings are reduced before clustering")
    reduce_dim: int = Field(50, gt=0, description="dimensions to reduce to")
    min_cluster_size: int = Field(5, ge=2, description="HDBSCAN's; lowered while it finds fewer clusters than experts")
    min_samples: int = Field(5, ge=1, description="HDBSCAN's: neighbours that make a point dense")
    reduce_experts: bool = Field(True, description="accept fewer clusters than experts")
    plot: Literal["umap", "pca", "tsne", "none"] = Field("umap", description="projection of the cluster map")


class LoraConfig(Section):
    """The shape of the experts."""

    rank: int = Field(16, gt=0, description="rank of each routed expert")
    alpha: float = Field(32, gt=0, description="every expert's output is scaled by alpha / rank")
    shared_rank: int = Field(48, gt=0, description="rank of the shared expert, which every utterance uses")
    magnitude: bool = Field(True, description="learn a magnitude for each rank, folded into the weights when saved")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of each expert, in training")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        description="names of the linear layers that get experts",
    )
    modules: Literal["all", "encoder", "decoder"] = Field("all", description="which half of the model gets experts")


class AdaloraConfig(Section):
    """AdaLoRA: one adapter whose ranks go where they matter (`asr.adapt: adalora`); the rest is `lora`'s."""

    init_rank: int | None = Field(None, gt=0, description="of each layer at the start; 1.5 times the target when unset")
    target_rank: int | None = Field(None, gt=0, description="mean over layers at the end; lora.rank when unset")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps before the first rank is taken away")
    final: float = Field(
        0.3, ge=0, lt=1, description="share of all steps after the last one is; the best is among these"
    )
    interval: int = Field(10, gt=0, description="steps between two allocations")
    orthogonality: float = Field(0.5, ge=0, description="weight of the penalty on P and Q that are not orthonormal")
    value_rate: float = Field(20, gt=0, description="learning rate of the singular values, times asr.learning_rate")

    @model_validator(mode="after")
    def _plausible(self) -> AdaloraConfig:
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final leave no step in between to take ranks away")
        if self.init_rank and self.target_rank and self.init_rank < self.target_rank:
            raise ValueError("init_rank is below target_rank")
        return self


class TrainConfig(Section):
    """What one run of the training loop needs."""

    epochs: int = Field(10, gt=0, description="at most; early stopping may end before")
    max_steps: int | None = Field(None, gt=0, description="stop after this many optimiser steps")
    batch_size: int = Field(4, gt=0, description="utterances per batch")
    gradient_accumulation_steps: int = Field(1, gt=0, description="batches per optimiser step, of all processes")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, at its highest")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of all steps")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    patience: int = Field(3, gt=0, description="evaluations without improvement before stopping")
    eval_every_n_epochs: int = Field(1, gt=0, description="full evaluation; the epochs between look at the loss only")
    select_by: Literal["wer", "loss"] = Field(
        "loss", description="which figure on dev selects the checkpoint and stops early"
    )
    average: int = Field(1, gt=0, description="average the weights of n evaluations; kept unless the best is better")
    average_of: Literal["best", "last"] = Field("best", description="which n")


class SpeechTrainConfig(TrainConfig):
    """The same for what trains on audio and text."""

    batch_seconds: float | None = Field(None, gt=0, description="padded seconds of audio per batch instead")
    batch_tokens: int | None = Field(None, gt=0, description="with batch_seconds: padded text tokens per batch at most")
    compile: bool = Field(False, description="compile the blocks of the model (torch.compile; needs a C++ compiler)")


class GatingConfig(TrainConfig):
    """The gate: an MLP from embedding to cluster."""

    batch_size: int = Field(256, gt=0, description="utterances per batch")
    epochs: int = Field(20, gt=0, description="at most; early stopping may end before")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW, at its highest")
    hidden: int = Field(256, gt=0, description="width of its hidden layer")
    dropout: float = Field(0.1, ge=0, lt=1, description="in training")
    class_weights: bool = Field(True, description="weigh clusters by the inverse of their size")
    select_by: Literal["loss"] = Field("loss", description="figure on dev that selects the checkpoint and stops early")


class ExpertsConfig(SpeechTrainConfig):
    """Pre-training of one expert per cluster."""

    epochs: int = Field(3, gt=0, description="at most; early stopping may end before")
    learning_rate: float = Field(5e-4, gt=0, description="of AdamW, at its highest")
    select_by: Literal["loss"] = Field("loss", description="figure on dev that selects the checkpoint and stops early")


class AsrConfig(SpeechTrainConfig):
    """Joint training, and the regime of it."""

    epochs: int = Field(5, gt=0, description="at most; early stopping may end before")
    learning_rate: float = Field(2e-4, gt=0, description="of experts, or of all weights, at its highest")
    gate_learning_rate: float = Field(1e-3, gt=0, description="of the gate")
    select_by: Literal["wer", "loss"] = Field("wer", description="decoded WER of a part of dev, or its loss")
    pretrain: Literal["gate", "alone", "none"] = Field(
        "gate",
        description="what is trained before joint training: the gate on clusters; gate and every expert alone on its "
        "cluster; or nothing",
    )
    adapt: Literal["lora", "adalora", "full"] = Field(
        "lora", description="mixture of LoRA experts, one adapter with ranks by importance, or all weights"
    )
    mixture: Literal["blend", "loss", "hard"] = Field(
        "blend", description="experts blended in each layer, by their losses, or the first alone"
    )
    top_k: int = Field(2, gt=0, description="experts per utterance")
    route_by: Literal["utterance", "speaker", "table"] = Field(
        "utterance",
        description="who decides on experts: the gate for each utterance, the gate for all utterances of a speaker in "
        "a split together, or a column of the corpus",
    )
    route_column: Literal["etiology", "severity", "speaker"] = Field(
        "etiology", description="column of the corpus for route_by: table, with one routed expert per value in train"
    )
    shared_expert: bool = Field(True, description="train an expert that every utterance uses beside routed ones")
    routed_rate: float = Field(
        0.3, gt=0, description="learning rate of routed experts beside a shared one, times the shared expert's"
    )
    magnitude_rate: float = Field(30, gt=0, description="learning rate of magnitudes, times their expert's")
    abstain: bool = Field(
        True, description="give an utterance unlike all groups the shared expert alone; the limit is set on dev"
    )
    drop_experts: bool = Field(True, description="drop routed experts that do not lower the loss on dev")
    balance_weight: float = Field(0.01, ge=0, description="weight of the load-balance loss")
    entropy_weight: float = Field(0.0, ge=0, description="weight of the router's entropy (positive: sharper)")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass, saving memory")
    select_samples: int = Field(200, gt=0, description="dev utterances that are decoded for selection")


class DecodeConfig(Section):
    """How text is decoded, in the selection of checkpoints, in evaluation and in transcription."""

    batch_size: int = Field(16, gt=0, description="utterances that are decoded at once")
    max_new_tokens: int = Field(224, gt=0, le=443, description="where a transcript that does not end is cut")
    num_beams: int = Field(1, gt=0, le=64, description="hypotheses of beam search; 1 is greedy")
    length_penalty: float = Field(1.0, description="beams compare log-probability / length ** this")
    temperatures: tuple[float, ...] = Field(
        (0.0,), min_length=1, description="the first, then those for loops and guesses, as [0, 0.2, 0.4, 0.6, 0.8, 1]"
    )
    timestamps: bool = Field(False, description="decode with Whisper's timestamp tokens (by its rules)")
    normaliser: Literal["unified", "published"] = Field(
        "unified",
        description="how texts are compared: published is Whisper's normaliser alone; unified brings apostrophes, "
        "full-width letters, digits and the like to one form before it",
    )

    @field_validator("temperatures")
    @classmethod
    def _none_negative(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if min(temperatures) < 0:
            raise ValueError("temperatures are 0 or more")
        return temperatures


class RuntimeConfig(Section):
    """What no result depends on: never part of a key."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda, cuda:1 …")
    num_workers: int = Field(4, ge=0, description="loader processes")
    log_file: str | None = Field(None, description="also log to this file")
    save_every_n_epochs: int = Field(5, gt=0, description="checkpoint at least this often")
    checkpoint_minutes: float = Field(10, gt=0, description="and at least this often in time")
    save_only_best: bool = Field(False, description="keep no checkpoint but the best and the newest")
    audio_cache_bytes: int = Field(
        20_000_000_000, ge=0, description="of audio from a corpus in a store that are kept on this machine"
    )
    extract_batch_seconds: float = Field(240, gt=0, description="padded audio per batch of the frozen encoder")
    parallel_experts: int | None = Field(None, gt=0, description="experts trained at once; one per GPU when unset")
    processes: int = Field(1, gt=0, description="joint training's, one per GPU; they share the batches of each step")
    plots: bool = Field(True, description="draw plots beside the stages' results")
    quiet: bool = Field(False, description="no progress bars")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="serve Prometheus metrics; 0: any free port")
    metrics_host: str | None = Field(None, description="interface for them: by default loopback, in Kubernetes all")
    metrics_linger_seconds: float = Field(20, ge=0, description="wait for a last scrape where there were any")
