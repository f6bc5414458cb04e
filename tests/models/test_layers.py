"""Kernels are drawn as they would be by the initializers that Flax has, to the bit."""

import jax
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.models.layers import drawn_as_matrix, lecun_normal


@pytest.mark.parametrize("shape", [(3, 5, 6, 4), (7, 3)])
def test_kernels_drawn_as_matrices_are_the_same_kernels(shape):
    key, normal = jax.random.key(3), nnx.initializers.normal(0.02)
    for ours, original in ((lecun_normal, nnx.initializers.lecun_normal()), (drawn_as_matrix(normal), normal)):
        drawn, wanted = (jax.jit(draw, static_argnums=1)(key, shape) for draw in (ours, original))
        np.testing.assert_array_equal(drawn, wanted)
