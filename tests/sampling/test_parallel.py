"""Several tokens a step: against `generate` with one a step, and against whole sequences, run anew for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import BLOCKS, GPT
from vgpt_jax.sampling.generate import Options, generate
from vgpt_jax.sampling.logits import draw
from vgpt_jax.sampling.parallel import GROUP_SCHEDULES, generate_in_parallel, group_sizes

TOKENS, CODES = 9, 12
SCHEDULE = np.linspace(0.5, 3, TOKENS, dtype=np.float32)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """Far from uniform and from its start; two layers, so that what a query leaves in the cache would be seen."""
    sizes = {"num_codes": CODES, "num_classes": 2, "num_tokens": TOKENS, "grid": (3, 3)}
    sizes |= {"d_model": 16, "num_layers": 2, "num_heads": 2}
    gpt = GPT(**sizes, **BLOCKS["llama"], conditioning="both", random_order=True, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    move = lambda x: x + 0.4 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    nnx.update(gpt, jax.tree.map(move, nnx.state(gpt, nnx.Param)))
    return gpt


@pytest.fixture(scope="module")
def conditions(gpt) -> jax.Array:
    return gpt.condition_ids(jnp.array([0, 1, 1]), 3)


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    return np.random.default_rng(1).random((3, TOKENS), np.float32)


@pytest.fixture(scope="module")
def orders() -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.array([rng.permutation(TOKENS) for _ in range(3)], np.int32)


def in_parallel(gpt, conditions, uniforms, options, orders, sizes) -> jax.Array:
    run = nnx.jit(generate_in_parallel, static_argnames="sizes")
    return run(gpt, conditions, uniforms, options, orders=orders, sizes=sizes)


logits_of = nnx.jit(lambda gpt, ids, orders: gpt(ids, orders=orders)[..., : gpt.num_codes])
draw_jitted = jax.jit(draw, static_argnames="top_k")


def naively(gpt, conditions, uniforms, options, orders, sizes) -> np.ndarray:
    """Each token of a step from a run of the whole sequence, its last input told the token's place instead of its own."""
    rows, written = np.arange(3), 0
    ids = np.concatenate([np.asarray(conditions)[:, None], np.zeros((3, TOKENS), np.int32)], axis=1)
    for size in sizes:
        before = ids.copy()
        for i in range(written, written + size):
            told = orders.copy()  # later places, which the swap moves too, are not seen
            told[:, [written, i]] = told[:, [i, written]]
            logits = np.asarray(logits_of(gpt, before[:, :-1], told)[:, written])
            if options.guidance is not None:
                blank = np.concatenate([np.full((3, 1), gpt.begin_id, np.int32), before[:, 1:-1]], axis=1)
                unconditional = np.asarray(logits_of(gpt, blank, told)[:, written])
                scale = np.broadcast_to(options.guidance, TOKENS)[i]
                logits = unconditional + scale * (logits - unconditional)
            filters = {"temperature": options.temperature, "top_p": options.top_p, "min_p": options.min_p}
            token = draw_jitted(logits, uniforms[rows, orders[:, i]], top_k=options.top_k, **filters)
            ids[:, i + 1] = token
        written += size
    return np.take_along_axis(ids[:, 1:], np.argsort(orders, axis=1), axis=1)


@pytest.mark.parametrize("options", [Options(), Options(guidance=SCHEDULE, top_k=6, top_p=0.9)])
def test_one_token_a_step_is_generate(gpt, conditions, uniforms, orders, options):
    expected = nnx.jit(lambda *inputs, orders: generate(*inputs, orders=orders))(
        gpt, conditions, uniforms, options, orders=orders
    )
    written = in_parallel(gpt, conditions, uniforms, options, orders, (1,) * TOKENS)
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 2, 2, 4), Options()),
        ((3, 3, 3), Options(guidance=2.0)),
        ((4, 1, 3, 1), Options(guidance=SCHEDULE, temperature=1.2, top_k=6, top_p=0.9, min_p=0.02)),
        ((9,), Options(guidance=SCHEDULE)),
    ],
)
def test_several_tokens_a_step_equal_whole_sequences_run_anew(gpt, conditions, uniforms, orders, sizes, options):
    written = in_parallel(gpt, conditions, uniforms, options, orders, sizes)
    np.testing.assert_array_equal(written, naively(gpt, conditions, uniforms, options, orders, sizes))
    assert written.shape == (3, TOKENS) and written.dtype == jnp.int32


@pytest.mark.parametrize(
    ("num_tokens", "num_steps", "schedule", "expected"),
    [
        (8, 4, "even", [2, 2, 2, 2]),
        (9, 4, "even", [2, 2, 3, 2]),  # 2.25 and 4.5, both rounded down, 6.75 up
        (5, 5, "cosine", [1, 1, 1, 1, 1]),
        (64, 4, "cosine", [5, 14, 21, 24]),  # 64 * (1 - cos(pi / 8)) = 4.87, then 18.75, 39.51, 64, rounded
        (16, 8, "cosine", [1, 1, 1, 2, 2, 3, 3, 3]),  # 0.31, 1.22, 2.70, 4.69, 7.11, 9.88, 12.88, 16
        (9, 1, "cosine", [9]),
    ],
)
def test_group_sizes_by_hand(num_tokens, num_steps, schedule, expected):
    np.testing.assert_array_equal(group_sizes(num_tokens, num_steps, schedule), expected)


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES)
def test_group_sizes_add_up_in_as_many_steps_as_asked(schedule):
    for num_tokens in (1, 7, 64):
        for num_steps in range(1, num_tokens + 1):
            sizes = group_sizes(num_tokens, num_steps, schedule)
            assert len(sizes) == num_steps and sizes.sum() == num_tokens and sizes.min() >= 1


def test_cosine_groups_rise():
    for num_steps in (4, 8, 16, 32):
        sizes = group_sizes(1024, num_steps)
        assert (np.diff(sizes) >= 0).all() and sizes[-1] > 1.4 * 1024 / num_steps


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((9, 0), "num_steps is 0, but must be between 1 and the 9 tokens"),
        ((9, 10), "num_steps is 10"),
        ((9, 3, "square"), "group_schedule is 'square'"),
    ],
)
def test_steps_that_do_not_fit_are_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        group_sizes(*arguments)
