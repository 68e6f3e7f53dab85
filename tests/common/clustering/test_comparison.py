"""Ways of clustering side by side, on points whose groups are known and on a micro encoder."""

import numpy as np
import pytest
import torch

from common.clustering.comparison import compare_clusterings, embed_layers
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import read_corpus
from common.data.features import log_mel
from common.data.tokens import load_codec
from common.errors import DataError
from common.model.recogniser import Recogniser
from common.model.whisper import encode, encode_layers, load_whisper
from common.training.train import make_accelerator

OPTIONS = {"num_clusters": 3, "reduce_dim": 5, "min_cluster_size": 5, "min_samples": 5, "seed": 1}


def blobs(spread: float, *, per_group: int = 30) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Three groups of points with two speakers each, who do not differ."""
    generator = np.random.default_rng(0)
    centres = 4 * np.eye(3, 12)
    points = np.concatenate([generator.normal(centre, spread, (per_group, 12)) for centre in centres])
    names = [name for name in "abc" for _ in range(per_group)]
    speakers = [f"{name}{i % 2}" for i, name in enumerate(names)]
    return points.astype(np.float32), {"etiology": names, "speaker": speakers}


def test_clear_groups_are_found_and_named_in_every_way():
    points, groups = blobs(0.2)
    rows = compare_clusterings({(-1, "mean"): points}, groups, OPTIONS, reductions=("none", "pca"))
    assert [(row["reduce"], row["algorithm"]) for row in rows] == [
        (reduce, algorithm) for reduce in ("none", "pca") for algorithm in ("hdbscan", "spectral", "etiology")
    ]
    for row in rows:
        assert (row["layer"], row["pooling"], row["clusters"]) == (-1, "mean", 3)
        assert row["etiology"] == pytest.approx(1.0)
        assert row["speaker"] < 0.75
        assert row["silhouette"] > 0.6


def test_a_space_without_groups_scores_lower_everywhere():
    clear, groups = blobs(0.2)
    noise = np.random.default_rng(1).normal(size=clear.shape).astype(np.float32)
    points = {(1, "mean"): clear, (2, "mean"): noise}
    rows = compare_clusterings(points, groups, OPTIONS, reductions=("pca",))
    good, bad = (row for row in rows if row["algorithm"] == "spectral")
    assert (good["layer"], bad["layer"]) == (1, 2)
    assert bad["etiology"] < 0.2 < good["etiology"]
    assert bad["silhouette"] < good["silhouette"]


def test_one_etiology_is_no_clustering_and_failures_are_rows():
    points, groups = blobs(0.2, per_group=1)
    groups["etiology"] = ["x"] * 3
    rows = compare_clusterings({(0, "max"): points}, groups, OPTIONS | {"num_clusters": 9}, reductions=("none",))
    assert [row["algorithm"] for row in rows] == ["hdbscan", "spectral"]
    assert all("9 experts for 3 utterances" in row["problem"] for row in rows)


@pytest.fixture(scope="module")
def encoder(micro_model, tones):
    corpus = read_corpus(tones)
    examples = make_examples(corpus, corpus.split("test")[:6], load_codec(micro_model), context="dynamic", margin=64)
    loader = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))
    return Recogniser(load_whisper(micro_model)).eval(), examples, loader


def test_one_pass_gives_every_layer(encoder):
    recogniser, _, loader = encoder
    batch = next(iter(loader([[0, 1]])))
    mel_BMF = log_mel(batch.audio_BS, recogniser.mel_bands)
    with torch.inference_mode():
        hidden_by_layer = encode_layers(recogniser.whisper, mel_BMF, [2, 0, -1, 1])
        assert list(hidden_by_layer) == [2, 0, -1, 1]
        for layer, hidden_BTD in hidden_by_layer.items():
            torch.testing.assert_close(hidden_BTD, encode(recogniser.whisper, mel_BMF, layer=layer))
    for wrong in ([3], [-2], [0, 7]):
        with pytest.raises(DataError, match="the encoder has 2 blocks"):
            encode_layers(recogniser.whisper, mel_BMF, wrong)
        with pytest.raises(DataError, match="the encoder has 2 blocks"):
            encode(recogniser.whisper, mel_BMF, layer=wrong[-1])


def test_embeddings_of_many_layers_equal_those_of_the_extract_stage(encoder):
    recogniser, examples, loader = encoder
    embeddings = embed_layers(
        recogniser,
        examples,
        loader,
        make_accelerator("fp32", "cpu"),
        layers=[1, -1],
        poolings=["mean", "meanstd"],
        batch_seconds=5,
    )
    assert {source: rows.shape for source, rows in embeddings.items()} == {
        (1, "mean"): (6, 32),
        (1, "meanstd"): (6, 64),
        (-1, "mean"): (6, 32),
        (-1, "meanstd"): (6, 64),
    }
    with torch.inference_mode():
        for number in range(len(examples)):
            batch = next(iter(loader([[number]])))
            for (layer, pooling), rows_ND in embeddings.items():
                expected_BD = recogniser.frozen_embedding(batch, layer=layer, pooling=pooling)
                np.testing.assert_allclose(rows_ND[number], expected_BD[0].numpy(), rtol=1e-3, atol=1e-4)
