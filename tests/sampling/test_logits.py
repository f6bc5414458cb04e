"""Filters against NumPy by hand, and what is drawn against the filters, by chi-square and by inverting in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vgpt_jax.sampling.logits import draw, filter_logits, guide

LOGITS = np.array([0.3, 2.0, -1.0, 1.2, 1.1, 0.0, -3.0, 1.9], np.float32)
TIED = np.array([1.0, 2.0, 1.0, -0.0, 2.0, 1.0, 0.0, 1.0], np.float32)
BELOW_1 = np.nextafter(np.float32(1), np.float32(0))
OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 8},
    {"top_p": 0.7},
    {"top_p": 1.0},
    {"min_p": 0.3},
    {"min_p": 0.0},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.8},
    {"top_k": 8, "top_p": 0.05},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.9, "min_p": 0.35},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.1},
]


def expected_distribution(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float | None = None,
    min_p: float | None = None,
) -> np.ndarray:
    """Temperature, the k largest, the smallest set that reaches top_p, min-p: one token after the other, float64.

    Equal logits are taken in the order of their ids.
    """
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    probabilities /= probabilities.sum()
    result, total = np.zeros(len(logits)), 0.0
    for index, probability in zip(order, probabilities, strict=True):
        if min_p is None or probability >= min_p * probabilities[0]:
            result[index] = probability
        total += probability
        if top_p is not None and top_p < 1 and total >= top_p:
            break
    return result / result.sum()


compiled_filter = jax.jit(
    lambda logits, traced, top_k: jax.nn.softmax(filter_logits(logits, top_k=top_k, **traced), axis=-1),
    static_argnums=2,
)
compiled_draw = jax.jit(
    lambda logits, uniforms, traced, top_k: draw(logits, uniforms, top_k=top_k, **traced), static_argnums=3
)


def filtered_softmax(logits, traced: dict, top_k: int = 0) -> np.ndarray:
    return np.asarray(compiled_filter(logits, traced, top_k))


def drawn(logits, uniforms, traced: dict, top_k: int = 0) -> np.ndarray:
    return np.asarray(compiled_draw(logits, uniforms, traced, top_k))


def split(options: dict) -> tuple[dict, int]:
    """What is traced, and top-k, which is static."""
    return {name: value for name, value in options.items() if name != "top_k"}, options.get("top_k", 0)


def neutral(options: dict) -> tuple[dict, int]:
    """As `split`, with traced values that do nothing for what is not given: one program for each top-k, not each set."""
    return split({"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | options)


@pytest.mark.parametrize("options", OPTIONS)
def test_filtered_softmax_equals_numpy(options):
    rows = np.stack([LOGITS, LOGITS[::-1], TIED, TIED[::-1]])
    result = filtered_softmax(rows, *neutral(options))
    expected = np.stack([expected_distribution(row, **options) for row in rows])
    np.testing.assert_array_equal(result > 0, expected > 0)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [
        (1000, {"top_k": 300}),
        (1000, {"top_p": 0.9}),
        (1000, {"min_p": 0.05}),
        (1000, {"temperature": 1.5, "top_k": 300, "top_p": 0.8, "min_p": 0.02}),
        (1024, {"temperature": 1.5, "top_k": 300, "top_p": 0.8, "min_p": 0.02}),  # whole blocks
    ],
)
def test_filters_over_many_codes_equal_numpy(vocabulary, options):
    rng = np.random.default_rng(0)
    smooth = rng.normal(0, 3, (5, vocabulary)).astype(np.float32)
    rows = np.concatenate([smooth, np.round(smooth * 2) / 2])  # the second half is full of ties
    result = filtered_softmax(rows, *neutral(options))
    for row, found in zip(rows, result, strict=True):
        expected = expected_distribution(row, **options)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_draws_follow_the_filtered_distribution(options):
    count = 40_000
    uniforms = np.random.default_rng(1).random(count, np.float32)
    tokens = drawn(np.broadcast_to(LOGITS, (count, 8)), uniforms, *neutral(options))
    assert tokens.dtype == np.int32
    observed = np.bincount(tokens, minlength=8)
    expected = expected_distribution(LOGITS, **options)
    np.testing.assert_array_equal(observed[expected == 0], 0)
    possible = expected > 0
    if possible.sum() > 1:
        assert stats.chisquare(observed[possible], expected[possible] * count).pvalue > 1e-3


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 300, "top_p": 0.8, "min_p": 0.02}])
def test_draws_are_the_inverse_of_the_cumulative_distribution(options):
    logits = np.random.default_rng(2).normal(0, 2, 1000).astype(np.float32)
    cumulative = np.cumsum(expected_distribution(logits, **options))
    uniforms = ((np.arange(5000) + 0.5) / 5000).astype(np.float32)
    tokens = drawn(np.broadcast_to(logits, (5000, 1000)), uniforms, *split(options))
    clear = np.abs(uniforms[:, None] - cumulative).min(axis=1) > 2e-6  # nearer, float32 may fall on either side
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(tokens[clear], np.searchsorted(cumulative, uniforms, side="right")[clear])


def test_a_uniform_at_a_border_draws_what_is_behind_it():
    uniforms = np.arange(16, dtype=np.float32) / 16  # exact, as are the sums of 16 equal weights
    np.testing.assert_array_equal(drawn(np.zeros((16, 16), np.float32), uniforms, {}), np.arange(16))


def test_without_options_it_is_exactly_the_softmax():
    logits = np.random.default_rng(3).normal(0, 5, (4, 100)).astype(np.float32)
    for options in ({}, {"top_p": 1.0, "min_p": 0.0}):
        np.testing.assert_array_equal(filtered_softmax(logits, options), jax.jit(jax.nn.softmax)(logits))


def test_top_1_is_greedy_whatever_the_uniform():
    smooth = np.random.default_rng(1).normal(0, 1, (1000, 50)).astype(np.float32)
    logits = np.concatenate([smooth, np.round(smooth)])  # the second half: many equal maxima
    greedy = np.argmax(logits, axis=-1)
    for uniform in (0.0, 0.5, BELOW_1):
        uniforms = np.full(2000, uniform, np.float32)
        np.testing.assert_array_equal(drawn(logits, uniforms, {}, top_k=1), greedy)
        np.testing.assert_array_equal(drawn(logits, uniforms, {"temperature": 3.0, "top_p": 0.9}, top_k=1), greedy)
        np.testing.assert_array_equal(drawn(logits, uniforms, {"top_p": 1e-6}), greedy)  # by the search
    np.testing.assert_array_equal(filtered_softmax(logits, {}, top_k=1), np.eye(50)[greedy])


def test_a_tie_goes_to_the_lower_id():
    assert drawn(np.array([[1.0, 3.0, 3.0]]), np.array([0.99]), {}, top_k=1)[0] == 1
    kept = filtered_softmax(TIED[None], {}, top_k=4)[0] > 0
    np.testing.assert_array_equal(kept, [1, 1, 1, 0, 1, 0, 0, 0])  # both 2s, and two of the four 1s
    kept = filtered_softmax(TIED[None], {}, top_k=7)[0] > 0
    np.testing.assert_array_equal(kept, [1, 1, 1, 1, 1, 1, 0, 1])  # of -0.0 and 0.0, which are equal, the first
    kept = filtered_softmax(np.zeros((1, 10), np.float32), {"top_p": 0.45})[0] > 0
    np.testing.assert_array_equal(kept, np.arange(10) < 5)


def test_temperature_does_not_make_ties():
    near = np.nextafter(np.float32(1), np.float32(2))
    rows = np.array([[0.0, 1.0, near, 1000.0]], np.float32)  # less 1000, the two are equal in float32
    for options in ({"top_k": 2}, {"top_p": 0.4}):
        kept = filtered_softmax(rows, *split({"temperature": 1e6} | options))[0] > 0
        np.testing.assert_array_equal(kept, [0, 0, 1, 1])


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.9}])
def test_impossible_tokens_are_never_drawn(options):
    rows = np.tile(np.array([-np.inf, 0.0, -np.inf, 1.0, -1e4, -np.inf], np.float32), (3, 1))
    uniforms = np.array([0.0, 0.6, BELOW_1], np.float32)
    tokens = drawn(rows, uniforms, *neutral(options))
    np.testing.assert_array_equal(tokens, [1, 3, 3])
    assert np.all(filtered_softmax(rows, *neutral(options))[:, [0, 2, 4, 5]] == 0)


@pytest.mark.parametrize("vocabulary", [1, 7, 1025])
def test_the_last_uniform_draws_the_last_possible_token(vocabulary):
    rng = np.random.default_rng(vocabulary)
    rows = rng.normal(0, 3, (200, vocabulary)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.7] = -np.inf
    rows[:, vocabulary // 2] = 0.0
    possible = rows > -np.inf
    first, last = np.argmax(possible, axis=1), vocabulary - 1 - np.argmax(possible[:, ::-1], axis=1)
    np.testing.assert_array_equal(drawn(rows, np.zeros(200, np.float32), {}), first)
    tokens = drawn(rows, np.full(200, BELOW_1), {})
    assert possible[np.arange(200), tokens].all()
    after = np.array(
        [np.exp(row[token + 1 :]).sum() / np.exp(row).sum() for row, token in zip(rows, tokens, strict=True)]
    )
    assert np.all((tokens == last) | (after < 1e-6))


def test_no_rounding_of_the_sums_draws_an_impossible_token():
    row = np.random.default_rng(0).normal(0, 2, 600).astype(np.float32)
    row[np.arange(600) % 3 > 0] = -np.inf
    cumulative = np.cumsum(expected_distribution(row))[::3]
    steps = np.arange(-8, 9) * 2.0**-25  # about every border between two tokens
    uniforms = np.clip((cumulative[:, None] + steps).ravel(), 0, BELOW_1).astype(np.float32)
    tokens = drawn(np.broadcast_to(row, (len(uniforms), 600)), uniforms, {})
    assert np.all(row[tokens] > -np.inf)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}])
def test_extreme_logits(options):
    rows = np.array([[1e4, -1e4, 9999.5], [-1e4, -3e38, -1e4], [1e-30, 0.0, -1e-30], [7.0, 7.0, 7.0]], np.float32)
    result = filtered_softmax(rows, *neutral(options))
    expected = np.stack([expected_distribution(row, **options) for row in rows])
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_a_temperature_near_zero_is_greedy():
    rows = np.array([[1e4, -1e4, 9999.5], [-1e4, -2.0, -1.0]], np.float32)
    for uniform in (0.0, BELOW_1):
        tokens = drawn(rows, np.full(2, uniform, np.float32), {"temperature": 1e-37, "top_p": 0.9})
        np.testing.assert_array_equal(tokens, [0, 2])


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_p": -1.0}, {"min_p": 1.0}, {"min_p": 2.0}])
def test_one_token_always_stays(options):
    kept = filtered_softmax(np.stack([LOGITS, LOGITS[::-1]]), *neutral(options)) > 0
    np.testing.assert_array_equal(kept, [np.arange(8) == 1, np.arange(8) == 6])


def test_top_p_1_keeps_all_where_rounding_does_not_add_up():
    rows = np.random.default_rng(4).normal(0, 4, (20, 5000)).astype(np.float32)
    assert np.all(filtered_softmax(rows, {"top_p": 1.0}) > 0)
    nearly = np.sum(filtered_softmax(rows, {"top_p": BELOW_1}) > 0, axis=1)
    assert np.all((nearly > 2500) & (nearly <= 5000))


def test_a_row_may_have_options_of_its_own():
    options = {"temperature": [[0.5], [2.0]], "top_p": [[0.4], [0.9]], "min_p": [[0.9], [0.05]]}
    result = filtered_softmax(np.stack([LOGITS, LOGITS]), {k: np.array(v, np.float32) for k, v in options.items()})
    for i in range(2):
        expected = expected_distribution(LOGITS, **{name: value[i][0] for name, value in options.items()})
        np.testing.assert_allclose(result[i], expected, atol=1e-6)


def test_bfloat16_is_filtered_in_float32():
    logits = jnp.stack([LOGITS, LOGITS[::-1]]).astype(jnp.bfloat16)
    filtered = jax.jit(lambda x: filter_logits(x, temperature=1.3, top_k=5))(logits)
    assert filtered.dtype == jnp.float32
    expected = expected_distribution(np.asarray(logits[0], np.float32), temperature=1.3, top_k=5)
    np.testing.assert_allclose(jax.nn.softmax(filtered[0]), expected, atol=1e-6)


def test_all_but_top_k_is_traced():
    traces = []

    @jax.jit
    def run(uniforms, options, scale):
        traces.append(1)
        logits = jnp.tile(LOGITS, (4, 1))
        return draw(guide(logits, logits[:, ::-1], scale), uniforms, top_k=5, **options)

    for temperature, top_p, min_p, scale in ((1.0, 0.5, 0.0, 1.0), (0.7, 0.9, 0.2, 3.0)):
        run(jnp.linspace(0, 0.9, 4), {"temperature": temperature, "top_p": top_p, "min_p": min_p}, scale)
    assert len(traces) == 1


def primitives(jaxpr) -> set[str]:
    """Names of all primitives in a jaxpr and those inside it."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                names |= primitives(inner.jaxpr)
    return names


@pytest.mark.parametrize("top_k", [0, 1, 20])
def test_nothing_is_sorted(top_k):
    def run(logits, uniforms, top_p, min_p):
        return draw(logits, uniforms, top_k=top_k, top_p=top_p, min_p=min_p)

    found = primitives(jax.make_jaxpr(run)(jnp.zeros((2, 600)), jnp.zeros(2), 0.5, 0.1).jaxpr)
    assert not {name for name in found if "sort" in name or "top_k" in name or "topk" in name}
    assert ("argmax" in found) and (("cumsum" in found) == (top_k != 1))  # it does look inside


def test_without_a_filter_nothing_is_searched():
    def run(logits, uniforms, temperature):
        return draw(logits, uniforms, temperature=temperature)

    found = primitives(jax.make_jaxpr(run)(jnp.zeros((2, 600)), jnp.zeros(2), 0.5).jaxpr)
    assert "cumsum" in found and not found & {"while", "scan", "bitcast_convert_type"}


def test_guidance():
    conditional, unconditional = np.random.default_rng(5).normal(0, 7, (2, 3, 40)).astype(np.float32)
    run = jax.jit(guide)
    np.testing.assert_array_equal(run(conditional, unconditional, 1.0), conditional)
    np.testing.assert_allclose(run(conditional, unconditional, 0.0), unconditional, atol=1e-5)
    a, b = np.asarray(conditional, np.float64), np.asarray(unconditional, np.float64)
    np.testing.assert_allclose(run(conditional, unconditional, 2.5), 2.5 * a - 1.5 * b, atol=1e-5)
    scales = np.array([[1.0], [0.0], [4.0]], np.float32)
    np.testing.assert_allclose(run(conditional, unconditional, scales), scales * a + (1 - scales) * b, atol=1e-5)
    assert run(conditional.astype(jnp.bfloat16), unconditional.astype(jnp.bfloat16), 1.5).dtype == jnp.float32
