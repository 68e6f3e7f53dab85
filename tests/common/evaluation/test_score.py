"""One evaluator: the asr stage and `moe-asr evaluate` score alike and write the same fields."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from common.data.corpus import Utterance
from common.errors import Preempted
from common.evaluation.score import decode_batches, prediction_rows, rates_of, scored_rows, summarise
from common.pipeline.attempts import Activity, counting

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
FIELDS = ("id", "speaker", "etiology", "severity", "duration", "text", "text_alt")


def test_summary_and_predictions_are_as_recorded():
    """golden.json was written by the code before both were made from one function's rates."""
    utterances = [
        Utterance(**dict(zip(FIELDS, row[:7], strict=True)), audio_filepath=f"{row[0]}.wav", split="test")
        for row in GOLDEN["texts"]
    ]
    routing = {"a1": ([1, 0], [0.75, 0.25])}
    sides = [{row[0]: row[side] for row in GOLDEN["texts"]} for side in (7, 8)]
    before, after = scored_rows(utterances, sides[0], {}, "en"), scored_rows(utterances, sides[1], routing, "en")
    assert summarise(rates_of(before), rates_of(after)) == GOLDEN["summary"]
    assert prediction_rows(before, after) == GOLDEN["predictions"]


class Some:
    """A batch of ids."""

    def __init__(self, numbers):
        self.ids = tuple(f"u{number}" for number in numbers)

    def __len__(self):
        return len(self.ids)


class Short:
    """What is known of an example before it is decoded."""

    positions, inputs = 128, (1,)


def test_decoding_counts_its_utterances_and_stops_when_told():
    activity = Activity()
    stopping = iter([False, False, True, True])

    def decode(stop):
        with counting(activity, 10, "scoring", unit="utterances", hidden=True) as count:
            return decode_batches(
                [Short()] * 10,
                lambda batches: map(Some, batches),
                lambda batch: [(name.upper(), ((), ())) for name in batch.ids],
                Accelerator(cpu=True),
                batch_size=4,
                count=count,
                stopping=stop,
            )

    decoded = decode(lambda: False)
    assert {name: text for name, (text, _) in decoded.items()} == {f"u{i}": f"U{i}" for i in range(10)}
    assert (activity.name, activity.done, activity.total) == ("scoring", 10, 10)
    next(stopping)
    with pytest.raises(Preempted):
        decode(lambda: next(stopping))
    assert activity.done == 8  # two batches of three
