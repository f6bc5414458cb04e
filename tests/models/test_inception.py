"""The pools of Inception by hand; the whole network is compared in ``tests/pretrained/test_inception.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.inception import POOLS, Branch, InceptionV3, Layer


def test_pools_by_hand():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    average, maximum, halved = (
        np.asarray(jax.jit(POOLS[name])(x))[0, :, :, 0] for name in ("average", "maximum", "halve")
    )
    np.testing.assert_allclose(average, [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]])  # only what is inside the map counts
    np.testing.assert_array_equal(maximum, [[4, 5, 5], [7, 8, 8], [7, 8, 8]])
    np.testing.assert_array_equal(halved, [[8]])
    np.testing.assert_array_equal(jax.jit(POOLS["maximum"])(-x - 1)[0, 0, 0, 0], -1)  # the padding is no zero


def test_published_names_of_a_branch():
    assert Branch("pool", ()).layer_names() == []
    assert Branch("branch1x1", (Layer(1),)).layer_names() == ["branch1x1"]
    assert Branch("branch7x7", (Layer(1),) * 3).layer_names() == ["branch7x7_1", "branch7x7_2", "branch7x7_3"]
    assert Branch("branch3x3", (Layer(1),) * 3, fork=True).layer_names() == [
        "branch3x3_1",
        "branch3x3_2a",
        "branch3x3_2b",
    ]


def test_sizes():
    network = nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0)))
    published, channels = 21_785_568, 17_216  # parameters without the classifiers; each channel had a scale and a shift
    assert sum(x.size for x in jax.tree.leaves(nnx.state(network))) == published - channels
    shape = nnx.eval_shape(lambda n, x: n(x), network, jax.ShapeDtypeStruct((3, 20, 30, 3), jnp.float32)).shape
    assert shape == (3, 2048)
    with pytest.raises(UserError, match="Inception needs pictures of at least 75 pixels, but was given .74, 90."):
        nnx.eval_shape(lambda n: n.features(jnp.zeros((1, 74, 90, 3))), network)
