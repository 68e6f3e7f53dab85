"""Batches are a pure function of seed and epoch, hold every example once, and read what the index says."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from common.data.batches import TENSORS, BatchLoader, collate, epoch_batches, make_examples
from common.data.corpus import Utterance, read_corpus, write_index
from common.data.features import SAMPLES_PER_POSITION
from common.data.tokens import load_codec
from common.errors import DataError, RetryableError
from tests.factories import write_wav

CPU = torch.device("cpu")


@pytest.fixture
def examples(tones, micro_model):
    corpus = read_corpus(tones)
    return make_examples(corpus, corpus.split("train"), load_codec(micro_model), context="dynamic", margin=64)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_example_once_in_batches_of_one_bucket(examples, shuffle):
    batches = epoch_batches(examples, batch_size=4, seed=3, epoch=1, shuffle=shuffle)
    assert sorted(n for batch in batches for n in batch) == list(range(len(examples)))
    assert all(len({examples[n].positions for n in batch}) == 1 and len(batch) <= 4 for batch in batches)


def test_the_same_seed_and_epoch_give_the_same_batches_and_others_do_not(examples):
    batches = epoch_batches(examples, batch_size=4, seed=3, epoch=1)
    assert batches == epoch_batches(examples, batch_size=4, seed=3, epoch=1)
    assert batches != epoch_batches(examples, batch_size=4, seed=3, epoch=2)
    assert len(batches) == len(epoch_batches(examples, batch_size=4, seed=9, epoch=7))


def test_batches_by_seconds_keep_padded_audio_under_the_limit(examples):
    for batch in epoch_batches(examples, batch_size=1, batch_seconds=12, seed=0):
        assert len(batch) * examples[batch[0]].positions / 50 <= 12


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_gives_padded_audio_in_the_order_asked_for(examples, workers):
    loader = BatchLoader(examples, num_workers=workers, device=CPU)
    wanted = epoch_batches(examples, batch_size=4, seed=0)[:3]
    for _ in range(2):  # persistent processes serve a second epoch
        for numbers, batch in zip(wanted, loader(wanted), strict=True):
            assert batch.ids == tuple(examples[n].id for n in numbers)
            assert batch.audio_BS.shape == (len(numbers), examples[numbers[0]].positions * SAMPLES_PER_POSITION)
            assert batch.row_B.tolist() == [examples[n].row for n in numbers]
            assert 0 <= batch.padding < 1


def test_parts_of_a_batch_weigh_as_much_as_the_whole(examples):
    batch = next(BatchLoader(examples, num_workers=0, device=CPU)([[0, 1, 2]]))
    assert batch.part(0, 1).weight + batch.part(1, 3).weight == batch.weight


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_audio_is_named(examples, workers):
    broken = [replace(examples[0], path=examples[0].path.with_name("gone.wav")), *examples[1:]]
    loader = BatchLoader(broken, num_workers=workers, device=CPU)
    with pytest.raises(DataError, match=r"gone\.wav"):
        list(loader([[0, 1]]))


def one_utterance(folder, *, seconds=1.0, text="seven"):
    write_wav(folder / "a.wav", 0.1 * np.ones(int(16_000 * min(seconds, 1))), 16_000)
    write_index(folder, [Utterance(id="u1", audio_filepath="a.wav", duration=seconds, text=text)])
    return read_corpus(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seconds": 31.0}, "lasts 31.00 s"), ({"text": " "}, "has no text"), ({"text": "x" * 600}, "tokens, over 448")],
)
def test_what_whisper_cannot_take_is_refused_by_name(tmp_path, micro_model, change, message):
    corpus = one_utterance(tmp_path, **change)
    with pytest.raises(DataError, match=f"u1.*{message}"):
        make_examples(corpus, corpus.utterances, load_codec(micro_model), context="dynamic", margin=64)


def test_samples_beyond_the_bucket_are_cut_not_crashed(examples):
    long = np.zeros(examples[0].positions * SAMPLES_PER_POSITION + 7, np.float32)
    assert collate([(examples[0], long)]).audio_BS.shape[1] == examples[0].positions * SAMPLES_PER_POSITION


@pytest.mark.parametrize("token", ["<|startoftranscript|>", "<|endoftext|>"])
def test_a_text_with_a_special_token_is_refused_by_its_utterance(micro_model, tones, token):
    corpus = read_corpus(tones)
    said = replace(corpus.utterances[0], text=f"so {token} it goes")
    with pytest.raises(DataError, match=f"utterance {said.id}: its text contains a special token"):
        make_examples(corpus, [said], load_codec(micro_model), context="dynamic", margin=64)


def test_torchs_loader_pins_all_tensors_of_a_batch(examples, monkeypatch):
    (batch,) = BatchLoader(examples, num_workers=0, device=CPU)([[0, 1]])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    moved = pin_memory(batch)
    assert (moved.ids, moved.seconds) == (batch.ids, batch.seconds)
    for name in TENSORS:
        assert any(getattr(moved, name) is tensor for tensor in pinned)
        assert torch.equal(getattr(moved, name), getattr(batch, name))


STOPPED = """
import os, subprocess, sys, time
from pathlib import Path
import torch
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import read_corpus
from common.signals import handle_signals
from common.data.tokens import load_codec

if __name__ == "__main__":
    codec = load_codec(Path(sys.argv[1]))
    corpus = read_corpus(sys.argv[2])
    examples = make_examples(corpus, corpus.split("train"), codec, context="dynamic", margin=64)
    loader = BatchLoader(examples, num_workers=1, device=torch.device("cpu"))
    with handle_signals() as stopping:
        batches = loader([[i % len(examples)] for i in range(20)])
        next(batches)
        subprocess.run(["kill", "-s", sys.argv[3], "--", f"-{os.getpgrp()}"])  # itself included
        while not stopping():
            time.sleep(0.01)
        count = 1 + sum(1 for _ in batches)
    print(count)
"""


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_to_all_processes_of_a_job_leaves_the_loader_its_batches(micro_model, tones, name):
    """So that a training that is stopped by a signal gets as far as its checkpoint."""
    command = [sys.executable, "-c", STOPPED, str(micro_model), str(tones), name]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def test_a_loader_process_ends_when_its_owner_says_so(examples):
    """As torch and multiprocessing do when a program ends without having closed its loader."""
    loader = BatchLoader(examples, num_workers=1, device=CPU)
    next(loader([[0], [1]]))
    (worker,) = loader._loader._iterator._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_a_loader_process_that_is_killed_is_worth_another_try(examples):
    loader = BatchLoader(examples, num_workers=1, device=CPU)
    batches = loader([[i % len(examples)] for i in range(40)])
    next(batches)
    (worker,) = loader._loader._iterator._workers
    worker.kill()
    with pytest.raises(RetryableError, match="--num-workers"):
        list(batches)
