from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import VectorQuantize
from vgpt_jax.quantizers.affine import AFFINE, CODEBOOK_DECAY, LATENTS_DECAY, LearnedAffine, StatisticsAffine

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def learned(scale, shift):
    affine = LearnedAffine(len(scale))
    affine.scale[...], affine.shift[...] = jnp.asarray(scale), jnp.asarray(shift)
    return affine


def of_statistics(latents_mean, latents_std, codebook_mean, codebook_std):
    affine = StatisticsAffine(len(latents_mean))
    affine.latents_mean[...], affine.codebook_mean[...] = jnp.asarray(latents_mean), jnp.asarray(codebook_mean)
    affine.latents_variance[...], affine.codebook_variance[...] = (
        jnp.asarray(std) ** 2 for std in (latents_std, codebook_std)
    )
    return affine


def call(affine, method, *arrays):
    graph, state = nnx.split(affine)
    return jit(lambda state, *arrays: getattr(nnx.merge(graph, state), method)(*arrays))(state, *arrays)


def updated(affine, *arguments):
    """The state of ``affine`` after a jitted update."""
    graph, state = nnx.split(affine)

    def update(state, *arguments):
        affine = nnx.merge(graph, state)
        affine.update(*arguments)
        return nnx.state(affine)

    return jit(update)(state, *arguments)


@pytest.mark.parametrize("name", ["learned", "statistics"])
def test_it_starts_as_the_identity(name):
    affine, codes = AFFINE[name](4), normal(0, 7, 4)
    np.testing.assert_array_equal(call(affine, "__call__", codes), codes)
    np.testing.assert_array_equal(call(affine, "inverse", codes), codes)


def test_learned_by_hand():
    affine = learned([1.0, -0.5], [10.0, -1.0])
    close(call(affine, "__call__", jnp.array([[1.0, 2.0], [0.0, -4.0]])), [[12.0, 0.0], [10.0, -3.0]])
    close(call(affine, "inverse", jnp.array([[12.0, 0.0], [10.0, -3.0]])), [[1.0, 2.0], [0.0, -4.0]])


def test_statistics_by_hand():
    """Codes with mean 1 and deviation 2 take the place of latents with mean 10 and deviation 0.5, and the reverse."""
    affine = of_statistics([10.0, -1.0], [0.5, 6.0], [1.0, 0.0], [2.0, 3.0])
    codes, latents = jnp.array([[1.0, 1.0], [5.0, 0.0]]), jnp.array([[10.0, 1.0], [11.0, -1.0]])
    close(call(affine, "__call__", codes), latents)
    close(call(affine, "inverse", latents), codes)


@pytest.mark.parametrize(
    "affine",
    [learned(normal(0, 4), normal(1, 4)), of_statistics(*np.exp(normal(2, 4, 4)))],
    ids=lambda affine: type(affine).__name__,
)
def test_the_inverse_undoes_it(affine):
    codes = normal(3, 5, 6, 4)
    close(call(affine, "inverse", call(affine, "__call__", codes)), codes)
    close(call(affine, "__call__", call(affine, "inverse", codes)), codes)


def test_the_inverse_is_finite_where_there_is_none():
    assert np.isfinite(call(learned([-1.0, -1.0 - 1e-9], [2.0, 0.0]), "inverse", normal(0, 5, 2))).all()
    assert np.isfinite(call(of_statistics(*np.zeros((4, 2), np.float32)), "inverse", normal(0, 5, 2))).all()


def test_every_latent_moves_every_code_through_the_learned_parameters():
    """The gradient of a distance to one code, by hand; descending it moves the codes that nobody chose as well."""
    affine, codes, latent = learned([0.2, -0.1], [0.3, 0.4]), normal(0, 6, 2), normal(1, 2)
    graph, params = nnx.split(affine)

    def distance(params):
        return jnp.sum((latent - nnx.merge(graph, params)(codes)[3]) ** 2)

    gradient = jit(jax.grad(distance))(params)
    error = 2.0 * (codes[3] * np.array([1.2, 0.9]) + np.array([0.3, 0.4]) - latent)
    close(gradient["shift"][...], error)
    close(gradient["scale"][...], error * codes[3])
    moved = nnx.merge(graph, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
    assert (np.abs(call(moved, "__call__", codes) - call(affine, "__call__", codes)) > 1e-4).all()


def test_no_gradient_reaches_parameters_through_the_inverse():
    graph, params = nnx.split(learned([0.2, -0.1], [0.3, 0.4]))
    gradient = jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params).inverse(normal(0, 5, 2)) ** 2)))(params)
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(gradient))


def test_learned_parameters_are_not_counted():
    before = nnx.state(learned([0.2, -0.1], [0.3, 0.4]))
    after = updated(learned([0.2, -0.1], [0.3, 0.4]), normal(0, 5, 2), normal(1, 3, 2), True)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_statistics_are_no_parameters():
    assert len(jax.tree.leaves(nnx.state(StatisticsAffine(3), nnx.Param))) == 0
    assert len(jax.tree.leaves(nnx.state(LearnedAffine(3), nnx.Param))) == 2


def test_the_first_batch_replaces_the_statistics():
    latents, codes = 5.0 + 3.0 * normal(0, 50, 4), normal(1, 9, 4) - 2.0
    state = updated(of_statistics(*np.ones((4, 4), np.float32)), latents, codes, True)
    close(state["latents_mean"][...], latents.mean(axis=0))
    close(state["latents_variance"][...], latents.var(axis=0))
    close(state["codebook_mean"][...], codes.mean(axis=0))
    close(state["codebook_variance"][...], codes.var(axis=0))


def test_later_batches_are_averaged():
    latents, codes = 5.0 + 3.0 * normal(0, 50, 4), normal(1, 9, 4) - 2.0
    mean, std = normal(2, 4), np.exp(normal(3, 4))
    state = updated(of_statistics(mean, std, mean, std), latents, codes, False)
    for name, values, decay in (("latents", latents, LATENTS_DECAY), ("codebook", codes, CODEBOOK_DECAY)):
        close(state[f"{name}_mean"][...], decay * mean + (1 - decay) * values.mean(axis=0))
        close(state[f"{name}_variance"][...], decay * std**2 + (1 - decay) * values.var(axis=0))


def test_codes_take_on_the_statistics_of_the_latents():
    """So a shift and a new scale of the latents carries all codes with it."""
    codes, affine = normal(1, 9, 4), StatisticsAffine(4)
    graph, _ = nnx.split(affine)
    for latents in (5.0 + 3.0 * normal(0, 50, 4), 0.01 * normal(2, 50, 4) - 1.0):  # the least deviation is 0.003
        moved = call(nnx.merge(graph, updated(affine, latents, codes, True)), "__call__", codes)
        np.testing.assert_allclose(np.mean(moved, axis=0), latents.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.std(moved, axis=0), latents.std(axis=0), rtol=1e-4)


@pytest.mark.parametrize("side", [0, 2], ids=["latents", "codes"])
def test_statistics_without_spread_give_finite_codes(side):
    values = [normal(0, 50, 4), normal(1, 9, 4)]
    values[side // 2] = np.ones_like(values[side // 2])
    graph, _ = nnx.split(StatisticsAffine(4))
    affine = nnx.merge(graph, updated(StatisticsAffine(4), *values, True))
    assert np.isfinite(call(affine, "__call__", values[1])).all()
    assert np.isfinite(call(affine, "inverse", values[0])).all()


def test_gradients_pass_to_the_codes_with_the_ratio_of_deviations():
    affine, weights = of_statistics([10.0, -1.0], [0.5, 6.0], [1.0, 0.0], [2.0, 3.0]), normal(0, 5, 2)
    graph, state = nnx.split(affine)
    gradient = jit(jax.grad(lambda codes: jnp.sum(weights * nnx.merge(graph, state)(codes))))(normal(1, 5, 2))
    close(gradient, weights * np.array([0.25, 2.0]))


# Within the quantizer


def make(**options):
    defaults = {"num_codewords": 8, "embedding_dim": 4, "pretrain_steps": 0, "penalty_weight": 0.0}
    return VectorQuantize(**(defaults | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("affine", ["learned", "statistics"])
@pytest.mark.parametrize(("pretrain_steps", "init_method"), [(0, "latent_random"), (1, "kmeans"), (3, "latent_random")])
def test_drawn_codes_are_latents_after_the_transformation(pretrain_steps, init_method, affine):
    """48 of 64 latents are codes, but for what one batch moves the statistics: so most latents have a code at hand."""
    quantizer = make(
        num_codewords=48, pretrain_steps=pretrain_steps, init_method=init_method, kmeans_iterations=2, affine=affine
    )
    graph, state = nnx.split(quantizer)

    def step(state, z, key):
        quantizer = nnx.merge(graph, state)
        quantizer.surgery(quantizer(z), key)
        return nnx.state(quantizer), quantizer.codes()

    step = jit(step)
    for i in range(max(pretrain_steps, 1)):
        latents = 5.0 + 0.1 * normal(i, 64, 4)
        state, codes = step(state, latents, jax.random.key(i))
    distances = np.linalg.norm(latents[:, None] - np.asarray(codes), axis=-1).min(axis=1)
    assert np.mean(distances**2) < 0.3 * 4 * 0.1**2


@pytest.mark.parametrize("affine", ["learned", "statistics"])
def test_the_codebook_loss_moves_codes_and_transformation(affine):
    graph, params, buffers = nnx.split(make(affine=affine), nnx.Param, ...)

    def gradient(scalar):
        return jit(jax.grad(lambda p, z: scalar(nnx.merge(graph, p, buffers)(z)), (0, 1)))(params, normal(1, 20, 4))

    to_params, to_latents = gradient(lambda output: output.losses["codebook"])
    assert len(jax.tree.leaves(to_params)) == (3 if affine == "learned" else 1)
    assert all((leaf != 0.0).any() for leaf in jax.tree.leaves(to_params))
    assert (to_latents == 0.0).all()
    to_params, to_latents = gradient(lambda output: output.losses["commitment"] + jnp.sum(output.z_q))
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(to_params))
    assert (to_latents != 0.0).all()


def test_the_codebook_loss_moves_the_transformation_of_codes_that_do_not_learn_by_gradient():
    graph, params, buffers = nnx.split(make(affine="learned", init_method="fixed"), nnx.Param, ...)
    gradient = jit(jax.grad(lambda p: nnx.merge(graph, p, buffers)(normal(1, 20, 4)).loss))(params)
    assert set(gradient) == {"affine"}
    assert all((leaf != 0.0).all() for leaf in jax.tree.leaves(gradient))
