"""Speed perturbation and SpecAugment: against soxr, and as properties of the masks."""

import numpy as np
import pytest
import soxr
import torch

from common.data.augment import Augmentation, change_speed

RATE = 16_000


def speech_like(seconds: float, seed: int = 0) -> torch.Tensor:
    """Noise below 4 kHz that fades in and out, so that no filter rings at its edges."""
    generator = np.random.default_rng(seed)
    spectrum = np.fft.rfft(generator.standard_normal(int(seconds * RATE)))
    spectrum[np.fft.rfftfreq(int(seconds * RATE), 1 / RATE) > 4000] = 0
    audio = np.fft.irfft(spectrum, n=int(seconds * RATE))
    return torch.from_numpy(audio * np.hanning(len(audio))).float()


@pytest.mark.parametrize("speed", [0.8, 0.9, 1.1, 1.25])
def test_a_changed_speed_is_a_resampling(speed):
    audio = speech_like(1.0)
    padded_BS = torch.nn.functional.pad(audio, (0, RATE // 2))[None]
    changed = change_speed(padded_BS, [speed])[0].numpy()
    S = padded_BS.shape[1]
    met = S / (2 * round(S / speed / 2))  # the factor to within a sample of the row
    expected = soxr.resample(audio.numpy(), RATE * met, RATE, quality="VHQ")
    np.testing.assert_allclose(changed[: len(expected)], expected, atol=5e-3 * np.abs(expected).max())
    assert np.abs(changed[len(expected) + 50 :]).max() < 5e-3 * np.abs(expected).max()


def test_rows_do_not_touch_each_other_and_speed_one_changes_nothing():
    audio_BS = torch.stack([speech_like(1.0, seed) for seed in range(3)])
    changed_BS = change_speed(audio_BS, [1.0, 1.1, 1.0])
    assert torch.equal(changed_BS[::2], audio_BS[::2])
    torch.testing.assert_close(changed_BS[1:2], change_speed(audio_BS[1:2], [1.1]))


def test_masks_have_the_widths_asked_for_and_time_masks_stay_within_the_speech():
    torch.manual_seed(0)
    mel_BMF = torch.randn(16, 80, 300)
    frames_B = torch.tensor([100, 300] * 8)
    masked_BMF = Augmentation(time_masks=2, time_width=0.1).mel(mel_BMF, frames_B)
    hidden_BF = (masked_BMF != mel_BMF).all(1)
    assert ((masked_BMF != mel_BMF).any(1) == hidden_BF).all()  # whole columns
    assert (hidden_BF.sum(1) <= 2 * (0.1 * frames_B).floor()).all()
    assert not hidden_BF[::2, 100:].any()
    assert hidden_BF.any()
    masked_BMF = Augmentation(mel_masks=1, mel_width=27).mel(mel_BMF, frames_B)
    hidden_BM = (masked_BMF != mel_BMF).all(2)
    assert (hidden_BM.sum(1) <= 27).all()
    assert hidden_BM.sum() > 16


def test_masked_places_hold_the_mean_of_their_utterance():
    torch.manual_seed(1)
    mel_BMF = torch.randn(4, 80, 200)
    augmentation = Augmentation(time_masks=1, time_width=0.5, mel_masks=1, mel_width=20)
    mel_BMF[:, :, 150:] = -1.5  # the silence after it is no part of its mean
    masked_BMF = augmentation.mel(mel_BMF, torch.full((4,), 150))
    changed = masked_BMF != mel_BMF
    mean_BMF = mel_BMF[..., :150].mean((1, 2), keepdim=True).expand_as(mel_BMF)
    torch.testing.assert_close(masked_BMF[changed], mean_BMF[changed])


@pytest.mark.parametrize(("speed", "expected"), [(0.8, [63, 75]), (1.25, [40, 60])])
def test_the_length_of_the_speech_changes_with_its_speed_if_it_fits(speed, expected):
    audio_BS = torch.zeros(2, 75 * 320)
    _, valid_B = Augmentation(speeds=(speed,)).audio(audio_BS, torch.tensor([50, 75]))
    assert valid_B.tolist() == expected


def test_the_same_random_state_gives_the_same_augmentation():
    augmentation = Augmentation(speeds=(0.9, 1.0, 1.1), time_masks=2, mel_masks=2)
    audio_BS, mel_BMF = torch.stack([speech_like(1.0)] * 4), torch.randn(4, 80, 100)
    torch.manual_seed(7)
    first = augmentation.audio(audio_BS, torch.full((4,), 40))[0], augmentation.mel(mel_BMF, torch.full((4,), 100))
    torch.manual_seed(7)
    second = augmentation.audio(audio_BS, torch.full((4,), 40))[0], augmentation.mel(mel_BMF, torch.full((4,), 100))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], audio_BS)


def test_an_utterance_that_would_no_longer_fit_is_not_slowed_down():
    audio_BS = torch.stack([speech_like(1.0)] * 2)
    slowed_BS, _ = Augmentation(speeds=(0.8,)).audio(audio_BS, torch.tensor([50, 40]))
    assert torch.equal(slowed_BS[0], audio_BS[0])
    assert not torch.equal(slowed_BS[1], audio_BS[1])


def test_without_options_nothing_is_touched():
    audio_BS, mel_BMF = torch.randn(2, 3200), torch.randn(2, 80, 20)
    none = Augmentation()
    assert none.audio(audio_BS, torch.tensor([10, 10]))[0] is audio_BS
    assert none.mel(mel_BMF, torch.tensor([20, 10])) is mel_BMF
    assert none.stretch == 1.0
    assert Augmentation(speeds=(0.8, 1.0)).stretch == pytest.approx(1.25)
