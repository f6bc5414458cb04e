"""Rotary tables against NumPy by hand, position by position, and the invariants that make them worth having."""

import jax
import numpy as np
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.models.rotary import ROTATIONS, rotary_table, rotate

GRID, TOKENS, WIDTH, BASE = (3, 4), 12, 8, 100.0

rotated = jax.jit(rotate)


def by_hand(angles: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.cos(angles), np.sin(angles)


def rotations(name: str) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rotary_table(name, TOKENS, GRID, WIDTH, BASE)
    return cos[None], sin[None]


def test_along_the_sequence_every_pair_turns_with_the_position():
    cos, sin = rotary_table("rotary", TOKENS, (), WIDTH, BASE)
    assert cos.shape == sin.shape == (1 + TOKENS, WIDTH // 2) and cos.dtype == sin.dtype == np.float32
    for position in range(1 + TOKENS):  # wavelengths grow by the fourth root of 100 from pair to pair
        expected = by_hand([position, position / 100**0.25, position / 10, position / 100**0.75])
        np.testing.assert_allclose((cos[position], sin[position]), expected, atol=1e-6)


def test_over_the_grid_half_the_pairs_turn_with_the_row_and_half_with_the_column():
    cos, sin = rotary_table("rotary_2d", TOKENS, GRID, WIDTH, BASE)
    np.testing.assert_array_equal(cos[0], 1.0)
    np.testing.assert_array_equal(sin[0], 0.0)
    for row in range(3):
        for column in range(4):
            place = 1 + 4 * row + column
            expected = by_hand([row, row / 10, column, column / 10])
            np.testing.assert_allclose((cos[place], sin[place]), expected, atol=1e-6)


def test_llamagens_differs_in_the_condition_alone_which_becomes_zero():
    (cos, sin), (cos_2d, sin_2d) = (
        rotary_table(name, TOKENS, GRID, WIDTH, BASE) for name in ("rotary_llamagen", "rotary_2d")
    )
    np.testing.assert_array_equal((cos[0], sin[0]), 0.0)
    np.testing.assert_array_equal((cos[1:], sin[1:]), (cos_2d[1:], sin_2d[1:]))


def test_a_channel_turns_with_the_one_half_a_head_away():
    x = np.random.default_rng(0).normal(size=(2, 3, 1 + TOKENS, WIDTH)).astype(np.float32)
    cos, sin = rotary_table("rotary_2d", TOKENS, GRID, WIDTH, BASE)
    expected = np.empty_like(x)
    for pair in range(WIDTH // 2):
        a, b = x[..., pair], x[..., pair + WIDTH // 2]
        expected[..., pair] = a * cos[:, pair] - b * sin[:, pair]
        expected[..., pair + WIDTH // 2] = a * sin[:, pair] + b * cos[:, pair]
    np.testing.assert_allclose(rotated(x, rotations("rotary_2d")), expected, atol=1e-6)


def test_each_example_may_have_rotations_of_its_own():
    x = np.random.default_rng(1).normal(size=(2, 3, 2, WIDTH)).astype(np.float32)
    positions = np.array([[0, 5], [7, 2]])
    cos, sin = (table[0][positions] for table in rotations("rotary"))
    both = rotated(x, (cos, sin))
    for example in range(2):
        alone = rotated(x[example : example + 1], (cos[example][None], sin[example][None]))
        np.testing.assert_allclose(both[example], alone[0], atol=1e-6)


@pytest.mark.parametrize("name", ["rotary", "rotary_2d"])
def test_lengths_are_kept(name):
    x = np.random.default_rng(2).normal(size=(2, 1, 1 + TOKENS, WIDTH)).astype(np.float32)
    y = np.asarray(rotated(x, rotations(name)))
    assert not np.allclose(x[:, :, 2:], y[:, :, 2:], atol=0.1)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def scores(name: str) -> np.ndarray:
    """Products ``[1 + N, 1 + N]`` of one query and one key, the same at every position but for the rotation."""
    query, key = np.random.default_rng(3).normal(size=(2, 1, 1, 1, WIDTH)).astype(np.float32)
    everywhere = (1, 1, 1 + TOKENS, WIDTH)
    query, key = (rotated(np.broadcast_to(x, everywhere), rotations(name))[0, 0] for x in (query, key))
    return np.asarray(query @ key.T)


def test_scores_along_the_sequence_depend_on_the_distance_alone():
    table = scores("rotary")
    for distance in range(-TOKENS, TOKENS + 1):
        diagonal = np.diagonal(table, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(table[0]) > 0.5


def test_scores_over_the_grid_depend_on_the_distances_of_rows_and_of_columns():
    table = scores("rotary_2d")[1:, 1:].reshape(*GRID, *GRID)
    np.testing.assert_allclose(table[1:, :, 1:], table[:-1, :, :-1], atol=1e-5)
    np.testing.assert_allclose(table[:, 1:, :, 1:], table[:, :-1, :, :-1], atol=1e-5)
    assert np.ptp(table[0, 0, :, 0]) > 0.1 and np.ptp(table[0, 0, 0]) > 0.1


def test_no_rotation_is_the_identity():
    x = np.ones((1, 1, 2, WIDTH), np.float32)
    assert rotate(x, None) is x


def test_it_is_computed_in_float32_and_given_back_in_the_dtype_of_the_input():
    x = np.random.default_rng(4).normal(size=(1, 1, 1 + TOKENS, WIDTH)).astype(jax.numpy.bfloat16)
    y = rotated(x, rotations("rotary"))
    assert y.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(y, rotated(x.astype(np.float32), rotations("rotary")).astype(jax.numpy.bfloat16))


@pytest.mark.parametrize(
    ("name", "grid", "width", "named"),
    [
        ("rotary", (), 7, "even width, not 7"),
        ("rotary_2d", (), 8, r"grid of two sides, not \(\)"),
        ("rotary_2d", (2, 2, 3), 8, "grid of two sides"),
        ("rotary_2d", (3, 4), 6, "multiple of 4 wide, not 6"),
        ("rotary_llamagen", (3, 4), 6, "multiple of 4 wide, not 6"),
    ],
)
def test_what_does_not_fit_is_refused(name, grid, width, named):
    assert name in ROTATIONS
    with pytest.raises(UserError, match=named):
        rotary_table(name, TOKENS, grid, width, BASE)
