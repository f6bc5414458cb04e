import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to as peer_rotate_to

from vgpt_jax.quantizers.rotation import rotate_to


@jax.jit
def with_gradients(z, codes, gradient):
    """``rotate_to``, and what of ``gradient`` reaches latents and codes."""
    value, pull_back = jax.vjp(rotate_to, z, codes)
    return value, *pull_back(gradient)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotation_matrix(z, code):
    """The rescaled rotation ``lambda R`` in float64, by Rodrigues' formula from its generator."""
    z, code = np.asarray(z, np.float64), np.asarray(code, np.float64)
    u, q = z / np.linalg.norm(z), code / np.linalg.norm(code)
    generator = np.outer(q, u) - np.outer(u, q)
    rotation = np.eye(len(z)) + generator + generator @ generator / (1.0 + u @ q)
    return np.linalg.norm(code) / np.linalg.norm(z) * rotation


def test_value_and_gradient_are_those_of_the_peer():
    z, codes, gradient = normal(0, 5, 4, 7), normal(1, 5, 4, 7), normal(2, 5, 4, 7)
    value, to_z, _ = with_gradients(z, codes, gradient)
    z_torch = torch.tensor(z, requires_grad=True)
    expected = peer_rotate_to(z_torch, torch.tensor(codes))
    expected.backward(torch.tensor(gradient))
    np.testing.assert_allclose(value, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(to_z, z_torch.grad, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_constant_matrix():
    z, codes, gradient = normal(0, 20, 6), 3.0 * normal(1, 20, 6), normal(2, 20, 6)
    _, to_z, _ = with_gradients(z, codes, gradient)
    for m in range(20):
        matrix = rotation_matrix(z[m], codes[m])
        np.testing.assert_allclose(matrix @ z[m], codes[m], atol=1e-5)  # it is the map that the docstring speaks of
        np.testing.assert_allclose(to_z[m], matrix.T @ gradient[m], rtol=1e-4, atol=1e-4)  # |lambda| is up to 5


def test_gradients_keep_their_angle_and_are_rescaled():
    z, codes, gradient = normal(0, 30, 5), normal(1, 30, 5), normal(2, 30, 5)
    _, to_z, _ = with_gradients(z, codes, gradient)

    def cosine(a, b):
        return np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    np.testing.assert_allclose(cosine(to_z, z), cosine(gradient, codes), atol=1e-5)
    scale = np.linalg.norm(codes, axis=-1) / np.linalg.norm(z, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(to_z, axis=-1), scale * np.linalg.norm(gradient, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_value_is_the_code_to_the_bit(scale):
    z, codes = normal(0, 64, 8) * scale, normal(1, 64, 8)
    np.testing.assert_array_equal(with_gradients(z, codes, z)[0], codes)


def test_no_gradient_reaches_the_codes():
    _, to_z, to_codes = with_gradients(normal(0, 9, 4), normal(1, 9, 4), normal(2, 9, 4))
    np.testing.assert_array_equal(to_codes, 0.0)
    assert (np.linalg.norm(to_z, axis=-1) > 0).all()


def test_vectors_without_a_direction():
    z, codes, gradient = normal(0, 3, 4), normal(1, 3, 4), normal(2, 3, 4)
    z[0], codes[1], z[2], codes[2] = 0.0, 0.0, 0.0, 0.0
    value, to_z, _ = with_gradients(z, codes, gradient)
    np.testing.assert_array_equal(value, codes)
    np.testing.assert_array_equal(to_z[0], gradient[0])  # straight through
    np.testing.assert_array_equal(to_z[1], 0.0)  # lambda is 0
    np.testing.assert_array_equal(to_z[2], gradient[2])


def test_a_latent_opposite_to_its_code_gets_a_reflection():
    codes, gradient = normal(1, 20, 4), normal(2, 20, 4)
    value, to_z, _ = with_gradients(-2.0 * codes, codes, gradient)
    unit = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    reflected = gradient - 2.0 * unit * np.sum(unit * gradient, axis=-1, keepdims=True)
    np.testing.assert_array_equal(value, codes)
    np.testing.assert_allclose(to_z, 0.5 * reflected, atol=1e-5)


def test_gradients_stay_bounded_near_the_opposite():
    codes, gradient = normal(1, 60, 4), normal(2, 60, 4)
    distances = np.repeat(np.float32([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]), 10)[:, None]
    _, to_z, _ = with_gradients(distances * normal(3, 60, 4) - codes, codes, gradient)
    assert (np.linalg.norm(to_z, axis=-1) < 3.0 * np.linalg.norm(gradient, axis=-1)).all()


def test_a_latent_that_is_its_code_gets_the_gradient_as_it_is():
    codes, gradient = normal(1, 20, 4), normal(2, 20, 4)
    _, to_z, _ = with_gradients(codes, codes, gradient)
    np.testing.assert_allclose(to_z, gradient, atol=1e-6)


def test_bfloat16_is_computed_on_in_float32():
    z, codes, gradient = jnp.asarray(normal(0, 9, 4), jnp.bfloat16), normal(1, 9, 4), normal(2, 9, 4)
    value, to_z, _ = with_gradients(z, codes, gradient)
    expected, to_z_expected, _ = with_gradients(z.astype(jnp.float32), codes, gradient)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(to_z, to_z_expected.astype(jnp.bfloat16))
