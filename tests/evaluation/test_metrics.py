import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vgpt_jax.evaluation.metrics import code_counts, codebook_metrics, entropy, psnr, ssim


@pytest.fixture(scope="module")
def pairs():
    """Three pictures and worse versions of them: one slightly, one badly, one not at all."""
    rng = np.random.default_rng(0)
    references = rng.uniform(size=(3, 24, 20, 3)).astype(np.float32)
    noise = rng.normal(size=references.shape) * np.array([0.02, 0.3, 0.0])[:, None, None, None]
    return np.clip(references + noise, 0, 1).astype(np.float32), references


def reference_ssim(image, reference):
    return structural_similarity(
        image, reference, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1
    )


def test_psnr_by_hand():
    images = jnp.stack([jnp.full((2, 2, 3), value) for value in (0.1, 0.5, 1.0)])
    np.testing.assert_allclose(jax.jit(psnr)(images, jnp.zeros_like(images)), [20.0, 6.0206, 0.0], atol=1e-4)


def test_psnr_of_equal_images_is_finite():
    images = jnp.ones((2, 4, 4, 3))
    np.testing.assert_allclose(jax.jit(psnr)(images, images), [100.0, 100.0], atol=1e-3)


def test_psnr_is_that_of_skimage(pairs):
    images, references = (x[:2] for x in pairs)
    expected = [peak_signal_noise_ratio(r, i, data_range=1.0) for i, r in zip(images, references, strict=True)]
    np.testing.assert_allclose(jax.jit(psnr)(images, references), expected, atol=1e-4)


def test_ssim_is_that_of_skimage(pairs):
    images, references = pairs
    expected = [reference_ssim(i, r) for i, r in zip(images, references, strict=True)]
    assert expected[2] == pytest.approx(1.0)
    np.testing.assert_allclose(jax.jit(ssim)(images, references), expected, atol=1e-4)


def test_ssim_of_flat_and_nearly_flat_pictures_is_that_of_skimage():
    # Bright and without contrast: the variances are differences of nearly equal numbers.
    rng = np.random.default_rng(1)
    flat = np.ones((16, 16, 3))
    images = np.stack([0.9 * flat, flat, 0.9 + 0.001 * rng.uniform(size=flat.shape)]).astype(np.float32)
    references = np.stack([0.4 * flat, flat, 0.9 + 0.001 * rng.uniform(size=flat.shape)]).astype(np.float32)
    # scikit-image computes in the precision it is given, and so would err as much in float32.
    pairs = zip(images.astype(np.float64), references.astype(np.float64), strict=True)
    expected = [reference_ssim(i, r) for i, r in pairs]
    np.testing.assert_allclose(jax.jit(ssim)(images, references), expected, atol=1e-4)


def test_ssim_does_not_mix_the_batch(pairs):
    images, references = pairs
    whole = jax.jit(ssim)(images, references)
    single = [float(jax.jit(ssim)(images[i : i + 1], references[i : i + 1])[0]) for i in range(3)]
    np.testing.assert_allclose(whole, single, atol=1e-6)


def test_ssim_of_images_smaller_than_its_window_is_refused():
    images = jnp.ones((1, 8, 16, 3))
    with pytest.raises(ValueError, match="11"):
        ssim(images, images)


def test_code_counts_by_hand():
    ids = jnp.array([[[0, 1], [1, 1]], [[3, 3], [0, 3]]])
    counts = jax.jit(code_counts, static_argnums=1)(ids, 5)
    np.testing.assert_array_equal(counts, [[1, 3, 0, 0, 0], [1, 0, 0, 3, 0]])


def test_code_counts_are_those_of_bincount():
    ids = np.random.default_rng(0).integers(0, 17, (4, 6, 6))
    counts = jax.jit(code_counts, static_argnums=1)(jnp.asarray(ids), 17)
    np.testing.assert_array_equal(counts, [np.bincount(example.ravel(), minlength=17) for example in ids])


def test_entropy_by_hand():
    assert entropy(np.array([5.0, 5.0])) == pytest.approx(np.log(2))
    assert entropy(np.array([0.0, 9.0, 0.0])) == 0.0
    assert entropy(np.array([2, 1, 1])) == pytest.approx(1.5 * np.log(2))


def test_codebook_metrics_by_hand():
    metrics = codebook_metrics(np.array([2, 1, 1, 0]))
    # Shares of 1/2, 1/4, 1/4 have an entropy of 1.5 bits; four codes can have 2 bits.
    assert metrics == {"code_use": 0.75, "perplexity": pytest.approx(2**1.5), "code_entropy": pytest.approx(0.75)}


def test_codebook_metrics_of_an_even_and_of_a_collapsed_codebook():
    even, collapsed = codebook_metrics(np.full(8, 3.0)), codebook_metrics(np.eye(8)[2])
    assert even == {"code_use": 1.0, "perplexity": pytest.approx(8.0), "code_entropy": pytest.approx(1.0)}
    assert collapsed == {"code_use": 0.125, "perplexity": pytest.approx(1.0), "code_entropy": pytest.approx(0.0)}
