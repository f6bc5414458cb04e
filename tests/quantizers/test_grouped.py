from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vector_quantize_pytorch as peers
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.grouped import GroupedQuantize

G, K, D = 3, 8, 4  # D is the width of a group
INNER = {"num_codewords": K, "embedding_dim": D, "pretrain_steps": 0, "penalty_weight": 0.0, "init_method": "kaiming"}


def make(inner=None, **options):
    """Three groups of 8 codes, 4 wide each, without warm start, unless said otherwise."""
    defaults = {"num_groups": G, "quantizer_args": INNER | (inner or {})}
    return GroupedQuantize(**(defaults | options), rngs=nnx.Rngs(0))


def make_residual(num_quantizers=2, inner=None, quantizer_dropout=0.0, **options):
    arguments = {
        "num_quantizers": num_quantizers,
        "quantizer_dropout": quantizer_dropout,
        "quantizer_args": INNER | (inner or {}),
    }
    return make(quantizer="residual_quantize", quantizer_args=arguments, **options)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codebooks(quantizer):
    return [np.asarray(inner.codebook[...]) for inner in quantizer.quantizers]


def by_hand(z, books):
    """Ids ``[..., G]`` and codes ``[..., G D]``, searched for in float64."""
    groups = z.reshape(*z.shape[:-1], G, D)
    distances = [
        np.sum((groups[..., i, None, :].astype(np.float64) - book) ** 2, axis=-1) for i, book in enumerate(books)
    ]
    ids = np.stack([d.argmin(axis=-1) for d in distances], axis=-1)
    return ids, np.concatenate([book[ids[..., i]] for i, book in enumerate(books)], axis=-1)


def forward(quantizer, z, key=None):
    return _forward(*nnx.split(quantizer), z, key)


@partial(jit, static_argnums=0)
def _forward(graph, state, z, key):
    return nnx.merge(graph, state)(z, key)


def gradients(quantizer, z, z_q=0.0, key=None, **weights):
    """Gradients with respect to parameters and latents of the sum of ``z_q`` times its weights, and losses times theirs."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)
    weights = {name: weights.get(name, 0.0) for name in ("commitment", "codebook", "penalty", "entropy", "loss")}
    return _gradients(graph, params, z, buffers, jnp.broadcast_to(z_q, z.shape), key, weights)


@partial(jit, static_argnums=0)
@partial(jax.grad, argnums=(1, 2))
def _gradients(graph, params, z, buffers, z_q, key, weights):
    output = nnx.merge(graph, params, buffers)(z, key)
    losses = output.losses | {"loss": output.loss}
    return jnp.sum(z_q * output.z_q) + sum(weights[name] * losses[name] for name in losses if name in weights)


def training_step(quantizer):
    """One step without an optimizer, forward pass then surgery, ``(state, z, key) -> (state, output)``, and the state."""
    graph, state = nnx.split(quantizer)
    return partial(_training_step, graph), state


@partial(jit, static_argnums=0)
def _training_step(graph, state, z, key):
    quantizer = nnx.merge(graph, state)
    output = quantizer(z, key)
    quantizer.surgery(output, key)
    return nnx.state(quantizer), output


def book_gradients(params):
    return [np.asarray(params["quantizers"][i]["codebook"][...]) for i in sorted(params["quantizers"])]


@pytest.mark.parametrize("shared", [False, True])
def test_ids_codes_and_losses_match_numpy(shared):
    quantizer = make({"commitment_weight": 0.25, "codebook_weight": 2.0}, shared_codebook=shared)
    z = normal(1, 5, 6, G * D)
    output = forward(quantizer, z)
    assert len(quantizer.quantizers) == (1 if shared else G)
    ids, codes = by_hand(z, codebooks(quantizer) * (G if shared else 1))
    np.testing.assert_array_equal(output.token_ids, ids)
    assert output.token_ids.dtype == jnp.int32
    np.testing.assert_array_equal(output.z_q, codes)
    np.testing.assert_array_equal(output.z_e, z)
    for name in ("commitment", "codebook"):  # a mean over all of the latents
        np.testing.assert_allclose(output.losses[name], np.mean((z - codes) ** 2), rtol=1e-5)
    np.testing.assert_allclose(output.loss, 2.25 * np.mean((z - codes) ** 2), rtol=1e-5)
    assert (quantizer.num_codewords, quantizer.embedding_dim) == (K, G * D)
    assert quantizer.token_shape((6, 5)) == (6, 5, G)


@pytest.mark.parametrize("build", [make, make_residual])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("leading", [(), (2, 3, 4)], ids=str)
def test_call_quantize_and_dequantize_agree_to_the_bit(build, shared, leading):
    quantizer, z = build(shared_codebook=shared), normal(1, *leading, G * D)
    graph, state = nnx.split(quantizer)
    output = jax.jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)
    ids = jax.jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, z)
    codes = jax.jit(lambda state, ids: nnx.merge(graph, state).dequantize(ids))(state, ids)
    assert ids.shape == (*leading, G, 2)[: None if build is make_residual else -1]
    np.testing.assert_array_equal(ids, output.token_ids)
    np.testing.assert_array_equal(codes, output.z_q)


def test_bfloat16_latents_are_computed_on_in_float32():
    quantizer, low = make(), jnp.asarray(normal(1, 100, G * D), jnp.bfloat16)
    output, expected = forward(quantizer, low), forward(quantizer, low.astype(jnp.float32))
    for ours, theirs in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_what_is_not_written():
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    written = jnp.array([[True, True, False], [False, False, False]])
    quantizer = make()
    a, b, c = codebooks(quantizer)
    expected = [np.concatenate([a[1], b[2], c.mean(axis=0)]), np.concatenate([x.mean(axis=0) for x in (a, b, c)])]
    np.testing.assert_allclose(quantizer.dequantize_written(ids, written), expected, atol=1e-6)
    quantizer = make(shared_codebook=True)
    (a,) = codebooks(quantizer)
    expected = [np.concatenate([a[1], a[2], a.mean(axis=0)]), np.concatenate([a.mean(axis=0)] * G)]
    np.testing.assert_allclose(quantizer.dequantize_written(ids, written), expected, atol=1e-6)
    quantizer, ids = make_residual(), jnp.array([[[1, 2], [3, 4], [5, 6]]])
    there = jnp.array([[[True, True], [True, False], [False, False]]])
    (a, a_fine), (b, _), (c, _) = (codebooks(inner) for inner in quantizer.quantizers)
    expected = np.concatenate([a[1] + a_fine[2], b[3], c.mean(axis=0)])[None]
    np.testing.assert_allclose(quantizer.dequantize_written(ids, there), expected, atol=1e-6)


# The peers


@pytest.mark.parametrize("shared", [False, True])
def test_the_peer_with_heads(shared):
    quantizer, z = make(shared_codebook=shared), normal(1, 5, 6, G * D)
    theirs = peers.VectorQuantize(
        dim=G * D,
        codebook_dim=D,
        codebook_size=K,
        heads=G,
        separate_codebook_per_head=not shared,
        rotation_trick=False,
        ema_update=False,
        learnable_codebook=True,
    ).train()
    theirs._codebook.embed.data.copy_(torch.tensor(np.stack(codebooks(quantizer))))
    latents, weights = torch.tensor(z, requires_grad=True), normal(2, 5, 6, G * D)
    z_q, ids, loss = theirs(latents)
    output = forward(quantizer, z)
    np.testing.assert_array_equal(output.token_ids, ids.numpy())
    np.testing.assert_allclose(output.z_q, z_q.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(output.losses["commitment"], loss.item(), rtol=1e-5)

    # Their one loss moves latents and codes; ours are two of the same value, one for each.
    (loss + (z_q * torch.tensor(weights)).sum()).backward()
    params, to_latents = gradients(quantizer, z, weights, loss=1.0)
    np.testing.assert_allclose(to_latents, latents.grad.numpy(), atol=1e-5)
    for ours, expected in zip(book_gradients(params), theirs._codebook.embed.grad.numpy(), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        assert (ours != 0).any()


@pytest.mark.parametrize("shared", [False, True])
def test_the_peer_with_heads_and_moving_averages(shared):
    quantizer = make({"learning": "ema", "ema_decay": 0.8, "ema_epsilon": 1e-5}, shared_codebook=shared)
    theirs = peers.VectorQuantize(
        dim=G * D,
        codebook_dim=D,
        codebook_size=K,
        heads=G,
        separate_codebook_per_head=not shared,
        rotation_trick=False,
        decay=0.8,
        eps=1e-5,
    ).train()
    for buffer in (theirs._codebook.embed, theirs._codebook.embed_avg):
        buffer.copy_(torch.tensor(np.stack(codebooks(quantizer))))
    step, state = training_step(quantizer)
    for i in range(3):
        z = normal(i, 5, 6, G * D)
        _, ids, loss = theirs(torch.tensor(z))
        state, output = step(state, z, jax.random.key(i))
        np.testing.assert_array_equal(output.token_ids, ids.numpy())
        np.testing.assert_allclose(output.loss, loss.item(), rtol=1e-5)
        np.testing.assert_allclose(book_gradients(state), theirs._codebook.embed.numpy(), atol=1e-5)


def test_the_peer_with_residual_quantizers():
    quantizer, z = make_residual(), normal(1, 5, 6, G * D)
    theirs = peers.GroupedResidualVQ(
        dim=G * D,
        groups=G,
        num_quantizers=2,
        codebook_size=K,
        rotation_trick=False,
        ema_update=False,
        learnable_codebook=True,
    ).train()
    for group, rvq in zip(quantizer.quantizers, theirs.rvqs, strict=True):
        for book, layer in zip(codebooks(group), rvq.layers, strict=True):
            layer._codebook.embed.data.copy_(torch.tensor(book)[None])
    z_q, ids, losses = theirs(torch.tensor(z))
    output = forward(quantizer, z)
    np.testing.assert_array_equal(output.token_ids, np.moveaxis(ids.numpy(), 0, -2))  # theirs are [G, ..., Q]
    np.testing.assert_allclose(output.z_q, z_q.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(output.losses["commitment"], losses.sum().item() / G, rtol=1e-5)
    assert quantizer.token_shape((6, 5)) == (6, 5, G, 2)


# Gradients


def test_each_loss_moves_what_it_should():
    quantizer, z = make(), normal(1, 5, 6, G * D)
    ids, codes = by_hand(z, codebooks(quantizer))
    params, to_latents = gradients(quantizer, z, commitment=1.0)
    np.testing.assert_allclose(to_latents, 2 * (z - codes) / z.size, atol=1e-6)
    assert all((book == 0).all() for book in book_gradients(params))
    params, to_latents = gradients(quantizer, z, codebook=1.0)
    assert (to_latents == 0).all()
    for i, ours in enumerate(book_gradients(params)):
        expected = np.zeros_like(ours)
        np.add.at(expected, ids[..., i], 2 * (codes - z)[..., i * D : (i + 1) * D] / z.size)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    weights = normal(2, 5, 6, G * D)
    params, to_latents = gradients(quantizer, z, weights)
    np.testing.assert_array_equal(to_latents, weights)
    assert all((book == 0).all() for book in book_gradients(params))


def test_gradient_steps_on_the_loss_lower_the_error():
    quantizer, z = make(), normal(1, 64, G * D)
    before = np.mean((z - by_hand(z, codebooks(quantizer))[1]) ** 2)
    for _ in range(30):
        params, _ = gradients(quantizer, z, loss=1.0)
        nnx.update(quantizer, jax.tree.map(lambda p, g: p - 5.0 * g, nnx.state(quantizer, nnx.Param), params))
    assert np.mean((z - by_hand(z, codebooks(quantizer))[1]) ** 2) < 0.8 * before


def test_groups_drop_the_same_depths():
    quantizer, z = make_residual(num_quantizers=3, quantizer_dropout=1.0), normal(1, 60, G * D)
    output = forward(quantizer, z, jax.random.key(0))
    depths = []
    for i, group in enumerate(quantizer.quantizers):
        part = np.asarray(output.z_q)[:, i * D : (i + 1) * D]
        sums = [group.dequantize(output.token_ids[:, i, :n]) for n in (1, 2, 3)]
        depths.append([np.abs(part - s).max(axis=1) < 1e-6 for s in sums])
    np.testing.assert_array_equal(depths[0], depths[1])
    np.testing.assert_array_equal(depths[0], depths[2])
    assert (np.sum(depths[0], axis=1) > 10).all()


# The codebooks over training steps


@pytest.mark.parametrize("shared", [False, True])
def test_warm_start_and_the_drawing_of_codes(shared):
    quantizer = make({"pretrain_steps": 2, "init_method": "latent_random"}, shared_codebook=shared)
    assert quantizer.pretrain_steps == 2
    step, state = training_step(quantizer)
    graph, _ = nnx.split(quantizer)
    for i in range(2):
        z = normal(i, 20, G * D)
        assert nnx.merge(graph, state).is_warming_up()
        state, output = step(state, z, jax.random.key(i))
        np.testing.assert_array_equal(output.z_q, z)
        assert output.loss == 0 and not any(output.losses.values())
    assert not nnx.merge(graph, state).is_warming_up()
    groups = z.reshape(20, G, D)
    for i, book in enumerate(book_gradients(state)):
        latents = groups.reshape(-1, D) if shared else groups[:, i]
        assert (book[:, None] == latents).all(axis=-1).any(axis=1).all()
        assert len(np.unique(book, axis=0)) == K


@pytest.mark.parametrize("build", [make, make_residual])
def test_eight_devices_do_what_one_does(build):
    inner = {"init_method": "latent_random", "pretrain_steps": 1, "replace_freq": 1, "penalty_weight": 0.25}
    quantizer = build(inner=inner, num_groups=2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)

    def step(params, buffers, z, key):
        def loss(params, z):
            output = nnx.merge(graph, params, buffers)(z, key)
            return output.loss + jnp.mean(jnp.sin(output.z_q)), output

        gradient, output = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, z)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient[0])
        quantizer = nnx.merge(graph, params, buffers)
        quantizer.surgery(output, key)
        return *nnx.split(quantizer, nnx.Param, ...)[1:], gradient, output.loss, output.token_ids

    ends = []
    for place in (jax.devices()[0], NamedSharding(mesh, PartitionSpec("data"))):
        jitted, p, b, seen = jit(step), params, buffers, []
        for i in range(3):
            p, b, *rest = jitted(p, b, jax.device_put(normal(i, 16, 4, 2 * D), place), jax.random.key(i))
            seen.append(rest)
        ends.append(jax.tree.leaves((p, b, seen)))
    for one, eight in zip(*ends, strict=True):
        np.testing.assert_allclose(one, eight, atol=1e-5)


# What a caller can get wrong


@pytest.mark.parametrize(("name", "value"), [("num_groups", 0), ("quantizer", "grouped_quantize")])
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"grouped_quantize\.{name} is {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="GroupedQuantize: latents are 5 wide, but embedding_dim is 12"):
        getattr(make(), method)(jnp.zeros((3, 5)))


@pytest.mark.parametrize("shape", [(), (5, 2), (5, 3, 2)])
def test_ids_of_other_groups_are_refused(shape):
    with pytest.raises(UserError, match="axis -1 must be that of the 3 groups"):
        make().dequantize(jnp.zeros(shape, int))
