"""The ViT in NumPy, its activations, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.vit import ACTIVATIONS, ViT

SIZES = {
    "image_size": 6,
    "patch_size": 3,
    "d_model": 8,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_width": 5,
    "num_classes": 3,
}


def test_logits_are_those_of_numpy_and_the_class_position_sees_every_patch(random_module):
    vit = random_module(lambda: ViT(**SIZES, activation="relu", norm_epsilon=1e-5, rngs=nnx.Rngs(0)), 1.0)
    graph, state = nnx.split(vit)
    picture = np.random.default_rng(0).normal(size=(1, 6, 6, 3)).astype(np.float32)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def apply(layer, x):
        return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    kernel = np.asarray(vit.patches.kernel[...]).reshape(27, 8)
    patches = [picture[0, i : i + 3, j : j + 3].reshape(27) @ kernel for i in (0, 3) for j in (0, 3)]
    x = np.stack([np.asarray(vit.cls[...]), *patches]) + np.asarray(vit.positions[...])
    block, heads = vit.blocks[0], []
    y = norm(x)
    query, key, value = (apply(m, y) for m in (block.attention.query, block.attention.key, block.attention.value))
    for part in (slice(0, 4), slice(4, 8)):
        weights = np.exp(query[:, part] @ key[:, part].T / 2.0)
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
    x = x + apply(block.attention.out, np.concatenate(heads, axis=-1))
    x = x + apply(block.out, np.maximum(apply(block.fc, norm(x)), 0.0))
    expected = apply(vit.classifier, norm(x))[:1]

    run = jax.jit(lambda state, x: jax.value_and_grad(lambda y: nnx.merge(graph, state)(y)[0, 0])(x))
    value, gradient = run(state, picture)
    np.testing.assert_allclose(value, expected[0, 0], atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, picture), expected, atol=1e-5)
    assert (np.abs(gradient) > 1e-6).mean() > 0.9


def test_activations_are_pytorchs():
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    theirs, functional = torch.from_numpy(x), torch.nn.functional
    expected = {
        "gelu": functional.gelu(theirs),
        "gelu_new": functional.gelu(theirs, approximate="tanh"),
        "gelu_pytorch_tanh": functional.gelu(theirs, approximate="tanh"),
        "quick_gelu": theirs * torch.sigmoid(1.702 * theirs),
        "relu": functional.relu(theirs),
        "silu": functional.silu(theirs),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), values.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, "vit.image_size is 6, but must be a multiple of patch_size = 4"),
        ({"num_heads": 3}, "vit.d_model is 8, but must be a multiple of num_heads = 3"),
        ({"num_heads": 0}, "vit.num_heads is 0, but must be at least 1"),
        ({"activation": "tanh"}, "vit.activation is 'tanh', but must be one of gelu, "),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        ViT(**SIZES | changes, rngs=nnx.Rngs(0))


def test_pictures_of_another_size_are_refused():
    vit = nnx.eval_shape(lambda: ViT(**SIZES, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="takes pictures of 6 px with 3 channels, but was given .9, 6, 3."):
        nnx.eval_shape(lambda v: v(jnp.zeros((1, 9, 6, 3))), vit)
