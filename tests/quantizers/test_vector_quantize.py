import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import UserError, VectorQuantize


def make(**options):
    """A quantizer that quantizes from the first step and has no penalty, unless ``options`` say otherwise."""
    defaults = {"num_codewords": 8, "embedding_dim": 4, "pretrain_steps": 0, "penalty_weight": 0.0}
    return VectorQuantize(**(defaults | options), rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearest(z, codes):
    """Ids of the nearest codes in float64."""
    z, codes = np.asarray(z, np.float64), np.asarray(codes, np.float64)
    return np.argmin(np.sum((z[..., None, :] - codes) ** 2, axis=-1), axis=-1)


def pure(quantizer):
    """The jitted forward pass as a function of the state, and the state."""
    graph, state = nnx.split(quantizer)
    return jax.jit(lambda state, z: nnx.merge(graph, state)(z)), state


def forward(quantizer, z):
    call, state = pure(quantizer)
    return call(state, z)


def quantize(quantizer, z):
    graph, state = nnx.split(quantizer)
    return jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, z)


def training_step(quantizer):
    """One jitted step without an optimizer, forward pass then surgery: ``(state, z, key) -> (state, output)``."""
    graph, state = nnx.split(quantizer)

    def step(state, z, key):
        quantizer = nnx.merge(graph, state)
        output = quantizer(z)
        quantizer.surgery(output, key)
        return nnx.state(quantizer), output

    return jit(step), state


def gradients(quantizer, z, scalar):
    """Gradients of ``scalar(output)`` with respect to the parameters and the latents."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)
    return jit(jax.grad(lambda p, z: scalar(nnx.merge(graph, p, buffers)(z)), argnums=(0, 1)))(params, z)


# The search


def test_euclidean_search_matches_numpy():
    quantizer, z = make(num_codewords=32), normal(1, 10, 20, 4)
    output, codes = forward(quantizer, z), np.asarray(quantizer.codebook[...])
    ids = nearest(z, codes)
    np.testing.assert_array_equal(output.token_ids, ids)
    np.testing.assert_array_equal(output.z_q, codes[ids])
    np.testing.assert_array_equal(output.z_e, z)


def test_losses_match_numpy():
    quantizer, z = make(commitment_weight=3.0, codebook_weight=0.5, penalty_weight=2.0), normal(1, 30, 4)
    output, codes = forward(quantizer, z), np.asarray(quantizer.codebook[...])
    distance = np.mean((np.asarray(z) - codes[nearest(z, codes)]) ** 2)
    np.testing.assert_allclose(output.losses["commitment"], distance, rtol=1e-5)
    np.testing.assert_allclose(output.losses["codebook"], distance, rtol=1e-5)
    assert set(output.losses) == {"commitment", "codebook", "penalty"}
    np.testing.assert_allclose(output.loss, 3.5 * distance + 2.0 * output.losses["penalty"], rtol=1e-5)


def test_cosine_search_is_by_angle_and_returns_the_stored_code():
    quantizer = make(num_codewords=32, cos_dist=True)
    quantizer.codebook[...] *= np.exp(normal(2, 32, 1))  # norms that differ, or the angle decides nothing
    z = normal(1, 200, 4) * 3.0
    output, codes = forward(quantizer, z), np.asarray(quantizer.codebook[...])
    ids = np.argmax(unit(np.asarray(z, np.float64)) @ unit(codes.astype(np.float64)).T, axis=1)
    assert (ids != nearest(z, codes)).any()
    np.testing.assert_array_equal(output.token_ids, ids)
    np.testing.assert_array_equal(output.z_q, codes[ids])


@pytest.mark.parametrize("random_proj", [False, True])
@pytest.mark.parametrize("cos_dist", [False, True])
def test_projected_search_normalises_then_projects(cos_dist, random_proj):
    quantizer = make(num_codewords=32, proj_dim=3, cos_dist=cos_dist, random_proj=random_proj)
    quantizer.codebook[...] *= np.exp(normal(2, 32, 1))
    if not random_proj:
        quantizer.code_proj[...] = normal(3, 4, 3)  # the two matrices have parted while training
    z, codes = normal(1, 200, 4), np.asarray(quantizer.codebook[...])
    output = forward(quantizer, z)
    z_proj, code_proj = np.asarray(quantizer.z_proj[...]), np.asarray(quantizer.code_proj[...])
    first = unit if cos_dist else (lambda x: x)
    ids = nearest(first(np.asarray(z)) @ z_proj, first(codes) @ code_proj)
    if cos_dist:
        assert (ids != nearest(unit(np.asarray(z) @ z_proj), unit(codes @ code_proj))).any()
    np.testing.assert_array_equal(output.token_ids, ids)
    np.testing.assert_array_equal(output.z_q, codes[ids])


def test_projection_is_at_the_highest_precision():
    graph, state = nnx.split(make(proj_dim=3))
    jaxpr = jax.make_jaxpr(lambda state, z: nnx.merge(graph, state).quantize(z))(state, normal(0, 5, 4))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3  # of the latents, of the codes, of both
    assert all(set(e.params["precision"]) == {jax.lax.Precision.HIGHEST} for e in products)


def test_random_projection_is_one_matrix_and_no_parameter():
    quantizer = make(proj_dim=3, random_proj=True)
    assert quantizer.z_proj is quantizer.code_proj
    assert set(nnx.to_flat_state(nnx.state(quantizer, nnx.Param)).paths) == {("codebook",)}


def test_learned_projections_learn_from_the_penalty_alone():
    quantizer, z = make(proj_dim=3, penalty_weight=1.0), normal(1, 30, 4)
    without, _ = gradients(quantizer, z, lambda output: output.loss - output.losses["penalty"])
    with_penalty, _ = gradients(quantizer, z, lambda output: output.losses["penalty"])
    for name in ("z_proj", "code_proj"):
        assert (without[name][...] == 0.0).all()
        assert (with_penalty[name][...] != 0.0).any()


@pytest.mark.parametrize("options", [{}, {"cos_dist": True}, {"proj_dim": 3}], ids=str)
def test_quantize_inverts_dequantize(options):
    quantizer, ids = make(num_codewords=32, **options), jnp.arange(32).reshape(4, 8)
    codes = quantizer.dequantize(ids)
    np.testing.assert_array_equal(codes, np.asarray(quantizer.codebook[...]).reshape(4, 8, 4))
    np.testing.assert_array_equal(quantize(quantizer, codes), ids)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)], ids=str)
def test_any_leading_shape(leading):
    quantizer, z = make(), normal(1, *leading, 4)
    output = forward(quantizer, z)
    expected = nearest(z, quantizer.codebook[...])
    for ids in (output.token_ids, quantize(quantizer, z)):
        np.testing.assert_array_equal(ids, expected)
        assert ids.shape == leading
        assert ids.dtype == jnp.int32
    assert output.z_q.shape == output.z_e.shape == (*leading, 4)


def test_a_tie_goes_to_the_lowest_id():
    quantizer = make(num_codewords=4, embedding_dim=2)
    quantizer.codebook[...] = jnp.array([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_array_equal(quantizer.quantize(jnp.array([[1.0, 0.0], [0.0, 0.0]])), [1, 1])


def test_bfloat16_latents_are_computed_on_in_float32():
    quantizer = make(num_codewords=32, penalty_weight=0.25)
    low = jnp.asarray(normal(1, 100, 4), jnp.bfloat16)
    output, expected = forward(quantizer, low), forward(quantizer, low.astype(jnp.float32))
    np.testing.assert_array_equal(quantize(quantizer, low), expected.token_ids)
    for ours, theirs in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert output.z_q.dtype == output.z_e.dtype == output.loss.dtype == jnp.float32


# Gradients


def test_straight_through_gradient_is_the_identity():
    z, weights = normal(1, 6, 4), normal(2, 6, 4)
    params, latents = gradients(make(), z, lambda output: jnp.sum(weights * output.z_q))
    np.testing.assert_array_equal(latents, weights)
    assert (params["codebook"][...] == 0.0).all()


def test_commitment_moves_latents_only():
    quantizer, z = make(), normal(1, 6, 4)
    params, latents = gradients(quantizer, z, lambda output: output.losses["commitment"])
    codes = np.asarray(quantizer.codebook[...])
    np.testing.assert_allclose(latents, 2 * (np.asarray(z) - codes[nearest(z, codes)]) / z.size, rtol=1e-4, atol=1e-7)
    assert (params["codebook"][...] == 0.0).all()


def test_codebook_loss_moves_codes_only():
    quantizer, z = make(), normal(1, 6, 4)
    params, latents = gradients(quantizer, z, lambda output: output.losses["codebook"])
    codes = np.asarray(quantizer.codebook[...])
    expected = np.zeros_like(codes)
    ids = nearest(z, codes)
    np.add.at(expected, ids, 2 * (codes[ids] - np.asarray(z)) / z.size)
    assert (expected != 0.0).any()
    np.testing.assert_allclose(params["codebook"][...], expected, rtol=1e-4, atol=1e-7)
    assert (latents == 0.0).all()


@pytest.mark.parametrize("options", [{}, {"cos_dist": True}, {"proj_dim": 3}], ids=str)
def test_penalty_raises_the_entropy_of_code_use(options):
    quantizer = make(penalty_weight=1.0, commitment_weight=0.0, codebook_weight=0.0, **options)
    quantizer.codebook[...] += jnp.array([[0.0]] + 7 * [[2.0]])  # all codes but one lie aside
    z = normal(1, 256, 4)

    def entropy():
        shares = np.bincount(np.asarray(quantizer.quantize(z)), minlength=8) / 256
        return -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))

    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)
    gradient = jit(jax.grad(lambda params: nnx.merge(graph, params, buffers)(z).loss))
    before = entropy()
    for _ in range(60):
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient(params))
    nnx.update(quantizer, params)
    assert entropy() > before + 0.1


# The codebook over training steps


def test_kaiming_codes_fill_the_he_interval():
    codes = np.asarray(make(num_codewords=512, embedding_dim=6, init_method="kaiming").codebook[...])
    assert np.abs(codes).max() <= 1.0  # sqrt(6 / 6)
    np.testing.assert_allclose(codes.std(), 1.0 / 3.0**0.5, rtol=0.05)


def test_fixed_codes_lie_on_the_sphere_and_are_no_parameters():
    quantizer = make(init_method="fixed", pretrain_steps=2)
    before = np.asarray(quantizer.codebook[...])
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1.0, rtol=1e-5)
    assert len(nnx.to_flat_state(nnx.state(quantizer, nnx.Param))) == 0
    step, state = training_step(quantizer)
    for seed in range(4):
        state, _ = step(state, normal(seed, 10, 4), jax.random.key(seed))
    np.testing.assert_array_equal(state["codebook"][...], before)


@pytest.mark.parametrize("init_method", ["latent_random", "kaiming", "fixed"])
def test_warm_start_is_the_identity_for_exactly_that_many_steps(init_method):
    quantizer = make(pretrain_steps=3, init_method=init_method, penalty_weight=0.25)
    step, state = training_step(quantizer)
    graph, _ = nnx.split(quantizer)

    def weighted_sum(z, state, weights):
        output = nnx.merge(graph, state)(z)
        return jnp.sum(weights * output.z_q) + output.loss

    identity = jit(jax.grad(weighted_sum))
    before = np.asarray(quantizer.codebook[...])
    for i in range(3):
        z, weights = normal(i, 5, 2, 4), normal(100 + i, 5, 2, 4)
        np.testing.assert_array_equal(state["codebook"][...], before)
        np.testing.assert_array_equal(identity(z, state, weights), weights)
        state, output = step(state, z, jax.random.key(i))
        np.testing.assert_array_equal(output.z_q, z)
        learned = set() if init_method == "fixed" else {"codebook"}  # nothing would learn from it
        assert set(output.losses) == {"commitment", "penalty"} | learned
        assert all(loss == 0.0 for loss in output.losses.values())
        assert output.loss == 0.0

    codes = np.asarray(state["codebook"][...])
    if init_method == "latent_random":
        last = np.asarray(z).reshape(10, 4)
        drawn = [np.flatnonzero((last == code).all(axis=1)).tolist() for code in codes]
        assert len({ids[0] for ids in drawn}) == 8
    else:
        np.testing.assert_array_equal(codes, before)

    z = normal(3, 5, 2, 4)
    state, output = step(state, z, jax.random.key(3))
    np.testing.assert_array_equal(output.z_q, codes[nearest(z, codes)])
    assert output.loss > 0.0
    np.testing.assert_array_equal(state["codebook"][...], codes)  # drawn once only
    assert state["steps"][...] == 4


def test_warm_start_gives_the_codebook_no_gradient():
    params, _ = gradients(make(pretrain_steps=3, penalty_weight=1.0), normal(1, 6, 4), lambda output: output.loss)
    assert (params["codebook"][...] == 0.0).all()


@pytest.mark.parametrize("replace_freq", [0, 1, 3])
def test_without_warm_start_the_first_step_draws_the_codes(replace_freq):
    step, state = training_step(make(replace_freq=replace_freq))
    before, z = np.asarray(state["codebook"][...]), normal(0, 20, 4)
    state, output = step(state, z, jax.random.key(0))
    np.testing.assert_array_equal(output.z_q, before[nearest(z, before)])
    codes = np.asarray(state["codebook"][...])
    assert all((np.asarray(z) == code).all(axis=1).any() for code in codes)
    assert len(np.unique(codes, axis=0)) == 8
    if replace_freq:  # what the discarded codes were used for does not count against the new ones
        np.testing.assert_array_equal(state["countdown"][...], replace_freq)


@pytest.mark.parametrize(
    "options",
    [{"init_method": "kaiming"}, {"pretrain_steps": 4}, {"init_method": "fixed", "cos_dist": True}],
    ids=str,
)
def test_replacement_follows_the_countdown(options):
    quantizer = make(num_codewords=32, replace_freq=3, **options)
    warm = quantizer.pretrain_steps
    step, state = training_step(quantizer)
    countdown, num_replaced = np.full(32, 3), 0
    for i in range(40):
        z = normal(i, 6, 4) + 2.0 * normal(1000 + i // 5, 4)  # a cloud that moves on every fifth step
        codes = np.asarray(state["codebook"][...])
        state, output = step(state, z, jax.random.key(i))
        now = np.asarray(state["codebook"][...])
        if i < warm:
            np.testing.assert_array_equal(state["countdown"][...], 3)
            continue
        used = np.isin(np.arange(32), np.asarray(output.token_ids))
        countdown = np.where(used, 3, countdown - 1)
        stale = countdown == 0
        countdown[stale] = 3
        np.testing.assert_array_equal((now != codes).any(axis=1), stale)
        np.testing.assert_array_equal(state["countdown"][...], countdown)
        for code in now[stale]:
            assert (np.linalg.norm(z - code, axis=1) < 0.04 * np.linalg.norm(z, axis=1)).any()
        num_replaced += stale.sum()
    assert 32 < num_replaced < 32 * 40 // 3


def test_no_replacement_without_replace_freq():
    step, state = training_step(make(init_method="kaiming"))
    before = np.asarray(state["codebook"][...])
    for i in range(5):
        state, _ = step(state, normal(0, 1, 4), jax.random.key(i))
    np.testing.assert_array_equal(state["codebook"][...], before)


# What a caller can get wrong


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_codewords", 1),
        ("embedding_dim", 0),
        ("proj_dim", 0),
        ("pretrain_steps", -1),
        ("replace_freq", -1),
        ("init_method", "random"),
        ("replace_noise", -0.1),
        ("penalty_weight", -0.5),
        ("commitment_weight", -1.0),
        ("codebook_weight", -1.0),
        ("penalty_temperature", 0.0),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"{name} is {value!r}"):
        make(**{name: value})


def test_an_unknown_init_method_lists_the_known():
    with pytest.raises(UserError, match="kaiming, latent_random, kmeans, fixed"):
        make(init_method="random")


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="5 wide, but embedding_dim is 4"):
        getattr(make(), method)(jnp.zeros((3, 5)))
