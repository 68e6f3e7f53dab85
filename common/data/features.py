"""Log-mel spectrograms for Whisper, batched and on the device, and the lengths of audio context.

Constants and units follow openai/whisper's `audio.py`. Shape letters: B utterances, S samples, F mel frames, M mel
bands, T encoder positions.
"""

from functools import lru_cache

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from common.data.audio import SAMPLE_RATE
from common.whisper_limits import MAX_SECONDS

N_FFT = 400  # samples: 25 ms
HOP_LENGTH = 160  # samples: 10 ms
SAMPLES_PER_POSITION = 2 * HOP_LENGTH  # the second convolution strides by 2: 20 ms a position
POSITIONS_PER_SECOND = SAMPLE_RATE // SAMPLES_PER_POSITION  # 50
MAX_POSITIONS = round(MAX_SECONDS * POSITIONS_PER_SECOND)  # 1500

# Encoder lengths that batches are padded to. Few, so that kernels are reused and batches fill; about 20% apart, so
# that little is wasted. Multiples of 32 suit attention kernels.
BUCKETS = (128, 160, 192, 224, 256, 320, 384, 448, 512, 608, 704, 832, 960, 1120, 1312, MAX_POSITIONS)


def valid_positions(seconds: float) -> int:
    """Encoder positions that an utterance of `seconds` covers: at least 1, at most MAX_POSITIONS."""
    return max(1, min(MAX_POSITIONS, -(-round(seconds * SAMPLE_RATE) // SAMPLES_PER_POSITION)))


def describe_context(context: str, margin: int) -> str:
    """A description of an audio context, for reports."""
    return "30 s" if context == "30s" else f"the utterance's own length and {margin / POSITIONS_PER_SECOND:.2g} s"


def context_positions(seconds: float, *, context: str, margin: int) -> int:
    """The bucket length that an utterance is encoded at.

    It depends only on the utterance, not on its batch, so that results do not depend on batching.

    Args:
        seconds: duration.
        context: `dynamic`, or `30s` for Whisper's own padding.
        margin: positions of silence after the last sample, without which accuracy is poor.
    """
    if context == "30s":
        return MAX_POSITIONS
    wanted = valid_positions(seconds) + margin
    return next((bucket for bucket in BUCKETS if bucket >= wanted), MAX_POSITIONS)


@lru_cache(maxsize=8)
def _filters(mel_bands: int, device: torch.device) -> tuple[Tensor, Tensor]:
    filters = mel_filter_bank(
        num_frequency_bins=1 + N_FFT // 2,
        num_mel_filters=mel_bands,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    filters_MQ = torch.from_numpy(filters).float().t().contiguous().to(device)
    return filters_MQ, torch.hann_window(N_FFT, device=device)


def log_mel(audio_BS: Tensor, mel_bands: int) -> Tensor:
    """Log-mel spectrograms, scaled as Whisper's.

    Args:
        audio_BS: float32 samples in -1…1 at 16 kHz, zero-padded to S; S a multiple of 160.
        mel_bands: M, 80 or 128 (large-v3).

    Returns:
        mel_BMF with F = S / 160. Each utterance is clipped at 8 (80 dB) below its own maximum.
    """
    if audio_BS.device.type == "cpu" and len(audio_BS) > 1:  # one at a time stays in the cache: twice as fast
        return torch.cat([log_mel(audio_BS[i : i + 1], mel_bands) for i in range(len(audio_BS))])
    filters_MQ, window = _filters(mel_bands, audio_BS.device)
    with torch.autocast(audio_BS.device.type, enabled=False):
        spectrum_BQF = torch.stft(audio_BS.float(), N_FFT, HOP_LENGTH, window=window, return_complex=True)
        power_BQF = spectrum_BQF[..., :-1].abs().square()
        log_BMF = (filters_MQ @ power_BQF).clamp_min(1e-10).log10()
        log_BMF = torch.maximum(log_BMF, log_BMF.amax((1, 2), keepdim=True) - 8.0)
        return (log_BMF + 4.0) / 4.0
