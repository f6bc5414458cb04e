from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from quick_compile import jit
from vgpt_jax import Tokenizer, UserError
from vgpt_jax.models.vqgan import (
    Downsample,
    ResidualBlock,
    Upsample,
    VQGANDecoder,
    VQGANEncoder,
    attended,
    group_norm,
)
from vgpt_jax.pretrained.visual_gpt import read_visual_gpt

GOLDEN = Path(__file__).parents[1] / "golden" / "visual_gpt_cosine"
TINY = {"image_size": 8, "z_channels": 4, "ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1}


def drawn(create):
    """The module that ``create`` makes, with weights by NumPy: JAX would compile an initialiser for every shape."""
    graph, state = nnx.split(nnx.eval_shape(create))
    rng, filled = np.random.default_rng(0), []
    for path, variable in nnx.to_flat_state(state):
        spread = {"kernel": np.prod(variable.shape[:-1]) ** -0.5, "bias": 0.1, "scale": 0.3}.get(path[-1], 0.0)
        value = (path[-1] == "scale") + spread * rng.normal(size=variable.shape)
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def apply(function, module, *args):
    """``function(module, *args)``, compiled."""
    graph, state = nnx.split(module)
    return jit(lambda state, *args: function(nnx.merge(graph, state), *args))(state, *args)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Parity with the PyTorch original


def original(dtype="float32"):
    """The golden tokenizer of visual-gpt, computing in a dtype."""
    converted = next(read_visual_gpt([GOLDEN]))
    tokenizer = nnx.eval_shape(lambda: Tokenizer(**converted.arguments, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(tokenizer), nnx.state(converted.model))


def run(tokenizer, images, token_ids):
    """Encoder output, reconstruction with its ids, and what ``token_ids`` decode to, in one compilation."""

    def everything(tokenizer, images, token_ids):
        return tokenizer.encoder(images), tokenizer(images), tokenizer.decode(token_ids)

    return apply(everything, tokenizer, images, token_ids)


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(GOLDEN / "expected.npz"))


def test_the_original_is_reproduced(expected):
    latent, output, decoded = run(original(), expected["image"], expected["token_ids"])
    np.testing.assert_allclose(latent, expected["latent"], atol=1e-4)
    np.testing.assert_array_equal(output.quantized.token_ids, expected["token_ids"])
    np.testing.assert_allclose(output.reconstruction, expected["reconstruction"], atol=1e-4)
    np.testing.assert_allclose(decoded, expected["reconstruction"], atol=1e-4)


def test_bfloat16_stays_near_float32(expected):
    tokenizer = original("bfloat16")
    latent, output, decoded = run(tokenizer, expected["image"], expected["token_ids"])
    assert latent.dtype == jnp.bfloat16
    assert output.reconstruction.dtype == output.quantized.z_q.dtype == jnp.float32
    assert all(param.dtype == jnp.float32 for param in jax.tree.leaves(nnx.state(tokenizer, nnx.Param)))
    for ours, theirs in ((latent.astype(jnp.float32), expected["latent"]), (decoded, expected["reconstruction"])):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert 1e-4 < error < 0.03  # the lower bound: it did compute in bfloat16
    assert np.mean(output.quantized.token_ids == expected["token_ids"]) > 0.9


# Layers


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.permute(0, 2, 3, 1).detach().numpy()


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 16), (20, 4), (7, 1)])
def test_group_norm_uses_as_many_of_32_groups_as_divide(channels, groups):
    norm = drawn(lambda: group_norm(channels, nnx.Rngs(0)))
    x = 5.0 + 3.0 * normal(0, 2, 4, 4, channels)
    scale, bias = (torch.from_numpy(np.array(p[...])) for p in (norm.scale, norm.bias))
    expected = torch.nn.functional.group_norm(to_torch(x), groups, scale, bias, eps=1e-6)
    np.testing.assert_allclose(apply(lambda norm, x: norm(x), norm, x), from_torch(expected), atol=1e-4)


def test_channels_that_32_does_not_divide_run():
    encoder = drawn(lambda: VQGANEncoder(**TINY | {"ch": 12, "attn_resolutions": (4,)}, rngs=nnx.Rngs(0)))
    latents = apply(lambda encoder, x: encoder(x), encoder, normal(0, 2, 8, 8, 3))
    assert latents.shape == (2, 4, 4, 4)
    assert np.isfinite(latents).all()
    assert np.std(latents) > 0.01


def test_a_block_that_widens_has_a_shortcut():
    x = normal(0, 1, 4, 4, 8)
    for width in (8, 16):
        block = drawn(lambda width=width: ResidualBlock(8, width, 0.0, jnp.float32, nnx.Rngs(0)))
        block.conv2.kernel[...] = np.zeros((3, 3, width, width))
        block.conv2.bias[...] = np.zeros(width)
        y = apply(lambda block, x: block(x), block, x)
        if width == 8:
            assert block.shortcut is None
            np.testing.assert_array_equal(y, x)
        else:
            kernel, bias = np.asarray(block.shortcut.kernel[...])[0, 0], np.asarray(block.shortcut.bias[...])
            np.testing.assert_allclose(y, x @ kernel + bias, atol=1e-5)


def test_downsample_pads_below_and_right():
    layer = Downsample(1, jnp.float32, nnx.Rngs(0))
    layer.conv.kernel[...] = np.arange(1.0, 10.0).reshape(3, 3, 1, 1)
    impulses = np.zeros((2, 4, 4, 1), np.float32)
    impulses[0, 0, 0] = impulses[1, 3, 3] = 1.0
    first, last = layer(impulses)[..., 0]
    np.testing.assert_array_equal(first, [[1.0, 0.0], [0.0, 0.0]])  # the kernel's first weight: no padding above
    np.testing.assert_array_equal(last, [[0.0, 0.0], [0.0, 5.0]])  # its middle: one row and column of padding after


def test_upsample_repeats_each_pixel():
    layer = Upsample(1, jnp.float32, nnx.Rngs(0))
    layer.conv.kernel[...] = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]]).reshape(3, 3, 1, 1)
    image = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(layer(image)[0, :, :, 0], [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])


# Dropout


def test_dropout_zeroes_its_share_and_scales_the_rest():
    block = drawn(lambda: ResidualBlock(8, 8, 0.25, jnp.float32, nnx.Rngs(0)))
    identity = np.zeros((3, 3, 8, 8))
    identity[1, 1] = np.eye(8)
    block.conv2.kernel[...] = identity  # so that what is dropped shows at the output
    block.conv2.bias[...] = np.zeros(8)
    x = normal(0, 4, 16, 16, 8)
    both = apply(lambda block, x, key: (block(x) - x, block(x, key) - x), block, x, jax.random.key(1))
    plain, dropped = map(np.asarray, both)
    kept = np.abs(dropped) > 1e-6
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.03)
    np.testing.assert_allclose(np.where(kept, dropped, 0.0), np.where(kept, plain / 0.75, 0.0), atol=1e-5)


@pytest.mark.parametrize("network", [VQGANEncoder, VQGANDecoder])
def test_dropout_needs_a_key(network):
    x = normal(0, 1, 4, 4, 3 if network is VQGANEncoder else 4)
    arguments = TINY | {"image_size": 4, "ch_mult": (1,)}
    dropping = drawn(lambda: network(**arguments, dropout=0.5, rngs=nnx.Rngs(0)))
    never = drawn(lambda: network(**arguments, dropout=0.0, rngs=nnx.Rngs(0)))
    plain = apply(lambda network: network(x), dropping)
    np.testing.assert_array_equal(apply(lambda network, key: network(x, key), never, jax.random.key(1)), plain)
    keys = jnp.stack([jax.random.key(seed) for seed in (1, 1, 2)])
    first, again, other = apply(lambda network, keys: jax.lax.map(lambda key: network(x, key), keys), dropping, keys)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3


# What a caller can get wrong


def test_attention_is_at_the_resolutions_asked_for():
    assert attended(32, (1, 1, 2), (8, 32)) == [True, False, True]
    encoder = nnx.eval_shape(lambda: VQGANEncoder(**TINY | {"attn_resolutions": (4,)}, rngs=nnx.Rngs(0)))
    assert [len(level.attentions) for level in encoder.levels] == [0, 1]
    decoder = nnx.eval_shape(lambda: VQGANDecoder(**TINY | {"attn_resolutions": (4,)}, rngs=nnx.Rngs(0)))
    assert [len(level.attentions) for level in decoder.levels] == [2, 0]


@pytest.mark.parametrize("network", [VQGANEncoder, VQGANDecoder])
def test_an_attention_resolution_that_no_level_has_is_refused(network):
    with pytest.raises(UserError, match=r"attn_resolutions has \[5, 16\], but the levels .* are \[8, 4\]"):
        network(**TINY | {"attn_resolutions": (16, 4, 5)}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("network", [VQGANEncoder, VQGANDecoder])
def test_an_image_that_cannot_be_halved_so_often_is_refused(network):
    with pytest.raises(UserError, match="image_size 20 cannot be halved 3 times"):
        network(**TINY | {"image_size": 20, "ch_mult": (1, 1, 1, 1)}, rngs=nnx.Rngs(0))
