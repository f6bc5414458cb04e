from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vector_quantize_pytorch import ResidualVQ

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.residual import ResidualQuantize

Q, K, D = 3, 8, 4
INNER = {"num_codewords": K, "embedding_dim": D, "pretrain_steps": 0, "penalty_weight": 0.0, "init_method": "kaiming"}


def make(inner=None, **options):
    """Three depths of 8 codes, 4 wide, without warm start, unless said otherwise."""
    defaults = {"num_quantizers": Q, "quantizer_args": INNER | (inner or {})}
    return ResidualQuantize(**(defaults | options), rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codebooks(quantizer):
    return [np.asarray(inner.codebook[...]) for inner in quantizer.quantizers]


def by_hand(z, books):
    """Ids ``[..., Q]``, and codes and residuals ``[Q, ..., D]``, searched for in float64."""
    ids, codes, residuals, total = [], [], [], np.zeros_like(z)
    for book in books:
        residuals.append(z - total)
        distances = np.sum((residuals[-1].astype(np.float64)[..., None, :] - book.astype(np.float64)) ** 2, axis=-1)
        ids.append(distances.argmin(axis=-1))
        codes.append(book[ids[-1]])
        total = total + codes[-1]
    return np.stack(ids, axis=-1), np.stack(codes), np.stack(residuals)


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


# Search and losses


@pytest.mark.parametrize("shared", [False, True])
def test_ids_codes_and_losses_match_numpy(shared):
    quantizer, z = make({"commitment_weight": 0.25, "codebook_weight": 2.0}, shared_codebook=shared), normal(1, 5, 6, D)
    output = forward(quantizer, z)
    assert len(quantizer.quantizers) == (1 if shared else Q)
    ids, codes, residuals = by_hand(z, codebooks(quantizer) * (Q if shared else 1))
    np.testing.assert_array_equal(output.token_ids, ids)
    assert output.token_ids.dtype == jnp.int32
    np.testing.assert_allclose(output.z_q, codes.sum(axis=0), atol=1e-6)
    np.testing.assert_array_equal(output.z_e, z)
    squares = np.sum(np.mean((residuals - codes) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(output.losses["commitment"], squares, rtol=1e-5)
    np.testing.assert_allclose(output.losses["codebook"], squares, rtol=1e-5)
    np.testing.assert_allclose(output.loss, 2.25 * squares, rtol=1e-5)
    if shared:  # all depths as one output
        (part,) = output.parts
        np.testing.assert_array_equal(part.token_ids, ids)
        np.testing.assert_allclose(part.z_e, np.moveaxis(residuals, 0, -2), atol=1e-6)
    else:
        for depth, part in enumerate(output.parts):
            np.testing.assert_array_equal(part.token_ids, ids[..., depth])
            np.testing.assert_allclose(part.z_e, residuals[depth], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"depth_scale": 0.5}], ids=str)
def test_call_quantize_and_dequantize_agree_to_the_bit(options):
    """With the optimising compiler, which joins products and sums where it can."""
    quantizer, z = make(**options), normal(1, 64, D)
    graph, state = nnx.split(quantizer)
    output = jax.jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)
    ids = jax.jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, z)
    codes = jax.jit(lambda state, ids: nnx.merge(graph, state).dequantize(ids))(state, ids)
    np.testing.assert_array_equal(ids, output.token_ids)
    np.testing.assert_array_equal(codes, output.z_q)


def test_the_first_ids_are_the_coarser_latent():
    quantizer, z = make(), normal(1, 5, 6, D)
    ids, codes, _ = by_hand(z, codebooks(quantizer))
    for n in range(1, Q + 1):
        np.testing.assert_allclose(quantizer.dequantize(jnp.asarray(ids[..., :n])), codes[:n].sum(axis=0), atol=1e-6)
    for wrong in (jnp.zeros((5, 6, Q + 1), int), jnp.zeros((), int)):
        with pytest.raises(UserError, match=f"must be 1 to {Q}"):
            quantizer.dequantize(wrong)


def test_what_is_not_written():
    quantizer, ids = make(), jnp.array([[1, 2, 3], [4, 5, 6], [7, 0, 1]])
    written = jnp.array([[True, True, True], [True, True, False], [False, False, False]])
    books = codebooks(quantizer)
    expected = [books[0][1] + books[1][2] + books[2][3], books[0][4] + books[1][5], books[0].mean(axis=0)]
    np.testing.assert_allclose(quantizer.dequantize_written(ids, written), expected, atol=1e-6)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4)], ids=str)
def test_any_leading_shape(leading):
    quantizer, z = make(quantizer_dropout=1.0), normal(1, *leading, D)
    output = forward(quantizer, z, jax.random.key(0))
    np.testing.assert_array_equal(output.token_ids, by_hand(z, codebooks(quantizer))[0])
    assert output.z_q.shape == (*leading, D)
    assert quantizer.token_shape((6, 5)) == (6, 5, Q)
    assert (quantizer.num_codewords, quantizer.embedding_dim) == (K, D)


def test_bfloat16_latents_are_computed_on_in_float32():
    quantizer, low = make(), jnp.asarray(normal(1, 100, D), jnp.bfloat16)
    output, expected = forward(quantizer, low), forward(quantizer, low.astype(jnp.float32))
    for ours, theirs in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# The peer


def peer(quantizer, **options):
    theirs = ResidualVQ(
        dim=D, num_quantizers=Q, codebook_size=K, rotation_trick=False, commitment_weight=1.0, **options
    ).train()
    for layer, book in zip(theirs.layers, codebooks(quantizer), strict=True):
        layer._codebook.embed.data.copy_(torch.tensor(book)[None])
        layer._codebook.embed_avg.data.copy_(torch.tensor(book)[None])
    return theirs


def test_the_peer_with_codebooks_that_learn_by_gradient():
    quantizer, z = make(), normal(1, 5, 6, D)
    theirs = peer(quantizer, ema_update=False, learnable_codebook=True)
    latents = torch.tensor(z, requires_grad=True)
    z_q, ids, losses = theirs(latents)
    output = forward(quantizer, z)
    np.testing.assert_array_equal(output.token_ids, ids.numpy())
    np.testing.assert_allclose(output.z_q, z_q.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(output.losses["commitment"], losses.sum().item(), rtol=1e-5)

    # Their one loss moves latents and codes; ours are two of the same value, one for each.
    losses.sum().backward()
    params, to_latents = gradients(quantizer, z, loss=1.0)
    np.testing.assert_allclose(to_latents, latents.grad.numpy(), atol=1e-6)
    for ours, layer in zip(book_gradients(params), theirs.layers, strict=True):
        np.testing.assert_allclose(ours, layer._codebook.embed.grad[0].numpy(), atol=1e-6)
        assert (ours != 0).any()


def test_the_peer_with_moving_averages():
    quantizer = make({"learning": "ema", "ema_decay": 0.8, "ema_epsilon": 1e-5})
    theirs = peer(quantizer, decay=0.8, eps=1e-5)
    step, state = training_step(quantizer)
    for i in range(3):
        z = normal(i, 5, 6, D)
        z_q, ids, losses = theirs(torch.tensor(z))
        state, output = step(state, z, jax.random.key(i))
        np.testing.assert_array_equal(output.token_ids, ids.numpy())
        np.testing.assert_allclose(output.z_q, z_q.numpy(), atol=1e-5)
        np.testing.assert_allclose(output.loss, losses.sum().item(), rtol=1e-5)
        for ours, layer in zip(book_gradients(state), theirs.layers, strict=True):
            np.testing.assert_allclose(ours, layer._codebook.embed[0].numpy(), atol=1e-5)


# Gradients


@pytest.mark.parametrize("inner", [{}, {"estimator": "rotation"}, {"sync_nu": 0.5}], ids=str)
def test_z_q_has_the_gradient_of_one_identity(inner):
    """The peer's is Q times the identity: each of its depths adds one. The sum of the codes stands for the latent once."""
    quantizer, z, weights = make(inner), normal(1, 5, 6, D), normal(2, 5, 6, D)
    params, to_latents = gradients(quantizer, z, weights)
    np.testing.assert_array_equal(to_latents, weights)
    ids = by_hand(z, codebooks(quantizer))[0]
    for depth, ours in enumerate(book_gradients(params)):
        expected = np.zeros_like(ours)
        np.add.at(expected, ids[..., depth], inner.get("sync_nu", 0.0) * weights)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("single", "arguments"), [("ibq", {}), ("diveq", {"noise_variance": 0.1, "init_method": "kaiming"})]
)
def test_estimators_reach_the_parameters_as_if_residuals_were_constant(single, arguments):
    arguments = {"num_codewords": K, "embedding_dim": D} | arguments
    quantizer, key = make(quantizer=single, quantizer_args=arguments), jax.random.key(3)
    z, weights = normal(1, 5, 6, D), normal(2, 5, 6, D)
    output = forward(quantizer, z, key)
    np.testing.assert_array_equal(output.z_q, quantizer.dequantize(output.token_ids))  # no noise in the value
    params, to_latents = gradients(quantizer, z, weights, key)
    np.testing.assert_array_equal(to_latents, weights)

    graph, state = nnx.split(quantizer.quantizers[0])
    alone = jit(jax.grad(lambda state, z, key: jnp.sum(weights * nnx.merge(graph, state)(z, key).z_q), allow_int=True))
    for depth, (inner, ours) in enumerate(zip(quantizer.quantizers, book_gradients(params), strict=True)):
        expected = alone(nnx.state(inner), output.parts[depth].z_e, jax.random.fold_in(key, depth))["codebook"][...]
        assert (expected != 0).any()
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_each_depth_is_computed_once():
    """The second call of each inner quantizer is there for its gradient only."""
    inner = {"num_codewords": 64, "embedding_dim": 16}

    def flops(quantizer):
        graph, state = nnx.split(quantizer)
        compiled = jax.jit(lambda state, z: nnx.merge(graph, state)(z)).lower(state, normal(0, 128, 16)).compile()
        return compiled.cost_analysis()["flops"]

    quantizer = make(inner)
    assert flops(quantizer) < 1.1 * Q * flops(quantizer.quantizers[0])


def test_each_loss_moves_what_it_should():
    quantizer, z = make(), normal(1, 5, 6, D)
    ids, codes, residuals = by_hand(z, codebooks(quantizer))
    params, to_latents = gradients(quantizer, z, commitment=1.0)
    np.testing.assert_allclose(to_latents, np.sum(2 * (residuals - codes), axis=0) / z.size, atol=1e-6)
    assert all((book == 0).all() for book in book_gradients(params))
    params, to_latents = gradients(quantizer, z, codebook=1.0)
    assert (to_latents == 0).all()
    for depth, ours in enumerate(book_gradients(params)):
        expected = np.zeros_like(ours)
        np.add.at(expected, ids[..., depth], 2 * (codes[depth] - residuals[depth]) / z.size)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_gradient_steps_on_the_loss_lower_the_error_of_every_depth():
    quantizer, z = make(), normal(1, 64, D)
    before = by_hand(z, codebooks(quantizer))
    for _ in range(40):
        params, _ = gradients(quantizer, z, loss=1.0)
        nnx.update(quantizer, jax.tree.map(lambda p, g: p - 2.0 * g, nnx.state(quantizer, nnx.Param), params))
    after = by_hand(z, codebooks(quantizer))
    errors = [np.mean((residuals - codes) ** 2, axis=(1, 2)) for _, codes, residuals in (before, after)]
    assert (errors[1] < 0.8 * errors[0]).all()


# Dropping depths


def test_dropout_sums_only_the_first_codes_of_some_examples():
    quantizer, z = make({"sync_nu": 1.0}, quantizer_dropout=0.6), normal(1, 400, 2, D)
    output = forward(quantizer, z, jax.random.key(1))
    plain = forward(quantizer, z)
    ids, codes, _ = by_hand(z, codebooks(quantizer))
    sums = np.cumsum(codes, axis=0)  # [Q, B, 2, D]
    fits = np.abs(sums - np.asarray(output.z_q)).max(axis=(2, 3)) < 1e-5  # [Q, B]
    assert (fits.sum(axis=0) == 1).all()  # both latents of an example have the same depth
    shares = fits.mean(axis=1)
    np.testing.assert_allclose(shares, [0.2, 0.2, 0.6], atol=0.06)
    np.testing.assert_array_equal(plain.z_q, quantizer.dequantize(plain.token_ids))  # not in evaluation
    for name in ("token_ids", "losses", "loss"):
        jax.tree.map(np.testing.assert_array_equal, getattr(output, name), getattr(plain, name))

    weights = normal(2, *z.shape)
    params, to_latents = gradients(quantizer, z, weights, jax.random.key(1))
    np.testing.assert_array_equal(to_latents, weights)
    for depth, ours in enumerate(book_gradients(params)):
        expected = np.zeros_like(ours)
        counted = (fits.argmax(axis=0) >= depth)[:, None, None]
        np.add.at(expected, ids[..., depth], weights * counted)
        np.testing.assert_allclose(ours, expected, atol=1e-4)  # sums of hundreds of terms


# The codebooks over training steps


def steps_of(quantizer, num_steps, batch=256):
    """Runs training steps on latents of one distribution; the last output, its latents and the quantizer's state."""
    step, state = training_step(quantizer)
    for i in range(num_steps):
        z = normal(i, batch, D) * 3.0
        state, output = step(state, z, jax.random.key(i))
    nnx.update(quantizer, state)
    return output, z


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pretrain_steps", [0, 3])
def test_codes_are_drawn_from_the_residuals_as_they_will_be(pretrain_steps, shared):
    quantizer = make({"init_method": "latent_random", "pretrain_steps": pretrain_steps}, shared_codebook=shared)
    num_steps = max(pretrain_steps, 1) + Q - 1
    assert quantizer.pretrain_steps == (num_steps if pretrain_steps else 0)
    output, z = steps_of(quantizer, num_steps)
    books = codebooks(quantizer)
    for book, part in zip(books, output.parts, strict=True):
        latents = np.asarray(part.z_e).reshape(-1, D)
        assert np.isclose(book[:, None], latents, atol=1e-6).all(axis=-1).any(axis=1).all()
    new = normal(100, 2000, D) * 3.0
    _, codes, residuals = by_hand(new, books * (Q if shared else 1))
    if not shared:  # a depth's codes are as large as what it quantizes
        for book, residual in zip(books, residuals, strict=True):
            ratio = np.sqrt(np.mean(book**2) / np.mean(residual**2))
            assert 0.6 < ratio < 1.6
    errors = np.mean((residuals - codes) ** 2, axis=(1, 2))
    assert (errors[1:] < (1.0 if shared else 0.8) * errors[:-1]).all()

    step, state = training_step(quantizer)
    state, _ = step(state, new, jax.random.key(9))
    for before, after in zip(books, book_gradients(state), strict=True):  # and not again
        np.testing.assert_array_equal(before, after)


def test_codes_of_a_batch_with_fewer_latents_than_codes_are_not_zero():
    """Drawn from one batch's own residuals they would be: every latent would be a code and leave nothing."""
    quantizer = make({"init_method": "latent_random", "num_codewords": 32})
    steps_of(quantizer, Q, batch=16)
    for book in codebooks(quantizer):
        assert np.median(np.linalg.norm(book, axis=-1)) > 0.3


@pytest.mark.parametrize("shared", [False, True])
def test_warm_start_is_the_identity(shared):
    inner = {"pretrain_steps": 2, "init_method": "latent_random", "penalty_weight": 0.25}
    quantizer = make(inner, num_quantizers=2, shared_codebook=shared)
    assert quantizer.pretrain_steps == 3
    step, state = training_step(quantizer)
    graph, _ = nnx.split(quantizer)
    for i in range(quantizer.pretrain_steps):
        z, weights = normal(i, 5, 2, D), normal(100 + i, 5, 2, D)
        assert nnx.merge(graph, state).is_warming_up()
        if i in (0, quantizer.pretrain_steps - 1):
            params, to_latents = gradients(nnx.merge(graph, state), z, weights, loss=1.0)
            np.testing.assert_array_equal(to_latents, weights)
            assert all((book == 0).all() for book in book_gradients(params))
        state, output = step(state, z, jax.random.key(i))
        np.testing.assert_array_equal(output.z_q, z)
        assert output.loss == 0 and not any(output.losses.values())
    quantizer = nnx.merge(graph, state)
    assert not quantizer.is_warming_up()
    output = forward(quantizer, z)
    np.testing.assert_array_equal(output.z_q, quantizer.dequantize(output.token_ids))
    assert output.loss > 0


def test_surgery_of_a_shared_codebook_sees_all_depths():
    """One moving average of the latents and residuals of all depths. (The peer takes one step of it for each depth.)"""
    quantizer = make({"learning": "ema", "ema_decay": 0.5, "replace_freq": 2}, shared_codebook=True)
    book, z = codebooks(quantizer)[0], normal(1, 20, D)
    ids, _, residuals = by_hand(z, [book] * Q)
    step, state = training_step(quantizer)
    state, _ = step(state, z, jax.random.key(0))
    ids, residuals = ids.reshape(-1), np.moveaxis(residuals, 0, -2).reshape(-1, D)
    counts = 0.5 + 0.5 * np.bincount(ids, minlength=K)
    sums = 0.5 * book
    np.add.at(sums, ids, 0.5 * residuals)
    smoothed = (counts + 1e-5) / (counts.sum() + K * 1e-5) * counts.sum()
    inner = state["quantizers"][0]
    np.testing.assert_allclose(inner["codebook"][...], sums / smoothed[:, None], atol=1e-5)


def test_a_shared_code_is_stale_when_no_depth_uses_it():
    quantizer = make({"replace_freq": 5}, shared_codebook=True)
    quantizer.steps[...] = 10
    z = normal(1, 2, D)
    used = np.unique(by_hand(z, codebooks(quantizer) * Q)[0])
    first = np.unique(by_hand(z, codebooks(quantizer) * Q)[0][..., 0])
    assert len(first) < len(used) < K
    step, state = training_step(quantizer)
    state, _ = step(state, z, jax.random.key(0))
    expected = np.where(np.isin(np.arange(K), used), 5, 4)
    np.testing.assert_array_equal(state["quantizers"][0]["countdown"][...], expected)


@pytest.mark.parametrize("shared", [False, True])
def test_eight_devices_do_what_one_does(shared):
    inner = {"init_method": "latent_random", "pretrain_steps": 1, "replace_freq": 1, "penalty_weight": 0.25}
    quantizer = make(inner, num_quantizers=2, shared_codebook=shared, quantizer_dropout=0.5)
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
        for i in range(3):  # two of warm start and drawing, one of replacement
            p, b, *rest = jitted(p, b, jax.device_put(normal(i, 16, 4, D), place), jax.random.key(i))
            seen.append(rest)
        ends.append(jax.tree.leaves((p, b, seen)))
    for one, eight in zip(*ends, strict=True):
        np.testing.assert_allclose(one, eight, atol=1e-5)


# Other quantizers in it


@pytest.mark.parametrize(
    ("single", "arguments", "depth_scale"),
    [("fsq", {"levels": (5, 5, 5, 5)}, 0.25), ("lfq", {"num_bits": 4}, 0.5)],
)
def test_codes_of_a_fixed_size_get_finer_by_depth_scale(single, arguments, depth_scale):
    quantizer = make(quantizer=single, quantizer_args=arguments, depth_scale=depth_scale)
    z = np.random.default_rng(0).uniform(-0.9, 0.9, (200, 4)).astype(np.float32)
    output = forward(quantizer, z)
    np.testing.assert_array_equal(output.z_q, quantizer.dequantize(output.token_ids))
    errors = [np.abs(quantizer.dequantize(output.token_ids[:, :n]) - z).max() for n in range(1, Q + 1)]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


# What a caller can get wrong


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_quantizers", 0),
        ("quantizer_dropout", 1.5),
        ("depth_scale", 0.0),
        ("depth_scale", 2.0),
        ("depth_scale", 0.3),
        ("quantizer", "residual_quantize"),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"residual_quantize\.{name} is {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="ResidualQuantize: latents are 5 wide, but embedding_dim is 4"):
        getattr(make(), method)(jnp.zeros((3, 5)))
