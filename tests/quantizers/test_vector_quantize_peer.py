"""VectorQuantize against vector_quantize_pytorch: the same codes, the same latents."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from vector_quantize_pytorch import VectorQuantize as Peer
from vector_quantize_pytorch.vector_quantize_pytorch import kmeans as peer_kmeans
from vector_quantize_pytorch.vector_quantize_pytorch import orthogonal_loss_fn

from quick_compile import jit
from vgpt_jax import VectorQuantize
from vgpt_jax.quantizers.entropy import entropy_loss
from vgpt_jax.quantizers.search import orthogonality_loss
from vgpt_jax.quantizers.surgery import kmeans

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

K, D = 16, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_ours(codes, **options):
    """Our quantizer with the given codes. It starts at once and has no penalty, unless ``options`` say otherwise."""
    defaults = {"init_method": "kaiming", "pretrain_steps": 0, "penalty_weight": 0.0}
    quantizer = VectorQuantize(*codes.shape, **(defaults | options), rngs=nnx.Rngs(0))
    quantizer.codebook[...] = jnp.asarray(codes)
    if quantizer.learning == "ema":
        quantizer.ema_sums[...] = jnp.asarray(codes)
    return quantizer


def make_peer(codes, **options):
    """Hers in training, with the given codes; they stand still, unless ``options`` say otherwise."""
    defaults = {"rotation_trick": False, "ema_update": False, "threshold_ema_dead_code": 0}
    peer = Peer(dim=codes.shape[1], codebook_size=codes.shape[0], **(defaults | options)).train()
    with torch.no_grad():
        peer._codebook.embed.copy_(torch.tensor(codes)[None])
        peer._codebook.embed_avg.copy_(torch.tensor(codes)[None])
    return peer


def run_ours(quantizer, z, weights):
    """Output, and the gradients of ``sum(weights * z_q) + loss`` with respect to the latents and the codes."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)

    def scalar(params, z):
        output = nnx.merge(graph, params, buffers)(z)
        return jnp.sum(weights * output.z_q) + output.loss, output

    (to_params, to_z), output = jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(params, z)
    return output, to_z, to_params["codebook"][...]


def run_peer(peer, z, weights):
    """Hers: ids, z_q, loss, gradient to latents, gradient to codes (None where hers are no parameter)."""
    x = torch.tensor(z, requires_grad=True)
    z_q, ids, loss = peer(x)
    (torch.sum(torch.tensor(weights) * z_q) + loss.sum()).backward()
    to_codes = peer._codebook.embed.grad
    return ids.numpy(), z_q.detach().numpy(), loss.item(), x.grad.numpy(), None if to_codes is None else to_codes[0]


def training_step(quantizer):
    """A jitted step without an optimizer, forward pass then surgery: ``(state, z) -> (state, output)``."""
    graph, state = nnx.split(quantizer)

    def step(state, z):
        quantizer = nnx.merge(graph, state)
        output = quantizer(z)
        quantizer.surgery(output, jax.random.key(0))
        return nnx.state(quantizer), output

    return jit(step), state


# The forward pass and its gradients


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_euclidean(estimator):
    codes, z, weights = normal(0, K, D), normal(1, 6, 10, D), normal(2, 6, 10, D)
    # Hers is one mean squared difference that moves both sides: our two losses with one weight.
    quantizer = make_ours(codes, commitment_weight=0.3, codebook_weight=0.3, estimator=estimator)
    output, to_z, to_codes = run_ours(quantizer, z, weights)
    peer = make_peer(codes, learnable_codebook=True, commitment_weight=0.3, rotation_trick=estimator == "rotation")
    ids, z_q, loss, peer_to_z, peer_to_codes = run_peer(peer, z, weights)
    assert len(np.unique(ids)) > 8
    np.testing.assert_array_equal(output.token_ids, ids)
    close(output.z_q, z_q)
    close(0.3 * output.losses["commitment"], loss)
    close(0.3 * output.losses["codebook"], loss)
    close(to_z, peer_to_z)
    close(to_codes, peer_to_codes)
    assert (np.abs(to_z - weights) > 1e-3).any()  # not the task's gradient alone


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_cosine(estimator):
    """Hers has unit codes that no gradient reaches. Ours are divided by their norms in the pass: the same for any norm."""
    codes, z, weights = unit(normal(0, K, D)), normal(1, 6, 10, D), normal(2, 6, 10, D)
    quantizer = make_ours(codes * np.exp(normal(3, K, 1)), l2_norm=True, commitment_weight=0.3, estimator=estimator)
    output, to_z, to_codes = run_ours(quantizer, z, weights)
    peer = make_peer(codes, use_cosine_sim=True, commitment_weight=0.3, rotation_trick=estimator == "rotation")
    ids, z_q, loss, peer_to_z, _ = run_peer(peer, z, weights)
    assert len(np.unique(ids)) > 8
    np.testing.assert_array_equal(output.token_ids, ids)
    close(output.z_q, z_q)
    close(0.3 * output.losses["commitment"], loss)
    close(to_z, peer_to_z)

    # The codes' gradient by torch: of the mean squared difference of unit vectors.
    stored = torch.tensor(np.asarray(quantizer.codebook[...]), requires_grad=True)
    chosen = torch.nn.functional.normalize(stored, dim=-1)[torch.tensor(ids)]
    distance = torch.mean((torch.tensor(unit(z)) - chosen) ** 2)
    distance.backward()
    close(output.losses["codebook"], distance.item())
    close(to_codes, stored.grad)
    assert (to_codes != 0.0).any()


def test_the_synchronized_update_reaches_the_codes_and_hers_does_not():
    """Eq. 7 of arXiv 2305.08842 sends the share nu of the task's gradient to the chosen codes, on top of all of it to the
    latents. Hers adds ``v * (q - sg(q))`` with a q whose code is already detached by the straight-through estimator: the
    share comes to the latents a second time and never to the codes. Ours is the paper's."""
    codes, z, weights = normal(0, K, D), normal(1, 6, 10, D), normal(2, 6, 10, D)
    quantizer = make_ours(codes, sync_nu=0.4, commitment_weight=0.0, codebook_weight=0.0)
    output, to_z, to_codes = run_ours(quantizer, z, weights)
    peer = make_peer(codes, learnable_codebook=True, sync_update_v=0.4, commitment_weight=0.0)
    ids, z_q, _, peer_to_z, peer_to_codes = run_peer(peer, z, weights)
    np.testing.assert_array_equal(output.token_ids, ids)
    np.testing.assert_array_equal(output.z_q, codes[ids])
    close(output.z_q, z_q)

    close(peer_to_z, 1.4 * weights)
    assert peer_to_codes is None or (peer_to_codes == 0.0).all()
    np.testing.assert_array_equal(to_z, weights)
    expected = np.zeros((K, D))
    np.add.at(expected, ids, 0.4 * weights)
    close(to_codes, expected)


# Moving averages


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("decay", [0.8, 0.99])
def test_moving_averages_for_twenty_steps(decay, cosine):
    codes = unit(normal(0, K, D)) if cosine else normal(0, K, D)
    step, state = training_step(make_ours(codes, learning="ema", ema_decay=decay, l2_norm=cosine))
    peer = make_peer(codes, ema_update=True, decay=decay, use_cosine_sim=cosine)
    for i in range(20):
        z = 0.7 * normal(100 + i, 3, 20, D) + normal(200 + i // 5, D)
        state, output = step(state, z)
        z_q, ids, loss = peer(torch.tensor(z, requires_grad=True))
        np.testing.assert_array_equal(output.token_ids, ids)
        close(output.z_q, z_q.detach())
        assert set(output.losses) == {"commitment"}
        close(output.loss, loss.item())
        close(state["codebook"][...], peer._codebook.embed[0])
    close(state["ema_counts"][...], peer._codebook.cluster_size[0])
    close(state["ema_sums"][...], peer._codebook.embed_avg[0])
    assert np.abs(np.asarray(state["codebook"][...]) - codes).max() > 0.1


# Affine reparametrization by running statistics


def peer_statistics(peer):
    """Hers in the order of ours: codebook mean and variance, latents mean and variance."""
    names = ("codebook_mean", "codebook_variance", "batch_mean", "batch_variance")
    return [getattr(peer._codebook, name).reshape(-1).numpy() for name in names]


def our_statistics(affine):
    names = ("codebook_mean", "codebook_variance", "latents_mean", "latents_variance")
    return [np.asarray(affine[name][...]) for name in names]


def test_affine_statistics():
    """Hers counts a batch before it quantizes it, ours after: so ours quantizes each batch again once it is counted."""
    codes, weights = normal(0, K, D), normal(2, 3, 20, D)
    quantizer = make_ours(codes, affine="statistics", commitment_weight=0.3, codebook_weight=0.3)
    step, state = training_step(quantizer)
    peer = make_peer(codes, learnable_codebook=True, affine_param=True, commitment_weight=0.3)
    graph, _ = nnx.split(quantizer)
    forward = jit(lambda state, z: nnx.merge(graph, state)(z))
    for i in range(8):
        z = 3.0 + 0.2 * i + (1.0 + i) * normal(100 + i, 3, 20, D)
        state, _ = step(state, z)
        output, (ids, z_q, loss, peer_to_z, peer_to_codes) = forward(state, z), run_peer(peer, z, weights)
        np.testing.assert_array_equal(output.token_ids, ids)
        close(output.z_q, z_q)
        close(output.loss, 2.0 * loss)
        for ours, theirs in zip(our_statistics(state["affine"]), peer_statistics(peer), strict=True):
            close(ours, theirs)
        if i < 7:
            peer.zero_grad()
    _, to_z, to_codes = run_ours(nnx.merge(graph, state), z, weights)
    close(to_z, peer_to_z)
    close(to_codes, peer_to_codes)
    assert (to_codes != 0.0).any()


def test_moving_averages_with_affine_statistics():
    """In every step, ours starts from statistics that hold the batch already, as hers have when they are used."""
    codes = normal(0, K, D)
    quantizer = make_ours(codes, affine="statistics", learning="ema", ema_decay=0.9)
    peer = make_peer(codes, ema_update=True, decay=0.9, affine_param=True)
    graph, state = nnx.split(quantizer)

    def count(state, z):
        quantizer = nnx.merge(graph, state)
        quantizer.affine.update(z.reshape(-1, D), quantizer.codebook[...], quantizer.steps[...] == 0)
        return nnx.state(quantizer)

    count = jit(count)
    step, state = training_step(quantizer)
    for i in range(20):
        z = 3.0 + 0.2 * i + 2.0 * normal(100 + i, 3, 20, D)
        state = count(state, z)
        counted = our_statistics(state["affine"])
        statistics = jax.tree.map(jnp.copy, state["affine"])
        state, output = step(state, z)
        state["affine"] = statistics
        z_q, ids, loss = peer(torch.tensor(z, requires_grad=True))
        np.testing.assert_array_equal(output.token_ids, ids)
        close(output.z_q, z_q.detach())
        close(output.loss, loss.item())
        for ours, theirs in zip(counted, peer_statistics(peer), strict=True):
            close(ours, theirs)
        close(state["codebook"][...], peer._codebook.embed[0])
    close(state["ema_counts"][...], peer._codebook.cluster_size[0])
    close(state["ema_sums"][...], peer._codebook.embed_avg[0])
    assert np.abs(np.asarray(state["codebook"][...]) - codes).max() > 0.1


# k-means, and the losses that spread codes


@pytest.mark.parametrize("iterations", [1, 2, 10])
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans(spherical, iterations):
    latents, start = np.abs(normal(0, 200, D)), np.abs(normal(1, K, D))
    start[3] = -9.0  # has no latents
    if spherical:
        latents, start = unit(latents), unit(start)
    means, counts = jit(kmeans, static_argnames=("iterations", "spherical"))(
        start, latents, iterations=iterations, spherical=spherical
    )
    peer_means, peer_counts = peer_kmeans(
        torch.tensor(latents)[None], K, iterations, spherical, sample_fn=lambda *_: torch.tensor(start)[None]
    )
    np.testing.assert_array_equal(counts, peer_counts[0])
    close(means, peer_means[0])
    assert counts[3] == 0.0
    np.testing.assert_array_equal(means[3], start[3])


@pytest.mark.parametrize("num_codes", [3, 16])
def test_orthogonality(num_codes):
    codes = normal(0, num_codes, D)
    value, gradient = jit(jax.value_and_grad(orthogonality_loss))(codes)
    peer_codes = torch.tensor(codes, requires_grad=True)
    peer_value = orthogonal_loss_fn(peer_codes[None])
    peer_value.backward()
    close(value, peer_value.item())
    close(gradient, peer_codes.grad)


def test_orthogonality_within_the_quantizer():
    codes, z, weights = normal(0, K, D), normal(1, 6, 10, D), normal(2, 6, 10, D)
    quantizer = make_ours(codes, orthogonality_weight=5.0)
    output, to_z, to_codes = run_ours(quantizer, z, weights)
    peer = make_peer(codes, learnable_codebook=True, orthogonal_reg_weight=5.0)
    _, _, loss, peer_to_z, peer_to_codes = run_peer(peer, z, weights)
    close(output.loss, loss + output.losses["codebook"])  # hers counts the one distance once
    close(5.0 * output.losses["orthogonality"], loss - output.losses["commitment"])
    close(to_z, peer_to_z)
    close(to_codes, peer_to_codes)


def test_the_entropy_of_mean_assignments_is_her_diversity():
    """Hers is of distances that are not squared, and averages over all axes but the last but one: so that has length 1.
    The quantizer's own loss is of squared distances: see test_entropy_loss_of_squared_distances."""
    codes, z = normal(0, K, D), normal(1, 60, D)
    peer = make_peer(
        codes,
        learnable_codebook=True,
        commitment_weight=0.0,
        codebook_diversity_loss_weight=1.0,
        codebook_diversity_temperature=3.0,
    )
    _, _, loss = peer(torch.tensor(z))
    distances = np.linalg.norm(z[:, None] - codes[None], axis=-1)
    close(jit(entropy_loss)(-distances, 1.0 / 3.0)[2], -loss.item())


@pytest.mark.parametrize("options", [{}, {"l2_norm": True}], ids=str)
def test_entropy_loss_of_squared_distances(options):
    codes, z = normal(0, K, D), normal(1, 6, 10, D)
    quantizer = make_ours(
        codes, entropy_weight=0.7, entropy_temperature=0.4, commitment_weight=0.0, codebook_weight=0.0, **options
    )
    output, to_z, to_codes = run_ours(quantizer, z, np.zeros_like(z))
    x, c = (torch.tensor(values, requires_grad=True) for values in (z, codes))
    vectors = (torch.nn.functional.normalize(v, dim=-1) if options else v for v in (x.reshape(-1, D), c))
    log_p = torch.log_softmax(-(torch.cdist(*vectors) ** 2) / 0.4, dim=-1)
    usage = log_p.exp().mean(dim=0)
    loss = -(log_p.exp() * log_p).sum(dim=-1).mean() + (usage * usage.log()).sum()
    (0.7 * loss).backward()
    assert loss.item() < -0.5
    close(output.losses["entropy"], loss.item())
    close(output.loss, 0.7 * loss.item())
    close(to_z, x.grad)
    close(to_codes, c.grad)
