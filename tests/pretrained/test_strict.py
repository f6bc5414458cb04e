"""The strict loader, on a module of two layers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from vgpt_jax import UserError
from vgpt_jax.pretrained.strict import conv_kernel, linear_kernel, load_strictly, unchanged


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (2, 2), padding="VALID", rngs=rngs)
        self.linears = nnx.List([nnx.Linear(4, 5, rngs=rngs)])

    def __call__(self, x):
        return self.linears[0](jnp.mean(self.conv(x), axis=(1, 2)))


def create():
    return Network(nnx.Rngs(0))


TABLE = {
    "conv.kernel": (conv_kernel, ("c.weight",)),
    "conv.bias": (lambda a, b: a + b, ("c.bias", "c.more")),
    "linears.0.kernel": (linear_kernel, ("l.weight",)),
    "linears.0.bias": (unchanged, ("l.bias",)),
}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"c.weight": (4, 3, 2, 2), "c.bias": (4,), "c.more": (4,), "l.weight": (5, 4), "l.bias": (5,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_it_computes_what_pytorch_computes(tensors):
    network = load_strictly(create, tensors | {"counter": np.ones(1)}, TABLE, "file.pt", ignored=["counter", "absent"])
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 3)).astype(np.float32)
    t = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    y = torch.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), t["c.weight"], t["c.bias"] + t["c.more"])
    expected = torch.nn.functional.linear(y.mean((2, 3)), t["l.weight"], t["l.bias"])
    np.testing.assert_allclose(network(x), expected.numpy(), atol=1e-5)


def test_values_take_our_dtype(tensors):
    network = load_strictly(create, {name: t.astype(np.float64) for name, t in tensors.items()}, TABLE, "file.pt")
    assert network.conv.kernel.dtype == jnp.float32


def test_a_kernel_of_a_pointwise_convolution_is_a_linear_one():
    kernel = np.arange(6.0).reshape(3, 2, 1, 1)
    np.testing.assert_array_equal(linear_kernel(kernel), [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]])


def test_all_that_does_not_fit_is_listed_at_once(tensors):
    table = TABLE | {"norm.scale": (unchanged, ("n.weight",)), "conv.kernel": (unchanged, ("c.weight",))}
    del table["linears.0.bias"], tensors["c.more"]
    with pytest.raises(UserError) as found:
        load_strictly(create, tensors, table, "file.pt")
    head, _, problems = str(found.value).partition(": ")
    assert head == "file.pt does not fit"
    assert problems.split("; ") == [
        "l.bias has no place in ours",
        "c.more is missing",
        "n.weight is missing",
        "our linears.0.bias is not filled",
        "there is no norm.scale in ours",
        "c.weight give (4, 3, 2, 2) for our conv.kernel of (2, 2, 3, 4)",
    ]
