"""The parts of MaskGIT's networks by hand; both are compared whole in ``tests/pretrained/test_maskgit.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.models.maskgit_vqgan import MaskGITBlock, MaskGITDecoder, MaskGITEncoder, halved

SIZES = {"image_size": 4, "z_channels": 6, "ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1}


def test_halved_by_hand():
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    np.testing.assert_array_equal(jax.jit(halved)(x)[0, :, :, 0], [[5, 9], [21, 25]])


def test_the_shortcut_is_of_what_the_block_computes():
    block = MaskGITBlock(4, 6, jnp.float32, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)

    @jit
    def run(block, x):
        y = block.conv2(jax.nn.swish(block.norm2(block.conv1(jax.nn.swish(block.norm1(x))))))
        return block(x), y

    whole, y = (np.asarray(v) for v in run(block, x))
    np.testing.assert_allclose(whole, y + y @ np.asarray(block.shortcut.kernel[0, 0]), atol=1e-5)
    assert MaskGITBlock(4, 4, jnp.float32, nnx.Rngs(0)).shortcut is None


def test_gradients_reach_every_weight(random_module):
    encoder, decoder = (
        random_module(lambda kind=kind: kind(**SIZES, rngs=nnx.Rngs(0)), 1.0)
        for kind in (MaskGITEncoder, MaskGITDecoder)
    )
    images = np.random.default_rng(0).uniform(size=(1, 4, 4, 3)).astype(np.float32)

    @jit
    def run(both, images):
        def loss(both):
            features = both[1].features(both[0](images))
            return jnp.sum(both[1].last_layer(features) * jnp.arange(3.0)), features

        return jax.grad(loss, has_aux=True)(both)

    gradients, features = run((encoder, decoder), images)
    assert features.shape == (1, 4, 4, 4)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    assert (encoder.downsampling, encoder.conv_out.out_features) == (2, 6)


def test_the_published_sizes():
    """z of 16x16x256 for 256 pixels, and as many parameters as the authors' networks have by their layers."""
    encoder, decoder = (
        nnx.eval_shape(lambda n=n: n(image_size=256, rngs=nnx.Rngs(0))) for n in (MaskGITEncoder, MaskGITDecoder)
    )

    def block(i, o):
        return 2 * i + 2 * o + 9 * i * o + 9 * o * o + (o * o if i != o else 0)

    def of_blocks(widths):
        return sum(block(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))

    down = [128, 128, 128, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512]
    up = [512, 512, 512, 512, 512, 256, 256, 256, 256, 128, 128, 128, 128]
    expected = 9 * 3 * 128 + of_blocks(down) + 2 * 512 + 512 * 256 + 256
    assert sum(x.size for x in jax.tree.leaves(nnx.state(encoder))) == expected
    upsampling = sum(9 * c * c + c for c in (512, 256, 256, 128))
    expected = 9 * 256 * 512 + 512 + of_blocks(up) + upsampling + 2 * 128 + 9 * 128 * 3 + 3
    assert sum(x.size for x in jax.tree.leaves(nnx.state(decoder))) == expected
    shape = nnx.eval_shape(lambda n, x: n(x), encoder, jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)).shape
    assert shape == (1, 16, 16, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch_mult": ()}, "maskgit_vqgan.ch_mult is empty"),
        ({"ch_mult": (1, 0)}, "maskgit_vqgan.ch_mult is 0, but must be at least 1"),
        ({"num_res_blocks": 0}, "maskgit_vqgan.num_res_blocks is 0, but must be at least 1"),
        ({"image_size": 5}, "image_size 5 cannot be halved 1 times"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        MaskGITEncoder(**SIZES | changes, rngs=nnx.Rngs(0))
