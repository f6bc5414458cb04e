import jax.numpy as jnp
import numpy as np
import pytest

from vgpt_jax.data.loader import evaluation_batches
from vgpt_jax.evaluation.runner import mean_over, summed
from vgpt_jax.training.sharding import make_mesh

BATCH_SIZE = 16  # a multiple of one and of eight devices


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


class Values:
    """Examples of three random numbers."""

    def __init__(self, count):
        self.values = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"x": self.values[index]}


def squares(scale, batch):
    x = batch["x"]
    return {"square": scale * jnp.sum(x**2, axis=1), "x": x, "outer": x[:, :, None] * x[:, None]}


@pytest.mark.parametrize("count", [5, 16, 21, 40])
def test_masked_means_are_the_plain_mean_over_examples(mesh, count):
    source = Values(count)
    batches = evaluation_batches(source, lambda example: example, batch_size=BATCH_SIZE)
    means = mean_over(summed(squares), jnp.float32(2.0), batches, mesh)
    assert set(means) == {"square", "x", "outer"}
    x = source.values.astype(np.float64)
    np.testing.assert_allclose(means["square"], 2 * np.mean(np.sum(x**2, axis=1)), rtol=1e-5)
    np.testing.assert_allclose(means["x"], x.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(means["outer"], np.mean(x[:, :, None] * x[:, None], axis=0), atol=1e-5)


def test_means_are_of_double_precision(mesh):
    batches = evaluation_batches(Values(5), lambda example: example, batch_size=BATCH_SIZE)
    means = mean_over(summed(squares), jnp.float32(1.0), batches, mesh)
    assert all(value.dtype == np.float64 for value in means.values())


def test_what_is_masked_does_not_count_even_if_it_is_not_a_number(mesh):
    mask = np.arange(BATCH_SIZE) < 3
    batch = {"x": np.where(mask[:, None], np.float32(2.0), np.float32(np.nan)) * np.ones(3, np.float32), "mask": mask}
    means = mean_over(summed(squares), jnp.float32(1.0), [batch], mesh)
    assert means["square"] == 12.0
    np.testing.assert_array_equal(means["x"], [2.0, 2.0, 2.0])


def test_a_value_that_is_not_a_number_is_not_hidden(mesh):
    batch = {"x": np.full((BATCH_SIZE, 3), np.nan, np.float32), "mask": np.arange(BATCH_SIZE) < 3}
    means = mean_over(summed(squares), jnp.float32(1.0), [batch], mesh)
    assert np.isnan(means["square"])


def test_batches_of_different_fill_are_weighed_by_their_examples(mesh):
    def batch(value, count):
        return {"x": np.full((BATCH_SIZE, 3), value, np.float32), "mask": np.arange(BATCH_SIZE) < count}

    means = mean_over(summed(squares), jnp.float32(1.0), [batch(1.0, 16), batch(5.0, 4)], mesh)
    np.testing.assert_allclose(means["x"], 3 * [1.8])
