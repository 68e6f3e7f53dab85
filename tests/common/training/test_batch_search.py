"""The search finds the largest size; memory is measured, grows with the batch and bounds it."""

import pytest
import torch
from torch import nn

from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.training.batch_search import hardest_batch, largest, memory_limit, peak_memory, training_rows
from common.whisper_limits import MAX_SECONDS

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 64, 100, 257])
def test_the_largest_size_is_found_to_within_an_eighth_and_never_one_that_does_not_fit(most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most

    size = largest(fits, 256)
    assert size <= min(most, 256)
    assert size >= min(most, 256) * 7 / 8 - 1 or size == most
    assert max(tried) <= 256
    assert len(tried) <= 16


def test_the_peak_counts_what_was_freed_again():
    size = 64 << 20
    quiet = peak_memory(lambda: None, CPU)
    peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8).sum(), CPU)
    assert peak - quiet > 0.8 * size
    assert peak_memory(lambda: None, CPU) < peak - size / 2


def test_a_batch_found_within_a_memory_holds_it_and_twice_the_batch_does_not(micro_model):
    recogniser = Recogniser(load_whisper(micro_model)).train()
    recogniser.requires_grad_(True)

    def step(batch):
        nn.Module.zero_grad(recogniser)
        recogniser(batch)[0].backward()

    def peak(rows):
        batch = hardest_batch(rows, seconds=MAX_SECONDS, tokens=32, device=CPU)
        return peak_memory(lambda: step(batch), CPU)

    peak(1)  # what the first step alone allocates
    one, memory = peak(1), peak(6)
    assert abs(peak(1) - one) < (memory - one) / 2  # a larger trial leaves nothing behind
    rows = training_rows(step, CPU, tokens=32, memory=memory, limit=16)
    assert 2 <= rows <= 10
    assert peak(2 * rows + 2) > memory
    assert memory_limit(CPU) > memory
