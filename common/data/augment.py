"""Augmentation of training audio, batched and on the device: speed perturbation and SpecAugment.

Both use torch's global random state, which checkpoints contain: a resumed training gets the same augmentation as an
uninterrupted one.

Shape letters: B utterances, S samples, M mel bands, F mel frames, N masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data.features import SAMPLES_PER_POSITION


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Augmentation of training batches; names as in `common.sections.AugmentConfig`.

    Attributes:
        speeds: speed factors, one of which is drawn for each utterance; empty for no speed perturbation.
        time_masks, time_width: number of masks per utterance, and the maximum length of a mask as a share of the
            utterance's frames.
        mel_masks, mel_width: number of masks per utterance, and the maximum width of a mask in mel bands.
    """

    speeds: tuple[float, ...] = ()
    time_masks: int = 0
    time_width: float = 0.05
    mel_masks: int = 0
    mel_width: int = 27

    @property
    def stretch(self) -> float:
        """The factor by which an utterance can become longer; batches must leave room for it."""
        return 1 / min((1.0, *self.speeds))

    def audio(self, audio_BS: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
        """Audio at random speeds, of the same shape; an utterance that would no longer fit keeps its speed.

        Args:
            audio_BS: samples, zero-padded.
            valid_B: encoder positions (320 samples) that hold speech.

        Returns:
            (audio_BS, valid_B): the positions are those that hold speech at its new speed.
        """
        if not self.speeds:
            return audio_BS, valid_B
        positions = audio_BS.shape[1] // SAMPLES_PER_POSITION
        choice_B = torch.randint(len(self.speeds), (len(audio_BS),)).tolist()
        drawn_B = [self.speeds[choice] for choice in choice_B]
        fits_B = [valid <= speed * positions for valid, speed in zip(valid_B.tolist(), drawn_B, strict=True)]
        speed_B = [speed if fits else 1.0 for speed, fits in zip(drawn_B, fits_B, strict=True)]
        changed_B = (valid_B / torch.tensor(speed_B, device=valid_B.device)).ceil().to(valid_B.dtype)
        return change_speed(audio_BS, speed_B), changed_B.clamp_max(positions)

    def mel(self, mel_BMF: Tensor, frames_B: Tensor) -> Tensor:
        """Spectrograms with stripes of time and of mel bands set to the mean of the utterance's speech (SpecAugment
        without warping; Park et al., Interspeech 2019).

        Args:
            mel_BMF: log-mel spectrograms.
            frames_B: frames that hold speech; time masks lie within them, and their longest width is a share of them
                (adaptive, Park et al., ICASSP 2020).
        """
        if not self.time_masks and not self.mel_masks:
            return mel_BMF
        M, F = mel_BMF.shape[1:]
        frames_B = frames_B.to(mel_BMF.device)
        time_BF = _stripes(self.time_masks, frames_B * self.time_width, frames_B, F)
        bands_B = torch.full_like(frames_B, M)
        mel_BM = _stripes(self.mel_masks, torch.full_like(bands_B, min(self.mel_width, M)).float(), bands_B, M)
        silent_B1F = torch.arange(F, device=mel_BMF.device) >= frames_B[:, None, None]
        mean_B11 = mel_BMF.masked_fill(silent_B1F, 0).sum((1, 2), keepdim=True) / (M * frames_B[:, None, None])
        return torch.where(time_BF[:, None, :] | mel_BM[:, :, None], mean_B11, mel_BMF)


def change_speed(audio_BS: Tensor, speed_B: Sequence[float]) -> Tensor:
    """Plays each utterance faster or slower; tempo and pitch change together (Ko et al., Interspeech 2015).

    The spectrum is cut or padded with zeros, which is an ideal band-limited resampling of the whole row.

    Args:
        audio_BS: samples, zero-padded; a slower utterance needs 1/speed of its length.
        speed_B: speed factors; above 1 is faster and shorter. Exact to within one sample of the row's length.

    Returns:
        Audio of the same shape; longer audio is cut, shorter audio is padded with zeros.
    """
    S = audio_BS.shape[1]
    out_BS = audio_BS.clone()
    for speed in set(speed_B) - {1.0}:
        rows = torch.tensor([i for i, factor in enumerate(speed_B) if factor == speed], device=audio_BS.device)
        length = 2 * round(S / speed / 2)  # even: the spectrum then has no lone middle
        spectrum_RQ = torch.fft.rfft(audio_BS[rows].float())
        wanted = length // 2 + 1
        if wanted > spectrum_RQ.shape[1]:
            spectrum_RQ = torch.nn.functional.pad(spectrum_RQ, (0, wanted - spectrum_RQ.shape[1]))
        changed_RS = torch.fft.irfft(spectrum_RQ[:, :wanted], n=length) * (length / S)
        out_BS[rows] = 0.0
        out_BS[rows, : min(S, length)] = changed_RS[:, :S].to(out_BS.dtype)
    return out_BS


def _stripes(count: int, widest_B: Tensor, extent_B: Tensor, size: int) -> Tensor:
    """Masks (B, size), true in `count` random stripes of up to `widest_B` places within the first `extent_B`."""
    width_BN = torch.rand(len(extent_B), count, device=extent_B.device) * (widest_B[:, None] + 1)
    width_BN = width_BN.floor().minimum(extent_B[:, None].float())
    start_BN = (torch.rand_like(width_BN) * (extent_B[:, None] - width_BN + 1)).floor()
    place = torch.arange(size, device=extent_B.device)
    inside_BNP = (place >= start_BN[..., None]) & (place < (start_BN + width_BN)[..., None])
    return inside_BNP.any(1)
