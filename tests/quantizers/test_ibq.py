from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.ibq import IBQ

WEIGHTS = ("index_weight", "codebook_weight", "commitment_weight", "entropy_weight")


def make(**options):
    return IBQ(**({"num_codewords": 16, "embedding_dim": 5} | options), rngs=nnx.Rngs(0))


def only(name=None, value=1.0):
    """The weights of the losses, all 0 but that of ``name``."""
    return dict.fromkeys(WEIGHTS, 0.0) | ({name: value} if name else {})


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_gradients(quantizer):
    """``(z, weights) -> (output, gradients of sum(weights * z_q) + loss)`` with respect to codebook and latents."""
    graph, params = nnx.split(quantizer)

    def scalar(params, z, weights):
        output = nnx.merge(graph, params)(z)
        return jnp.sum(weights * output.z_q) + output.loss, output

    step = jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))

    def call(z, weights, params=params):
        (to_params, to_z), output = step(params, z, weights)
        return output, to_params["codebook"][...], to_z

    return call


def paper(z, codebook, weights, temperature):
    """The paper's forward pass written out in PyTorch: token ids, z_q, losses by name, their weighted sum."""
    logits = torch.einsum("...d,kd->...k", z, codebook)
    soft = torch.softmax(logits, dim=-1)
    token_ids = soft.argmax(dim=-1)
    hard = torch.nn.functional.one_hot(token_ids, codebook.shape[0]).to(z)
    z_q = (hard - soft.detach() + soft) @ codebook
    z_q_hard = hard @ codebook

    p = torch.softmax(logits.reshape(-1, codebook.shape[0]) / temperature, dim=-1)
    entropy = torch.special.entr(p).sum(dim=-1).mean() - torch.special.entr(p.mean(dim=0)).sum()
    losses = {
        "index": torch.mean((z_q - z) ** 2),
        "codebook": torch.mean((z.detach() - z_q_hard) ** 2),
        "commitment": torch.mean((z - z_q_hard.detach()) ** 2),
        "entropy": entropy,
    }
    return token_ids, z_q, losses, sum(weights[f"{name}_weight"] * value for name, value in losses.items())


@pytest.mark.parametrize(
    "options",
    # At the default temperature of 0.01 probabilities underflow, and PyTorch's entr has no finite gradient there.
    [{"entropy_temperature": 0.5}] + [only(name) | {"entropy_temperature": 0.5} for name in (None, *WEIGHTS)],
    ids=["defaults", "z_q only", *WEIGHTS],
)
def test_outputs_and_gradients_are_those_of_the_formulas(options):
    quantizer, z, weights = make(**options), normal(1, 3, 7, 5), normal(2, 3, 7, 5)
    output, to_codebook, to_z = with_gradients(quantizer)(z, weights)

    codebook = torch.tensor(np.asarray(quantizer.codebook[...]), dtype=torch.float64, requires_grad=True)
    z_torch = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    loss_weights = {name: getattr(quantizer, name) for name in WEIGHTS}
    token_ids, z_q, losses, loss = paper(z_torch, codebook, loss_weights, quantizer.entropy_temperature)
    ((torch.tensor(weights) * z_q).sum() + loss).backward()

    np.testing.assert_array_equal(output.token_ids, token_ids)
    np.testing.assert_allclose(output.z_q, z_q.detach(), atol=1e-5)
    assert set(output.losses) == set(losses) - ({"entropy"} if quantizer.entropy_weight == 0 else set())
    for name, value in output.losses.items():
        np.testing.assert_allclose(value, losses[name].detach(), rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(output.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_z, z_torch.grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_codebook, codebook.grad, rtol=1e-5, atol=1e-5)


def test_the_default_weights_are_those_that_the_docstring_names():
    quantizer = make()
    assert [getattr(quantizer, name) for name in WEIGHTS] == [1.0, 1.0, 0.25, 0.05]
    assert quantizer.entropy_temperature == 0.01


@pytest.mark.parametrize("shape", [(5,), (50, 5), (2, 3, 4, 5)], ids=str)
def test_dequantize_returns_what_the_call_returned_to_the_bit(shape):
    quantizer, z = make(), normal(3, *shape)
    graph, state = nnx.split(quantizer)
    output = jax.jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)
    token_ids = jax.jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, z)
    np.testing.assert_array_equal(token_ids, output.token_ids)
    assert token_ids.dtype == output.token_ids.dtype == jnp.int32
    np.testing.assert_array_equal(
        jax.jit(lambda state, i: nnx.merge(graph, state).dequantize(i))(state, token_ids), output.z_q
    )
    np.testing.assert_array_equal(output.z_q, np.asarray(quantizer.codebook[...])[np.asarray(token_ids)])
    assert output.z_q.shape == shape


def test_codes_are_chosen_by_inner_product():
    quantizer = make(num_codewords=4, embedding_dim=2)
    quantizer.codebook[...] = jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0], [9.0, 1.0]])
    z = jnp.array([[1.0, 0.1], [-0.1, 2.0], [0.0, 0.0]])  # the first is nearer to code 0; ties go to the lowest id
    np.testing.assert_array_equal(quantizer.quantize(z), [2, 1, 0])


def test_the_tasks_gradient_reaches_every_code():
    quantizer, z = make(**only()), 0.3 * normal(1, 4, 5)
    output, to_codebook, to_z = with_gradients(quantizer)(z, normal(2, 4, 5))
    assert len(np.unique(output.token_ids)) < 16
    assert (np.linalg.norm(to_codebook, axis=-1) > 1e-4).all()
    assert (np.linalg.norm(to_z, axis=-1) > 1e-4).all()


def test_every_loss_moves_what_it_should():
    z, none = 0.3 * normal(1, 12, 5), np.zeros((12, 5), np.float32)

    def gradient_norms(name):
        output, to_codebook, to_z = with_gradients(make(**only(name), entropy_temperature=1.0))(z, none)
        return output, np.linalg.norm(to_codebook, axis=-1), np.linalg.norm(to_z, axis=-1)

    for name in ("index_weight", "entropy_weight"):  # through the soft assignment: everything
        _, of_codes, of_latents = gradient_norms(name)
        assert (of_codes > 1e-6).all() and (of_latents > 1e-6).all()
    output, of_codes, of_latents = gradient_norms("codebook_weight")
    used = np.isin(np.arange(16), output.token_ids)
    assert 0 < used.sum() < 16
    np.testing.assert_array_equal(of_codes > 0, used)
    np.testing.assert_array_equal(of_latents, 0.0)
    _, of_codes, of_latents = gradient_norms("commitment_weight")
    np.testing.assert_array_equal(of_codes, 0.0)
    assert (of_latents > 0).all()


@pytest.mark.parametrize("name", ["index_weight", "entropy_weight"])
def test_minimising_a_loss_spreads_the_use_of_codes(name):
    quantizer = make(**only(name), entropy_temperature=1.0)
    z = normal(1, 128, 5) + np.float32([2.0, 0.0, 0.0, 0.0, 0.0])
    params = nnx.state(quantizer)
    params["codebook"][...] = (
        (0.3 * params["codebook"][...]).at[0].set(2.0 * jnp.eye(5)[0])
    )  # one code takes nearly all
    call, losses, entropies = with_gradients(quantizer), [], []
    for _ in range(60):
        output, to_codebook, _ = call(z, np.zeros_like(z), params)
        shares = np.bincount(output.token_ids, minlength=16) / 128
        losses.append(output.loss)
        entropies.append(-np.sum(shares * np.log(np.maximum(shares, 1e-9))))
        params = jax.tree.map(lambda x, step=to_codebook: x - 3.0 * step, params)
    assert losses[-1] < losses[0] - 0.3
    assert entropies[-1] > entropies[0] + 1.0


def test_eight_devices_compute_what_one_does():
    call = with_gradients(make(entropy_temperature=0.5))
    z, weights = normal(1, 16, 3, 5), normal(2, 16, 3, 5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    one, eight = call(z, weights), call(jax.device_put(z, shards), jax.device_put(weights, shards))
    assert len(eight[0].z_q.sharding.device_set) == 8
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), eight, one)


def test_bfloat16_is_computed_on_in_float32():
    call, none = with_gradients(make()), np.zeros((30, 5), np.float32)
    z = jnp.asarray(normal(1, 30, 5), jnp.bfloat16)
    output, to_codebook, _ = call(z, none)
    expected, to_codebook_expected, _ = call(z.astype(jnp.float32), none)
    assert output.z_q.dtype == output.loss.dtype == output.z_e.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, output, expected)
    np.testing.assert_array_equal(to_codebook, to_codebook_expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_codewords", 1), ("embedding_dim", 0), ("entropy_temperature", 0.0), *((name, -1.0) for name in WEIGHTS)],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"ibq.{name} is {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="IBQ: latents are 6 wide, but embedding_dim is 5"):
        getattr(make(), method)(jnp.zeros((3, 6)))
