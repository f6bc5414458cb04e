"""The Fréchet distance in closed form and by SciPy's root; the statistics by NumPy."""

import jax
import numpy as np
import pytest
from scipy.linalg import sqrtm

from vgpt_jax.errors import UserError
from vgpt_jax.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance
from vgpt_jax.training.sharding import make_mesh


def covariance(rng, rank, width):
    root = rng.normal(size=(width, rank))
    return root @ root.T / rank


def test_distances_in_closed_form():
    rng = np.random.default_rng(0)
    variances1, variances2 = rng.uniform(0, 3, 5), rng.uniform(0, 3, 5)
    mean1, mean2 = rng.normal(size=5), rng.normal(size=5)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]  # covariances with the same axes commute
    cov1, cov2 = (turn @ np.diag(v) @ turn.T for v in (variances1, variances2))
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((np.sqrt(variances1) - np.sqrt(variances2)) ** 2)
    np.testing.assert_allclose(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-12)
    np.testing.assert_allclose(frechet_distance(mean1, cov1, mean2, cov1), np.sum((mean1 - mean2) ** 2), rtol=1e-12)
    np.testing.assert_allclose(frechet_distance([1.0], [[4.0]], [3.0], [[25.0]]), 4.0 + 9.0)


def test_distances_are_scipys():
    rng = np.random.default_rng(1)
    mean1, mean2 = rng.normal(size=(2, 12))
    cov1, cov2 = covariance(rng, 20, 12), covariance(rng, 15, 12)
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real)
    np.testing.assert_allclose(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(mean2, cov2, mean1, cov1), expected, rtol=1e-9)


def test_covariances_without_an_inverse():
    rng = np.random.default_rng(2)
    mean, cov = np.zeros(60), covariance(rng, 7, 60)  # seven examples of sixty features
    assert frechet_distance(mean, cov, mean, cov) < 1e-12
    np.testing.assert_allclose(frechet_distance(mean, cov, mean, np.zeros((60, 60))), np.trace(cov), rtol=1e-12)
    np.testing.assert_allclose(frechet_distance(mean, cov, mean, 4 * cov), np.trace(cov), rtol=1e-12)


def test_what_has_no_distance():
    ones, eye = np.ones(3), np.eye(3)
    for arguments in ((ones, eye, np.ones(4), np.eye(4)), (ones, np.ones((3, 2)), ones, eye), (eye, eye, ones, eye)):
        with pytest.raises(UserError, match="do not fit: they must be of the same features"):
            frechet_distance(*arguments)
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(ones, eye, ones * np.nan, eye)


def test_statistics_in_pieces_are_numpys():
    features = 1e4 + np.random.default_rng(3).normal(size=(23, 4)) * [1.0, 1e-3, 5.0, 0.0]
    pieces = [FeatureStatistics.of(features[a:b]) for a, b in ((0, 1), (1, 9), (9, 9), (9, 23))]
    total = sum(pieces[1:], pieces[0])
    assert total.count == 23
    np.testing.assert_allclose(total.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-12)
    backwards = sum(pieces[:-1], pieces[-1])
    np.testing.assert_allclose(backwards.covariance, total.covariance, rtol=1e-6, atol=1e-12)
    with pytest.raises(UserError, match="at least 2 pictures of each set, but there are 1"):
        _ = pieces[0].covariance
    assert (pieces[2] + pieces[2]).count == 0


def test_statistics_of_batches_leave_out_what_is_masked():
    mesh = make_mesh()
    rng = np.random.default_rng(4)
    images = rng.normal(size=(3, 8, 2, 2, 3)).astype(np.float32)
    mask = np.array([[True] * 8, [True] * 8, [True] * 3 + [False] * 5])
    images[2, 5] = np.nan  # of an example that does not count
    weights = rng.normal(size=(12, 5)).astype(np.float32)
    batches = [{"image": x, "mask": m} for x, m in zip(images, mask, strict=True)]

    def features(state, batch):
        return jax.numpy.maximum(batch["image"].reshape(8, 12) @ state, 0.0)

    found = feature_statistics(features, weights, iter(batches), mesh)
    expected = np.maximum(images[mask].reshape(-1, 12) @ weights, 0.0)
    assert found.count == 19
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="needs pictures, but there are none"):
        feature_statistics(features, weights, [], mesh)
    batches[0]["image"] = images[2]
    with pytest.raises(UserError, match="features of some pictures are no finite numbers"):
        feature_statistics(features, weights, batches, mesh)
