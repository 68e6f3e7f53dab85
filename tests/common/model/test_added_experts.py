"""Added experts: everybody else's logits stay bit for bit, the own ones are an exact sum, and files give them back."""

import json
from dataclasses import asdict

import pytest
import torch

from common.errors import DataError
from common.model.added_experts import (
    ADDED,
    AddedExpert,
    added_matrices,
    append_terms,
    attach,
    compressed,
    load_terms,
    new_stack,
    prepare,
    read_added,
    remove_last,
    save_added,
)
from common.model.mixture import AddedTerm, add_mixture, mixture_layers
from common.model.recogniser import Recogniser, RouterOptions
from common.model.whisper import encode, load_whisper
from tests.common.model.test_mixture import randomise

TARGETS = ("q_proj", "v_proj", "fc1")
WAYS = ("choose", "gates", "expert")


def expert(method="expert", **changes):
    values = {
        "name": "F07", "column": "speaker", "value": "F07", "method": method, "rank": 2 if method == "expert" else 0,
        "weights": (), "start": None, "utterances": 12, "seconds": 30.5, "wer_before": 0.3, "wer_after": 0.2,
        "interval": (0.05, 0.15), "parent": "0" * 64, "version": "1",
    }  # fmt: skip
    return AddedExpert(**(values | changes))


def model(micro_model, experts=3, shared=4):
    whisper = load_whisper(micro_model)
    slot = None
    if experts or shared:
        slot = add_mixture(whisper, targets=TARGETS, num_experts=experts, rank=2, alpha=4, shared_rank=shared)
        randomise(whisper)
    return Recogniser(whisper, slot=slot, options=RouterOptions(top_k=2)).eval()


def terms_of(recogniser, method, seed=3):
    prepare(recogniser)
    generator, terms = torch.Generator().manual_seed(seed), {}
    for name, layer in mixture_layers(recogniser.whisper):
        if method == "choose":
            terms[name] = AddedTerm(weights={1: 0.25, 2: 0.75})
        elif method == "gates":
            terms[name] = AddedTerm(magnitude_1R=torch.randn(layer.shared.magnitude.shape, generator=generator))
        else:
            stack = new_stack(layer, 2)
            stack.lora_B.data.normal_(generator=generator)
            terms[name] = AddedTerm(stack=stack)
    return terms


@torch.inference_mode()
def logits(recogniser, added=None, rows=4):
    """Logits of a fixed batch; rows are routed by fixed logits where there are experts to choose from."""
    generator = torch.Generator().manual_seed(7)
    mel_BMF = torch.randn(rows, 80, 64, generator=generator)
    tokens_BU = torch.randint(256, (rows, 5), generator=generator)
    choice_BE = torch.randn(rows, recogniser.num_experts, generator=generator) if recogniser.num_experts > 1 else None
    known_B = torch.tensor([True, False] * (rows // 2)) if choice_BE is not None else None
    recogniser.set_routing(choice_BE, rows, known_B, None if added is None else torch.tensor(added))
    hidden_BTD = encode(recogniser.whisper, mel_BMF)
    output = recogniser.whisper.model.decoder(input_ids=tokens_BU, encoder_hidden_states=hidden_BTD)
    return recogniser.whisper.proj_out(output.last_hidden_state)


@pytest.mark.parametrize("kernel", ["masked", "gathered"])
@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize(("experts", "shared"), [(3, 4), (0, 4), (0, 0), (1, 0)])
def test_everybody_elses_logits_stay_bit_for_bit(micro_model, experts, shared, method, kernel):
    if (method == "choose" and experts < 3) or (method == "gates" and not shared):
        pytest.skip("this model has no such way")
    recogniser = model(micro_model, experts, shared)
    for _, layer in mixture_layers(recogniser.whisper):
        layer.kernel = kernel
    before = logits(recogniser)
    append_terms(recogniser, terms_of(recogniser, method))
    append_terms(recogniser, terms_of(recogniser, method, seed=4))
    assert torch.equal(logits(recogniser), before)
    for added in ([-1, 0, -1, -1], [1, -1, 0, -1]):
        after = logits(recogniser, added)
        for row, number in enumerate(added):
            assert torch.equal(after[row], before[row]) == (number < 0)
    remove_last(recogniser)
    remove_last(recogniser)
    assert torch.equal(logits(recogniser), before)


@pytest.mark.parametrize("rank", [1, 3, 6, 40])
def test_a_compressed_term_is_the_closest_of_its_rank(micro_model, rank):
    recogniser = model(micro_model)
    whole = {name: AddedTerm(magnitude_1R=term.magnitude.detach(), stack=terms_of(recogniser, "expert")[name].stack)
             for name, term in terms_of(recogniser, "gates").items()}  # fmt: skip
    for name, layer in mixture_layers(recogniser.whisper):
        a_CI, b_OC = whole[name].plain(layer)
        term = compressed(layer, whole[name], rank)
        a_RI, b_OR = term.plain(layer)
        assert len(a_RI) == term.stack.rank == min(rank, len(a_CI))
        lost = torch.linalg.matrix_norm(b_OC @ a_CI - b_OR @ a_RI)
        tail_C = torch.linalg.svdvals(b_OC @ a_CI)[rank:]
        torch.testing.assert_close(lost, tail_C.norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", WAYS)
def test_an_added_expert_with_the_shared_one_is_one_plain_adapter(micro_model, method):
    recogniser = model(micro_model)
    append_terms(recogniser, terms_of(recogniser, method))
    actual = logits(recogniser, [0] * 4)
    among_others = logits(recogniser, [0, -1, 0, 0])  # a batch of one expert alone is computed in another way
    torch.testing.assert_close(actual[2:], among_others[2:], rtol=1e-4, atol=1e-4)
    merged = load_whisper(micro_model)
    scaling = 2.0
    with torch.no_grad():
        for name, (a_RI, b_OR) in added_matrices(recogniser, 0).items():
            merged.get_submodule(name).weight += scaling * b_OR @ a_RI
    torch.testing.assert_close(actual, logits(Recogniser(merged).eval(), rows=4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", WAYS)
def test_files_give_an_added_expert_back_to_the_last_bit(micro_model, tmp_path, method):
    recogniser = model(micro_model)
    terms = terms_of(recogniser, method)
    weights = tuple(next(iter(terms.values())).weights.items())
    save_added(expert(method, weights=weights), terms, tmp_path / "one", base_model="base")
    append_terms(recogniser, terms)
    saved = logits(recogniser, [0, -1, -1, 0])
    other = model(micro_model)
    (info,) = attach(other, [tmp_path / "one"])
    assert info == expert(method, weights=weights) and info.gain == pytest.approx(0.1)
    assert torch.equal(logits(other, [0, -1, -1, 0]), saved)


def test_an_expert_for_another_model_is_refused(micro_model, tmp_path):
    recogniser = model(micro_model, shared=6)
    save_added(expert("gates"), terms_of(recogniser, "gates"), tmp_path / "one", base_model="base")
    with pytest.raises(DataError, match="magnitudes of a shared expert"):
        attach(model(micro_model, shared=4), [tmp_path / "one"])
    save_added(expert("choose", weights=((2, 1.0),)), {}, tmp_path / "two", base_model="base")
    with pytest.raises(DataError, match="routed experts that its model does not have"):
        load_terms(model(micro_model, experts=0), read_added(tmp_path / "two"), tmp_path / "two")
    with pytest.raises(DataError, match="two added experts are named"):
        attach(recogniser, [tmp_path / "one", tmp_path / "one"])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"name": "x"}',
        json.dumps({"name": 3}),
        json.dumps(asdict(expert(name="../up"))),
        json.dumps(asdict(expert(column="text"))),
    ],
)
def test_a_damaged_description_is_refused(tmp_path, text):
    (tmp_path / ADDED).write_text(text)
    with pytest.raises(DataError, match=ADDED):
        read_added(tmp_path)
