"""Fewer dimensions: PCA against scikit-learn, UMAP in a process of its own, and a plane to draw in."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from common.clustering.reduction import _numba_cache, project, reduce_dimensions
from tests.common.clustering.test_cluster import blobs


def test_pca_equals_scikit_learn_up_to_its_signs(monkeypatch):
    points_ND, _ = blobs(5, 60, D=30)
    points_ND += 1000.0  # a mean far larger than the spread
    monkeypatch.setattr("common.clustering.reduction.CHUNK", 37)
    ours_NP = reduce_dimensions(points_ND, method="pca", dim=7, seed=0)
    theirs_NP = PCA(7, svd_solver="full").fit_transform(points_ND.astype(np.float64))
    np.testing.assert_allclose(np.abs(ours_NP), np.abs(theirs_NP), atol=2e-3)


def test_pca_reads_a_memory_map_and_does_not_depend_on_the_sign_of_the_solver(tmp_path, monkeypatch):
    points_ND, _ = blobs(3, 40)
    np.save(tmp_path / "points.npy", points_ND)
    mapped_ND = np.load(tmp_path / "points.npy", mmap_mode="r")
    first_NP = reduce_dimensions(mapped_ND, method="pca", dim=4, seed=0)
    from scipy import linalg

    eigh = linalg.eigh
    monkeypatch.setattr(
        linalg, "eigh", lambda *args, **options: (eigh(*args, **options)[0], -eigh(*args, **options)[1])
    )
    np.testing.assert_array_equal(first_NP, reduce_dimensions(points_ND, method="pca", dim=4, seed=0))


@pytest.mark.parametrize(("N", "D", "dim", "width"), [(10, 30, 50, 9), (40, 6, 50, 6), (40, 6, 3, 3)])
def test_a_width_that_the_data_cannot_fill_is_lowered(N, D, dim, width):
    points_ND = np.random.default_rng(0).normal(size=(N, D))
    assert reduce_dimensions(points_ND, method="pca", dim=dim, seed=0).shape == (N, width)


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize(("N", "D"), [(2, 1), (4, 3), (6, 1), (60, 12)])
def test_every_size_can_be_drawn_and_the_same_way_twice(method, N, D):
    points_ND = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    first_N2, second_N2 = (project(points_ND, method=method, seed=1) for _ in range(2))
    assert first_N2.shape == (N, 2)
    assert np.isfinite(first_N2).all()
    np.testing.assert_array_equal(first_N2, second_N2)


def test_umap_keeps_groups_apart_on_a_plane_and_in_a_reduction():
    points_ND, truth_N = blobs(3, 15, apart=30.0)
    first_N2, second_N2 = (project(points_ND, method="umap", seed=1) for _ in range(2))
    np.testing.assert_array_equal(first_N2, second_N2)
    reduced_NP = reduce_dimensions(points_ND, method="umap", dim=3, seed=1)
    assert reduced_NP.shape == (45, 3)
    for points_NP in (first_N2, reduced_NP):
        centre_GP = np.stack([points_NP[truth_N == g].mean(0) for g in range(3)])
        nearest_N = np.linalg.norm(points_NP[:, None] - centre_GP, axis=2).argmin(1)
        np.testing.assert_array_equal(nearest_N, truth_N)
    assert project(points_ND[:6], method="umap", seed=1).shape == (6, 2)


def test_the_compiler_cache_goes_where_it_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert _numba_cache() == tmp_path / "cache" / "moe-asr" / "numba"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert str(_numba_cache()).startswith(str(tmp_path / "moe-asr-numba-"))
