from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vector_quantize_pytorch.vector_quantize_pytorch import directional_reparam as peer_directional_reparam

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.diveq import DiVeQ, directional_reparam
from vgpt_jax.quantizers.surgery import init_from_latents


def make(**options):
    return DiVeQ(**({"num_codewords": 8, "embedding_dim": 4} | options), rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nearest(z, codes):
    z, codes = np.asarray(z, np.float64), np.asarray(codes, np.float64)
    return np.argmin(np.sum((z[..., None, :] - codes) ** 2, axis=-1), axis=-1)


@jit
def reparam_gradients(z, codes, noise, gradient):
    """``directional_reparam``, and what of ``gradient`` reaches latents, codes and noise."""
    value, pull_back = jax.vjp(directional_reparam, z, codes, noise)
    return value, *pull_back(gradient)


def with_gradients(quantizer):
    """``(z, key, weights) -> (output, gradients of sum(weights * z_q) + loss)`` with respect to codebook and latents."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)

    def scalar(params, z, key, weights):
        output = nnx.merge(graph, params, buffers)(z, key)
        return jnp.sum(weights * output.z_q) + output.loss, output

    step = jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))

    def call(z, key, weights, params=params):
        (to_params, to_z), output = step(params, z, key, weights)
        return output, to_params["codebook"][...], to_z

    return call


def training_step(quantizer):
    """One jitted step without an optimizer, forward pass then surgery: ``(state, z, key) -> (state, output)``."""
    graph, state = nnx.split(quantizer)

    def step(state, z, key):
        quantizer = nnx.merge(graph, state)
        output = quantizer(z, key)
        quantizer.surgery(output, key)
        return nnx.state(quantizer), output

    return jit(step), state


# The estimator


@pytest.mark.parametrize("variance", [5e-3, 1.0])
def test_the_estimator_and_its_gradients_are_those_of_the_peer(variance):
    z, codes, gradient = normal(0, 5, 6, 4), normal(1, 5, 6, 4), normal(2, 5, 6, 4)
    z_torch, codes_torch = (torch.tensor(x, requires_grad=True) for x in (z, codes))
    torch.manual_seed(0)
    noise = variance**0.5 * torch.randn(5, 6, 4)
    torch.manual_seed(0)  # the peer draws the same
    expected = peer_directional_reparam(z_torch, codes_torch, variance)
    expected.backward(torch.tensor(gradient))
    value, to_z, to_codes, _ = reparam_gradients(z, codes, noise.numpy(), gradient)
    np.testing.assert_allclose(value, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(to_z, z_torch.grad, atol=1e-5)
    np.testing.assert_allclose(to_codes, codes_torch.grad, atol=1e-5)


def test_the_estimator_by_hand():
    z, codes, noise = jnp.array([[1.0, 1.0]]), jnp.array([[4.0, 5.0]]), jnp.array([[-3.0, 8.0]])
    value, to_z, to_codes, to_noise = reparam_gradients(z, codes, noise, jnp.array([[2.0, 10.0]]))
    np.testing.assert_allclose(value, [[1.0, 6.0]], atol=1e-6)  # five steps upwards instead of to (4, 5)
    np.testing.assert_allclose(to_codes, [[6.0, 8.0]], atol=1e-5)  # what lengthens the way, 10, along (3, 4) / 5
    np.testing.assert_allclose(to_z, [[-4.0, 2.0]], atol=1e-5)  # the gradient itself less that
    np.testing.assert_array_equal(to_noise, 0.0)


def test_the_estimator_is_as_far_away_as_the_code():
    z, codes = normal(0, 30, 4), normal(1, 30, 4)
    value, *_ = reparam_gradients(z, codes, normal(2, 30, 4), z)
    np.testing.assert_allclose(np.linalg.norm(value - z, axis=-1), np.linalg.norm(codes - z, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_latent_that_is_its_code_keeps_its_value_and_gradient(noise):
    z, gradient = normal(0, 3, 4), normal(1, 3, 4)
    value, to_z, to_codes, _ = reparam_gradients(z, z, noise * normal(2, 3, 4), gradient)
    np.testing.assert_array_equal(value, z)
    np.testing.assert_array_equal(to_z, gradient)
    np.testing.assert_array_equal(to_codes, 0.0)


# The forward pass


@pytest.mark.parametrize("shape", [(4,), (50, 4), (2, 3, 5, 4)], ids=str)
def test_in_evaluation_it_is_the_nearest_code_to_the_bit(shape):
    quantizer, z = make(), normal(3, *shape)
    graph, state = nnx.split(quantizer)
    output = jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)
    token_ids = jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, z)
    np.testing.assert_array_equal(token_ids, nearest(z, quantizer.codebook[...]))
    np.testing.assert_array_equal(token_ids, output.token_ids)
    assert token_ids.dtype == output.token_ids.dtype == jnp.int32
    dequantized = jit(lambda state, ids: nnx.merge(graph, state).dequantize(ids))(state, token_ids)
    np.testing.assert_array_equal(dequantized, output.z_q)
    np.testing.assert_array_equal(dequantized, np.asarray(quantizer.codebook[...])[np.asarray(token_ids)])
    assert output.z_q.shape == shape


def test_in_training_it_is_the_estimator_with_noise_of_that_variance():
    quantizer, z, weights, key = make(noise_variance=0.04), normal(1, 6, 5, 4), normal(2, 6, 5, 4), jax.random.key(7)
    output, to_codebook, to_z = with_gradients(quantizer)(z, key, weights)
    token_ids = nearest(z, quantizer.codebook[...])
    codes, noise = np.asarray(quantizer.codebook[...])[token_ids], 0.2 * jax.random.normal(key, z.shape)
    value, to_z_expected, to_codes, _ = reparam_gradients(z, codes, noise, weights)
    np.testing.assert_array_equal(output.token_ids, token_ids)
    np.testing.assert_allclose(output.z_q, value, atol=1e-6)
    np.testing.assert_allclose(to_z, to_z_expected, atol=1e-5)
    to_codebook_expected = np.zeros((8, 4), np.float32)
    np.add.at(to_codebook_expected, token_ids, to_codes)
    np.testing.assert_allclose(to_codebook, to_codebook_expected, atol=1e-5)
    assert output.losses == {}
    assert output.loss == 0.0 and output.loss.dtype == jnp.float32
    np.testing.assert_array_equal(output.z_e, z)


def test_the_noise_is_determined_by_the_key():
    call, z = with_gradients(make()), normal(1, 30, 4)
    first, again, other = (call(z, jax.random.key(seed), z)[0].z_q for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=-1).all()


def test_without_noise_the_gradient_is_that_of_the_length():
    quantizer, z, weights = make(), normal(1, 30, 4), normal(2, 30, 4)
    _, to_codebook, to_z = with_gradients(quantizer)(z, None, weights)
    codes = np.asarray(quantizer.codebook[...])[nearest(z, quantizer.codebook[...])]
    unit = (codes - z) / np.linalg.norm(codes - z, axis=-1, keepdims=True)
    along = np.sum(unit * weights, axis=-1, keepdims=True) * unit
    np.testing.assert_allclose(to_z, weights - along, atol=1e-5)
    np.testing.assert_allclose(np.sum(to_codebook, axis=0), np.sum(along, axis=0), atol=1e-5)


def test_only_chosen_codes_get_gradients():
    z = normal(1, 4, 4)
    output, to_codebook, to_z = with_gradients(make())(z, jax.random.key(0), normal(2, 4, 4))
    used = np.isin(np.arange(8), output.token_ids)
    assert 0 < used.sum() < 8
    np.testing.assert_array_equal(np.abs(to_codebook).max(axis=-1) > 0, used)
    assert (np.abs(to_z) > 0).all()


@pytest.mark.parametrize("replace_freq", [0, 5])
def test_the_tasks_loss_alone_teaches_the_codebook_if_dead_codes_are_replaced(replace_freq):
    """Eight clusters, and a task that wants the latents back: with a code in each its error is that of their width."""
    z = 2.0 * normal(1, 8, 4).repeat(8, axis=0) + 0.05 * normal(2, 64, 4)
    graph, params, buffers = nnx.split(
        make(num_codewords=16, init_method="kaiming", replace_freq=replace_freq), nnx.Param, ...
    )

    def error(params, buffers, key):
        output = nnx.merge(graph, params, buffers)(z, key)
        return jnp.mean((output.z_q - z) ** 2), output

    @jit
    def step(params, buffers, key):
        gradient, output = jax.grad(error, has_aux=True)(params, buffers, key)
        quantizer = nnx.merge(graph, jax.tree.map(lambda x, g: x - 4.0 * g, params, gradient), buffers)
        quantizer.surgery(output, key)
        _, params, buffers = nnx.split(quantizer, nnx.Param, ...)
        return params, buffers, error(params, buffers, None)[0]

    errors = []
    for i in range(100):
        params, buffers, after = step(params, buffers, jax.random.key(i))
        errors.append(after)
    assert errors[-1] < 0.5 * errors[0]
    assert (errors[-1] < 2.0 * 0.05**2) == (replace_freq > 0)


# Surgery


@pytest.mark.parametrize("replace_freq", [0, 1, 3])
def test_the_first_step_draws_the_codes_from_its_latents(replace_freq):
    step, state = training_step(make(replace_freq=replace_freq))
    z, key = normal(0, 5, 4, 4), jax.random.key(5)
    expected = init_from_latents(jax.random.split(key)[0], state["codebook"][...], z.reshape(20, 4), when=True)
    state, _ = step(state, z, key)
    np.testing.assert_array_equal(state["codebook"][...], expected)
    np.testing.assert_array_equal(state["countdown"][...], replace_freq)
    assert state["steps"][...] == 1
    state, _ = step(state, z[:1, :1], jax.random.key(6))
    if replace_freq != 1:  # one step is enough to be stale
        np.testing.assert_array_equal(state["codebook"][...], expected)


def test_kaiming_codes_stay_and_have_the_bound_of_he():
    quantizer = make(num_codewords=2000, embedding_dim=6, init_method="kaiming", replace_freq=0)
    before = np.asarray(quantizer.codebook[...])
    assert np.abs(before).max() <= 1.0  # sqrt(6 / 6)
    np.testing.assert_allclose(before.std(), 3.0**-0.5, rtol=0.05)
    step, state = training_step(quantizer)
    for i in range(3):
        state, _ = step(state, normal(i, 10, 6), jax.random.key(i))
    np.testing.assert_array_equal(state["codebook"][...], before)


@pytest.mark.parametrize("init_method", ["kaiming", "latent_random"])
def test_replacement_follows_the_countdown(init_method):
    step, state = training_step(make(num_codewords=32, replace_freq=3, init_method=init_method))
    countdown, num_replaced = np.full(32, 3), 0
    for i in range(30):
        z = normal(i, 6, 4) + 2.0 * normal(1000 + i // 5, 4)  # a cloud that moves on every fifth step
        codes = np.asarray(state["codebook"][...])
        state, output = step(state, z, jax.random.key(i))
        if i == 0 and init_method == "latent_random":
            continue
        now = np.asarray(state["codebook"][...])
        countdown = np.where(np.isin(np.arange(32), np.asarray(output.token_ids)), 3, countdown - 1)
        stale = countdown == 0
        countdown[stale] = 3
        np.testing.assert_array_equal((now != codes).any(axis=1), stale)
        np.testing.assert_array_equal(state["countdown"][...], countdown)
        for code in now[stale]:
            assert (np.linalg.norm(z - code, axis=1) < 0.04 * np.linalg.norm(z, axis=1)).any()
        num_replaced += stale.sum()
    assert 32 < num_replaced < 32 * 30 // 3


# Devices, types, and what a caller can get wrong


def test_eight_devices_compute_what_one_does():
    quantizer = make(num_codewords=24, replace_freq=2)
    call, (step, state) = with_gradients(quantizer), training_step(quantizer)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    states = [state, jax.device_put(state, NamedSharding(mesh, PartitionSpec()))]
    for i in range(4):  # draws, counts down, replaces
        z, weights, key = normal(i, 16, 2, 4), normal(10 + i, 16, 2, 4), jax.random.key(i)
        params = [nnx.State({"codebook": state["codebook"]}) for state in states]
        one = call(z, key, weights, params[0])
        eight = call(jax.device_put(z, shards), key, jax.device_put(weights, shards), params[1])
        assert len(eight[0].z_q.sharding.device_set) == 8
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), eight, one)
        before = np.asarray(states[0]["codebook"][...])
        states = [step(states[0], z, key)[0], step(states[1], jax.device_put(z, shards), key)[0]]
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), states[1], states[0])
    assert (np.asarray(states[0]["codebook"][...]) != before).any()  # the last step has replaced codes


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["evaluation", "training"])
def test_bfloat16_is_computed_on_in_float32(key):
    call, z = with_gradients(make()), jnp.asarray(normal(1, 30, 4), jnp.bfloat16)
    output, to_codebook, _ = call(z, key, normal(2, 30, 4))
    expected, to_codebook_expected, _ = call(z.astype(jnp.float32), key, normal(2, 30, 4))
    assert output.z_q.dtype == output.z_e.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, output, expected)
    np.testing.assert_array_equal(to_codebook, to_codebook_expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_codewords", 1),
        ("embedding_dim", 0),
        ("noise_variance", -0.1),
        ("replace_freq", -1),
        ("replace_noise", -0.1),
        ("init_method", "fixed"),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"diveq.{name} is {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="DiVeQ: latents are 5 wide, but embedding_dim is 4"):
        getattr(make(), method)(jnp.zeros((3, 5)))
