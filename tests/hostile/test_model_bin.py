"""A CTranslate2 model.bin that is damaged or made to harm is refused in one line, or it is a model that loads.

MOE_ASR_FUZZ_SEEDS=100000 tries more than the few hundred of a test run.
"""

import json
import random
import struct

import numpy as np
import pytest

from common.errors import DataError
from common.model.whisper import load_whisper
from demo.ct2 import import_ct2
from demo.ct2_file import read_model
from tests.factories import ct2_model, ct2_text
from tests.hostile.figures import SEEDS

WIDTH, INNER, VOCABULARY, MELS = 4, 6, 12, 5
TOKENS = (
    "<|startoftranscript|>",
    "<|endoftext|>",
    "<|startofprev|>",
    "<|notimestamps|>",
    "<|translate|>",
    "<|transcribe|>",
)


def variables():
    """Those of a Whisper of one layer on each side, in float32, float16, int16 with one scale and int8 with several."""
    random_ = np.random.default_rng(0)

    def weight(*shape):
        return random_.normal(size=shape).astype("<f4")

    made = {"encoder/num_heads": np.array(2, "<i4"), "decoder/num_heads": np.array(2, "<i4")}
    made["decoder/scale_embeddings"] = np.array(0, "<i1")
    for part, positions in (("encoder", 8), ("decoder", 9)):
        made[f"{part}/position_encodings/encodings"] = weight(positions, WIDTH)
        sub = ["self_attention"] + ["attention"] * (part == "decoder")
        for norm in ("layer_norm", *(f"layer_0/{name}/layer_norm" for name in (*sub, "ffn"))):
            made |= {f"{part}/{norm}/gamma": weight(WIDTH), f"{part}/{norm}/beta": weight(WIDTH)}
        linear = {"self_attention/linear_0": 3, "self_attention/linear_1": 1}
        linear |= {"attention/linear_0": 1, "attention/linear_1": 2, "attention/linear_2": 1} if len(sub) > 1 else {}
        for name, count in linear.items():
            bias = weight(count * WIDTH)
            if name == "self_attention/linear_0":
                bias[WIDTH : 2 * WIDTH] = 0
            elif name == "attention/linear_1":
                bias[:WIDTH] = 0
            made |= {f"{part}/layer_0/{name}/weight": weight(count * WIDTH, WIDTH), f"{part}/layer_0/{name}/bias": bias}
        made |= {f"{part}/layer_0/ffn/linear_0/weight": weight(INNER, WIDTH).astype("<f2")}
        made |= {f"{part}/layer_0/ffn/linear_0/bias": weight(INNER), f"{part}/layer_0/ffn/linear_1/bias": weight(WIDTH)}
        made[f"{part}/layer_0/ffn/linear_1/weight"] = (9 * weight(WIDTH, INNER)).astype("<i1")
        made[f"{part}/layer_0/ffn/linear_1/weight_scale"] = 1 + np.abs(weight(WIDTH))
    made |= {"encoder/conv1/weight": weight(WIDTH, MELS, 3), "encoder/conv1/bias": weight(WIDTH)}
    made |= {"encoder/conv2/weight": weight(WIDTH, WIDTH, 3), "encoder/conv2/bias": weight(WIDTH)}
    made["decoder/embeddings/weight"] = (99 * weight(VOCABULARY, WIDTH)).astype("<i2")
    made["decoder/embeddings/weight_scale"] = np.array(99, "<f4")
    return made


@pytest.fixture(scope="module")
def whole():
    return ct2_model(variables())


@pytest.fixture
def folder(tmp_path):
    """A CTranslate2 folder without its model.bin."""
    words = {chr(97 + n): n for n in range(VOCABULARY - len(TOKENS) - 1)}
    added = [{"content": content, "id": len(words) + n, "special": True} for n, content in enumerate(TOKENS)]
    tokenizer = {"added_tokens": added, "model": {"type": "BPE", "vocab": words, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def outcome(folder, body):
    """`refused` in one line, `loads` as a Whisper, or what is wrong with the outcome."""
    (folder / "model.bin").write_bytes(body)
    out = folder / "out"
    try:
        import_ct2(folder, out)
        load_whisper(out)
        return "loads"
    except DataError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 1000 else repr(error)
    except Exception as error:  # whatever it is, a user gets a traceback
        return repr(error)
    finally:
        for path in out.glob("*") if out.is_dir() else ():
            path.unlink()
        if out.is_dir():
            out.rmdir()


def test_the_small_model_is_one(folder, whole):
    assert outcome(folder, whole) == "loads"
    assert len(read_model(folder / "model.bin").variables) == len(variables()) + 2


def mutated(body, seed):
    """The file with one to three damages; those at its beginning and in its numbers are the most frequent."""
    chance, body = random.Random(seed), bytearray(body)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(body)) if chance.random() < 0.7 else chance.randrange(min(200, len(body)))
        kind = chance.randrange(7)
        if kind == 0:
            body[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            body[at] = chance.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            number = chance.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1))
            body[at : at + 4] = struct.pack("<I", number)[: len(body) - at]
        elif kind == 3:
            del body[max(1, at) :]
        elif kind == 4:
            del body[at : at + chance.randrange(1, 64)]
        elif kind == 5:
            body[at:at] = chance.randbytes(chance.randrange(1, 64))
        else:
            other = chance.randrange(len(body))
            body[at:at] = body[other : other + chance.randrange(1, 200)]
        if not body:
            break
    return bytes(body)


def test_a_damaged_file_is_refused_in_one_line_or_is_a_model_that_loads(folder, whole, tally):
    outcomes = {seed: outcome(folder, mutated(whole, seed)) for seed in range(SEEDS)}
    lost = {seed: result for seed, result in outcomes.items() if result not in ("refused", "loads")}
    assert not lost
    assert sum(result == "refused" for result in outcomes.values()) > 0.3 * SEEDS
    tally(SEEDS, len(lost))


def test_every_truncation_is_refused(folder, whole, tally):
    places = [*range(0, 400, 7), *range(400, len(whole), max(1, len(whole) // 60))]
    lost = [at for at in places if outcome(folder, whole[:at]) != "refused"]
    assert not lost
    tally(len(places), len(lost))


def crafted():
    """Files that are well formed, but of no model."""
    made = variables()
    for name, value in made.items():
        yield {other: v for other, v in made.items() if other != name}
        if value.ndim:
            yield made | {name: value[:0]}
            yield made | {name: value[:1]}
            yield made | {name: value.reshape(-1)[None]}
            yield made | {name: value.reshape(-1)[0]}
        if value.dtype.kind == "f":
            yield made | {name: np.full_like(value, np.nan)}
            yield made | {name: np.full_like(value, np.inf)}
        if name.endswith("_scale"):
            yield made | {name: np.zeros_like(value)}
        if name.endswith("num_heads"):
            yield from (made | {name: np.array(number, "<i4")} for number in (0, -1, 3, 2**31 - 1))
            yield made | {name: np.array(2.5, "<f4")}
    yield made | {"decoder/layer_1/ffn/linear_0/bias": made["decoder/layer_0/ffn/linear_0/bias"]}
    yield made | {f"decoder/layer_{'9' * 5000}/ffn/linear_0/bias": np.zeros(2, "<f4")}
    yield made | {"decoder/layer_9999/ffn/linear_0/bias": np.zeros(2, "<f4")}
    yield {}


def test_a_file_of_no_model_is_refused(folder, tally):
    optional = {"encoder/num_heads", "decoder/num_heads", "decoder/scale_embeddings"}
    cases = list(crafted())
    outcomes = [(outcome(folder, ct2_model(case)), case) for case in cases]
    lost = []
    for result, case in outcomes:
        missing = variables().keys() - case.keys()
        fine = result == "loads" and (missing <= optional and not changed_badly(case))
        lost += [] if result == "refused" or fine else [(result, missing, changes(case))]
    assert not lost
    tally(len(cases), len(lost))


def changes(case):
    made = variables()
    return {name: case[name].shape for name in case.keys() & made.keys() if not np.array_equal(case[name], made[name])}


def changed_badly(case):
    """What is changed that makes it no model: not the number of positions, nor the shape of what scales hold."""
    free = ("position_encodings/encodings", "decoder/scale_embeddings", "weight_scale")
    return [name for name in changes(case) if not name.endswith(free)]


def test_sizes_whose_product_overflows_are_refused(folder, whole, tally):
    name = "decoder/embeddings/weight"
    tried = 0
    for shape in ((2**32 - 1,) * 8, (2**31, 2**31, 4), (2**16, 2**16, 2**16, 2**16), (0,) * 8, (2**32 - 1, 0)):
        head = struct.pack("<I", 6) + ct2_text("WhisperSpec") + struct.pack("<II", 3, 1) + ct2_text(name)
        for size in (0, 4, 2**32 - 1):
            body = (
                head + struct.pack(f"<B{len(shape)}IBI", len(shape), *shape, 0, size) + b"\0" * 8 + struct.pack("<I", 0)
            )
            assert outcome(folder, body) == "refused"
            tried += 1
    tally(tried, 0)
