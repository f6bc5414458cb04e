from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.multi_scale import (
    MultiScaleQuantize,
    area_matrix,
    bicubic_matrix,
    nearest_ticks,
)

SCALES, K, D = (1, 2, 3), 8, 4
SIDE, LENGTH = 3, 14
INNER = {"num_codewords": K, "embedding_dim": D, "pretrain_steps": 0, "penalty_weight": 0.0, "init_method": "kaiming"}


def make(inner=None, **options):
    """Scales 1, 2, 3 with 8 codes, 4 wide, and a convolution each, without warm start, unless said otherwise."""
    defaults = {"scales": SCALES, "num_phi": 3, "quantizer_args": INNER | (inner or {})}
    return MultiScaleQuantize(**(defaults | options), rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codebook(quantizer):
    return np.asarray(quantizer.quantizers[0].codebook[...])


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


class VAR(torch.nn.Module):
    """VAR's quantizer in PyTorch: section 3.2 of the paper, with the losses and the choice of phi of its code."""

    def __init__(self, quantizer, cosine=False):
        super().__init__()
        self.scales, self.ratio, self.cosine = quantizer.scales, quantizer.phi_ratio, cosine
        self.codes = torch.nn.Parameter(torch.tensor(codebook(quantizer)))
        self.convs = torch.nn.ModuleList([torch.nn.Conv2d(D, D, 3, padding=1) for _ in quantizer.phis])
        for conv, phi in zip(self.convs, quantizer.phis, strict=True):
            conv.weight.data = torch.tensor(np.asarray(phi.kernel[...])).permute(3, 2, 0, 1)
            conv.bias.data = torch.tensor(np.asarray(phi.bias[...]))
        n = len(self.convs)
        self.ticks = np.linspace(1 / 3 / n, 1 - 1 / 3 / n, n) if n == 4 else np.linspace(1 / 2 / n, 1 - 1 / 2 / n, n)

    def forward(self, z):
        """Latents ``[B, s, s, D]`` to ``f_hat`` in that shape, ids ``[B, L]``, commitment and codebook loss."""
        z = z.permute(0, 3, 1, 2)
        rest, f_hat, ids, losses = z.detach(), 0, [], torch.zeros(2)
        for i, side in enumerate(self.scales):
            vectors = F.interpolate(rest, size=(side, side), mode="area").permute(0, 2, 3, 1).reshape(-1, D)
            codes = self.codes.detach()
            if self.cosine:
                chosen = (F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(dim=1)
            else:
                chosen = torch.cdist(vectors.double(), codes.double()).argmin(dim=1)
            h = self.codes[chosen].reshape(len(z), side, side, D).permute(0, 3, 1, 2)
            h = F.interpolate(h, size=z.shape[2:], mode="bicubic")
            conv = self.convs[np.argmin(np.abs(self.ticks - i / (len(self.scales) - 1)))]
            h = (1 - self.ratio) * h + self.ratio * conv(h)
            f_hat, rest = f_hat + h, rest - h.detach()
            ids.append(chosen.reshape(len(z), -1))
            losses = losses + torch.stack([F.mse_loss(f_hat.detach(), z), F.mse_loss(f_hat, z.detach())])
        return f_hat.permute(0, 2, 3, 1), torch.cat(ids, dim=1), losses / len(self.scales)


# The peer


@pytest.mark.parametrize(
    ("scales", "num_phi", "ratio", "cosine"),
    [((1, 2, 3), 3, 0.5, False), ((1, 2, 3, 5, 7), 4, 0.3, False), ((2, 4), 1, 0.5, True)],
)
def test_var(scales, num_phi, ratio, cosine):
    quantizer = make({"cos_dist": cosine}, scales=scales, num_phi=num_phi, phi_ratio=ratio)
    for phi in quantizer.phis:
        phi.bias[...] = 0.1 * normal(3, D)
    z = normal(1, 2, scales[-1], scales[-1], D)
    theirs, latents = VAR(quantizer, cosine), torch.tensor(z, requires_grad=True)
    f_hat, ids, (commitment, code_loss) = theirs(latents)
    output = forward(quantizer, z)
    np.testing.assert_array_equal(output.token_ids, ids.numpy())
    assert output.token_ids.dtype == jnp.int32
    np.testing.assert_allclose(output.z_q, f_hat.detach().numpy(), atol=1e-5)
    np.testing.assert_array_equal(output.z_e, z)
    np.testing.assert_allclose(output.losses["commitment"], commitment.item(), rtol=1e-5)
    np.testing.assert_allclose(output.losses["codebook"], code_loss.item(), rtol=1e-5)
    np.testing.assert_allclose(output.loss, (0.25 * commitment + code_loss).item(), rtol=1e-5)

    (0.25 * commitment + code_loss).backward()
    params, to_latents = gradients(quantizer, z, loss=1.0)
    np.testing.assert_allclose(to_latents, latents.grad.numpy(), atol=1e-6)
    codes = params["quantizers"][0]["codebook"][...]
    assert (codes != 0).any()
    np.testing.assert_allclose(codes, theirs.codes.grad.numpy(), atol=1e-5)
    for i, conv in enumerate(theirs.convs):
        kernel, bias = params["phis"][i]["kernel"][...], params["phis"][i]["bias"][...]
        np.testing.assert_allclose(kernel, conv.weight.grad.permute(2, 3, 1, 0).numpy(), atol=1e-5)
        np.testing.assert_allclose(bias, conv.bias.grad.numpy(), atol=1e-5)
        assert (kernel != 0).any()


@pytest.mark.parametrize("source", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("target", [1, 2, 4, 7, 16])
def test_resizing_matrices_are_those_of_pytorch(source, target):
    x = torch.tensor(normal(0, 1, 1, source, source))
    for make_matrix, mode in ((area_matrix, "area"), (bicubic_matrix, "bicubic")):
        matrix = torch.tensor(make_matrix(source, target))
        expected = F.interpolate(x, size=(target, target), mode=mode)
        np.testing.assert_allclose(matrix @ x[0, 0] @ matrix.T, expected[0, 0], atol=1e-5)


def test_scales_share_convolutions_with_their_neighbours():
    assert nearest_ticks(10, 1) == (0,) * 10
    assert nearest_ticks(5, 5) == (0, 1, 2, 3, 4)
    for num_scales in range(4, 13):
        chosen = nearest_ticks(num_scales, 4)
        assert list(chosen) == sorted(chosen)
        assert set(chosen) == {0, 1, 2, 3}


def test_without_ratio_there_are_no_convolutions():
    quantizer, z = make(phi_ratio=0.0, scales=(3,), num_phi=1), normal(1, 2, 3, 3, D)
    assert len(quantizer.phis) == 0
    output, codes = forward(quantizer, z), codebook(quantizer)
    ids = np.sum((z[..., None, :].astype(np.float64) - codes) ** 2, axis=-1).argmin(axis=-1)
    np.testing.assert_array_equal(output.token_ids, ids.reshape(2, 9))
    np.testing.assert_array_equal(output.z_q, codes[ids])


# Shapes and bits


def test_call_quantize_and_dequantize_agree_to_the_bit():
    """With the optimising compiler and of a size at which it joins a product and a sum in one program and not in another."""
    quantizer = make({"embedding_dim": 32}, phi_ratio=0.3, scales=(1, 2, 4, 8, 16), num_phi=2)
    z = normal(1, 4, 16, 16, 32)
    graph, state = nnx.split(quantizer)
    output = jax.jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)
    ids = jax.jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, z)
    codes = jax.jit(lambda state, ids: nnx.merge(graph, state).dequantize(ids))(state, ids)
    np.testing.assert_array_equal(ids, output.token_ids)
    np.testing.assert_array_equal(codes, output.z_q)


@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_any_leading_shape(leading):
    quantizer, z = make(), normal(1, *leading, SIDE, SIDE, D)
    output = forward(quantizer, z)
    flat = forward(quantizer, z.reshape(-1, SIDE, SIDE, D))
    assert output.token_ids.shape == (*leading, LENGTH)
    np.testing.assert_array_equal(output.token_ids.reshape(-1, LENGTH), flat.token_ids)
    np.testing.assert_allclose(output.z_q.reshape(flat.z_q.shape), flat.z_q, atol=1e-6)
    np.testing.assert_array_equal(quantizer.dequantize(output.token_ids).shape, z.shape)
    assert quantizer.token_shape((SIDE, SIDE)) == (LENGTH,)
    assert (quantizer.num_codewords, quantizer.embedding_dim) == (K, D)


def test_bfloat16_latents_are_computed_on_in_float32():
    quantizer, low = make(), jnp.asarray(normal(1, 2, SIDE, SIDE, D), jnp.bfloat16)
    output, expected = forward(quantizer, low), forward(quantizer, low.astype(jnp.float32))
    for ours, theirs in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_what_is_not_written_counts_as_zero():
    quantizer, ids = make(phi_ratio=0.0), jnp.arange(2 * LENGTH).reshape(2, LENGTH) % K
    written = jnp.arange(LENGTH) < jnp.array([[1], [7]])
    codes = codebook(quantizer)
    expected = np.broadcast_to(codes[np.asarray(ids[:, 0])][:, None, None], (2, 3, 3, D)).copy()
    up = bicubic_matrix(2, 3)
    expected[1] += np.einsum("mh,nw,hwd->mnd", up, up, codes[np.asarray(ids[1, 1:5])].reshape(2, 2, D))
    expected[1, 0, :2] += codes[np.asarray(ids[1, 5:7])]
    np.testing.assert_allclose(quantizer.dequantize_written(ids, written), expected, atol=1e-5)


# Gradients


def leaves(params):
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


def test_each_loss_moves_what_it_should():
    quantizer, z = make({"penalty_weight": 1.0}), normal(1, 2, SIDE, SIDE, D)
    weights = normal(2, *z.shape)
    params, to_latents = gradients(quantizer, z, weights)
    np.testing.assert_array_equal(to_latents, weights)
    assert all((leaf == 0).all() for leaf in leaves(params).values())
    params, to_latents = gradients(quantizer, z, commitment=1.0)
    assert (to_latents != 0).all()
    assert all((leaf == 0).all() for leaf in leaves(params).values())
    params, to_latents = gradients(quantizer, z, codebook=1.0)
    assert (to_latents == 0).all()
    assert len(leaves(params)) == 7
    assert all((leaf != 0).any() for leaf in leaves(params).values())
    params, to_latents = gradients(quantizer, z, penalty=1.0)
    assert (to_latents != 0).any()
    moved = {name for name, leaf in leaves(params).items() if (leaf != 0).any()}
    assert moved == {"quantizers/0/codebook"}


def test_gradient_steps_on_the_loss_lower_the_error():
    quantizer, z = make(), normal(1, 16, SIDE, SIDE, D)
    first = forward(quantizer, z).losses["codebook"]
    for _ in range(30):
        params, _ = gradients(quantizer, z, loss=1.0)
        nnx.update(quantizer, jax.tree.map(lambda p, g: p - 0.5 * g, nnx.state(quantizer, nnx.Param), params))
    assert forward(quantizer, z).losses["codebook"] < 0.9 * first


def test_the_losses_are_its_own_with_the_other_ones_of_the_inner_quantizer():
    z = normal(1, 2, SIDE, SIDE, D)
    plain = forward(make(commitment_weight=2.0, codebook_weight=3.0), z)
    inner = {"commitment_weight": 7.0, "codebook_weight": 7.0, "penalty_weight": 0.5, "penalty_temperature": 1.0}
    quantizer = make(inner, commitment_weight=2.0, codebook_weight=3.0)
    output = forward(quantizer, z)
    assert set(plain.losses) == {"commitment", "codebook"}
    assert set(output.losses) == {"commitment", "codebook", "penalty"}
    np.testing.assert_allclose(plain.loss, 2.0 * plain.losses["commitment"] + 3.0 * plain.losses["codebook"], rtol=1e-6)
    np.testing.assert_allclose(output.loss, plain.loss + 0.5 * output.losses["penalty"], rtol=1e-6)
    # The mean over the scales, of the residuals of each.
    (part,), alone = output.parts, quantizer.quantizers[0]
    scales = (part.z_e[:, :1], part.z_e[:, 1:5], part.z_e[:, 5:])
    penalties = [forward(alone, residuals).losses["penalty"] for residuals in scales]
    np.testing.assert_allclose(output.losses["penalty"], np.mean(penalties), rtol=1e-5)


@pytest.mark.parametrize(("single", "arguments"), [("fsq", {"levels": (5, 5, 5)}), ("lfq", {"num_bits": 3})])
def test_quantizers_without_a_codebook(single, arguments):
    quantizer, z = make(quantizer=single, quantizer_args=arguments), normal(1, 8, SIDE, SIDE, 3)
    output = forward(quantizer, z)
    np.testing.assert_allclose(output.z_q, quantizer.dequantize(output.token_ids), atol=1e-6)
    if single == "lfq":  # its entropy loss reaches the encoder
        _, to_latents = gradients(quantizer, z, entropy=1.0)
        assert (to_latents != 0).any()


# The codebook over training steps


@pytest.mark.parametrize("pretrain_steps", [0, 2])
def test_codes_are_drawn_from_the_residuals_of_all_scales(pretrain_steps):
    quantizer = make({"init_method": "latent_random", "pretrain_steps": pretrain_steps, "num_codewords": 64})
    num_steps = max(pretrain_steps, 1) + len(SCALES) - 1
    assert quantizer.pretrain_steps == (num_steps if pretrain_steps else 0)
    graph, _ = nnx.split(quantizer)
    step, state = training_step(quantizer)

    def draw(seed):
        return normal(seed, 20, SIDE, SIDE, D) + 4.0 * normal(1000 + seed, 20, 1, 1, D)  # each picture has its colour

    for i in range(num_steps):
        z = draw(i)
        assert bool(nnx.merge(graph, state).is_warming_up()) == (pretrain_steps > 0)
        state, output = step(state, z, jax.random.key(i))
        if pretrain_steps:
            np.testing.assert_array_equal(output.z_q, z)
            assert output.loss == 0 and not any(output.losses.values())
    quantizer = nnx.merge(graph, state)
    assert not quantizer.is_warming_up()
    codes, (part,) = codebook(quantizer), output.parts
    matches = (codes[:, None, None] == np.asarray(part.z_e)).all(axis=-1)  # [K, 20, L]
    assert matches.any(axis=(1, 2)).all()
    starts = np.cumsum([0] + [side**2 for side in SCALES])
    shares = [matches[:, :, a:b].any(axis=(1, 2)).mean() for a, b in zip(starts, starts[1:], strict=False)]
    np.testing.assert_allclose(shares, [1 / 14, 4 / 14, 9 / 14], atol=0.15)
    # The codes are of the sizes that a next batch's residuals have, over all scales.
    state, output = step(state, draw(100), jax.random.key(100))
    sizes = [np.linalg.norm(x.reshape(-1, D), axis=-1) for x in (codes, np.asarray(output.parts[0].z_e))]
    for quantile in (0.25, 0.5, 0.75):
        few, many = (np.quantile(s, quantile) for s in sizes)
        assert 0.6 < few / many < 1.6
    np.testing.assert_array_equal(state["quantizers"][0]["codebook"][...], codes)  # and not again


def test_surgery_sees_the_residuals_of_all_scales():
    quantizer, z = make({"learning": "ema", "ema_decay": 0.5}), normal(1, 2, SIDE, SIDE, D)
    before = codebook(quantizer)
    step, state = training_step(quantizer)
    state, output = step(state, z, jax.random.key(0))
    (part,) = output.parts
    ids, residuals = np.asarray(output.token_ids).reshape(-1), np.asarray(part.z_e).reshape(-1, D)
    distances = np.sum((residuals[:, None].astype(np.float64) - before) ** 2, axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), ids)
    np.testing.assert_allclose(part.z_e[:, 0], z.mean(axis=(1, 2)), atol=1e-6)
    counts, sums = 0.5 + 0.5 * np.bincount(ids, minlength=K), 0.5 * before
    np.add.at(sums, ids, 0.5 * residuals)
    smoothed = (counts + 1e-5) / (counts.sum() + K * 1e-5) * counts.sum()
    np.testing.assert_allclose(state["quantizers"][0]["codebook"][...], sums / smoothed[:, None], atol=1e-5)


def test_eight_devices_do_what_one_does():
    inner = {"init_method": "latent_random", "pretrain_steps": 1, "replace_freq": 1, "penalty_weight": 0.25}
    quantizer = make(inner, scales=(1, 3), num_phi=1)
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
            p, b, *rest = jitted(p, b, jax.device_put(normal(i, 16, SIDE, SIDE, D), place), jax.random.key(i))
            seen.append(rest)
        ends.append(jax.tree.leaves((p, b, seen)))
    for one, eight in zip(*ends, strict=True):
        np.testing.assert_allclose(one, eight, atol=1e-5)


# What a caller can get wrong


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("scales", (), r"\(\)"),
        ("scales", (0, 1), r"\(0, 1\)"),
        ("scales", (1, 3, 3), r"\(1, 3, 3\)"),
        ("phi_ratio", 1.5, "1.5"),
        ("num_phi", 0, "0"),
        ("num_phi", 4, "4"),
        ("commitment_weight", -1.0, "-1.0"),
        ("codebook_weight", -1.0, "-1.0"),
        ("quantizer", "multi_scale", "'multi_scale'"),
    ],
)
def test_bad_arguments_are_named(name, value, shown):
    with pytest.raises(UserError, match=rf"multi_scale_quantize\.{name} is {shown}"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_or_grid_are_refused(method):
    call = getattr(make(), method)
    with pytest.raises(UserError, match="MultiScaleQuantize: latents are 5 wide, but embedding_dim is 4"):
        call(jnp.zeros((2, SIDE, SIDE, 5)))
    with pytest.raises(UserError, match="grid is 3 x 4, but the last of multi_scale_quantize.scales is 3"):
        call(jnp.zeros((2, 3, 4, D)))
    with pytest.raises(UserError, match="the last of multi_scale_quantize.scales is 3"):
        call(jnp.zeros((2, D)))


def test_grids_and_ids_of_another_size_are_refused():
    with pytest.raises(UserError, match="grid is 4 x 4"):
        make().token_shape((4, 4))
    with pytest.raises(UserError, match="there are 13 ids, but the scales have 14"):
        make().dequantize(jnp.zeros((2, 13), int))
