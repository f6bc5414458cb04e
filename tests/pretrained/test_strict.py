"""The strict loader, on a module of two layers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from vgpt_jax import UserError
from vgpt_jax.pretrained.stored_tensor import StoredTensor
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


def test_each_tensor_is_taken_out_when_it_is_used_for_the_last_time(tensors):
    """What is left when a tensor is read is what is still to come: a checkpoint need not be in memory beside the module."""
    left = []

    def read(name):
        left.append((name, sorted(stored)))
        return tensors[name]

    table = TABLE | {"linears.0.bias": (lambda a, b: a + b, ("l.bias", "l.bias")), "conv.bias": TABLE["conv.bias"]}
    stored = {name: StoredTensor(t.shape, t.dtype, lambda name=name: read(name)) for name, t in tensors.items()}
    network = load_strictly(create, stored, table, "file.pt")
    assert left == [
        ("c.weight", ["c.bias", "c.more", "c.weight", "l.bias", "l.weight"]),
        ("c.bias", ["c.bias", "c.more", "l.bias", "l.weight"]),
        ("c.more", ["c.bias", "c.more", "l.bias", "l.weight"]),
        ("l.weight", ["l.bias", "l.weight"]),
        ("l.bias", ["l.bias"]),
        ("l.bias", ["l.bias"]),
    ]
    assert not stored
    np.testing.assert_allclose(network.linears[0].bias[...], 2 * tensors["l.bias"])


def test_a_tensor_that_two_variables_share(tensors):
    table = TABLE | {"linears.0.bias": (lambda a: np.append(a, 0.0), ("c.more",))}
    del tensors["l.bias"]
    network = load_strictly(create, tensors, table, "file.pt")
    assert float(network.linears[0].bias[...][4]) == 0.0


def test_a_tensor_of_other_dimensions_is_one_of_the_problems(tensors):
    tensors["c.weight"] = np.ones((4, 3), np.float32)
    tensors["l.bias"] = np.ones((2, 2), np.float32)
    with pytest.raises(UserError) as found:
        load_strictly(create, tensors, TABLE, "file.pt")
    assert str(found.value).partition(" does not fit: ")[2].split("; ") == [
        "c.weight (4, 3) cannot become our conv.kernel of (2, 2, 3, 4)",
        "l.bias give (2, 2) for our linears.0.bias of (5,)",
    ]


def never():
    raise AssertionError("it was read")


def test_nothing_is_read_of_what_does_not_fit(tensors):
    stored = {name: StoredTensor(t.shape, t.dtype, never) for name, t in tensors.items()}
    stored["l.weight"] = StoredTensor((10**6, 4), np.dtype("f4"), never)
    with pytest.raises(UserError, match=r"fit: l.weight give \(4, 1000000\) for our linears.0.kernel of \(4, 5\)$"):
        load_strictly(create, stored, TABLE, "file.pt")


def test_more_values_than_are_stored_are_refused_whatever_their_shape(tensors):
    """As of a tensor with a stride of 0, which would take any amount of memory."""
    enormous = StoredTensor((10**12, 10**6), np.dtype("f4"), never, repeats=True)
    tensors |= {"c.more": enormous, "unused": enormous, "l.weight": np.ones((5, 4), np.complex64)}
    with pytest.raises(UserError) as found:
        load_strictly(create, tensors, TABLE, "file.pt", ignored=["unused"])
    assert str(found.value).partition(" does not fit: ")[2].split("; ") == [
        "c.more (1000000000000, 1000000) has more values than are stored of it",
        "l.weight holds complex64, but real numbers are needed",
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_a_value_that_is_not_finite_is_refused(tensors, dtype, value):
    if value == 1e300 and dtype != "float64":
        value = float("nan")
    tensors["c.weight"] = tensors["c.weight"].astype(jnp.dtype(dtype))
    tensors["c.weight"][1, 2, 1, 0] = value
    with pytest.raises(
        UserError, match="^file.pt does not fit: c.weight has values that are NaN or infinite in float32$"
    ):
        load_strictly(create, tensors, TABLE, "file.pt")
