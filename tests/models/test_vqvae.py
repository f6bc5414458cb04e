import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.models.vqvae import PlainResidualBlock, SubPixelUpsample, VQVAEDecoder, VQVAEEncoder

TINY = {"z_channels": 5, "ch": 8, "num_res_blocks": 1, "res_channels": 4}


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


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.permute(0, 2, 3, 1).detach().numpy()


def torch_conv(layer, x, **kwargs):
    kernel = torch.from_numpy(np.array(layer.kernel[...])).permute(3, 2, 0, 1)
    return torch.nn.functional.conv2d(x, kernel, torch.from_numpy(np.array(layer.bias[...])), **kwargs)


def torch_blocks(blocks, x):
    for block in blocks:
        x = x + torch_conv(block.conv2, torch_conv(block.conv1, x.relu(), padding=1).relu())
    return x


# Sub-pixel convolution


def test_sub_pixels_are_in_row_major_order():
    layer = drawn(lambda: SubPixelUpsample(1, 2, jnp.float32, nnx.Rngs(0)))
    # Output channel n = 4-way sub-pixel index * 2 + channel is 10 n times the pixel.
    kernel = np.zeros((3, 3, 1, 8))
    kernel[1, 1, 0] = 10.0 * np.arange(8.0)
    layer.conv.kernel[...] = kernel
    layer.conv.bias[...] = np.arange(8.0)
    up = apply(lambda layer: layer(jnp.array([[[[1.0], [2.0]]]])), layer)
    np.testing.assert_array_equal(up[0, :, :, 0], [[0, 22, 0, 42], [44, 66, 84, 126]])
    np.testing.assert_array_equal(up[0, :, :, 1], [[11, 33, 21, 63], [55, 77, 105, 147]])


def test_a_transposed_4x4_convolution_is_a_sub_pixel_convolution():
    transposed = torch.nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1)
    weight = transposed.weight.detach().numpy()  # [in, out, 4, 4]
    layer = drawn(lambda: SubPixelUpsample(3, 5, jnp.float32, nnx.Rngs(0)))
    kernel = np.zeros((3, 3, 3, 2, 2, 5), np.float32)  # [row, column, in, sub-row, sub-column, out]
    # The pixel at 2p + s gets input p + t through tap 1 + s - 2t of the four.
    taps = [(s, t, 1 + s - 2 * t) for s in (0, 1) for t in (-1, 0, 1) if 0 <= 1 + s - 2 * t < 4]
    for row, t_row, tap_row in taps:
        for column, t_column, tap_column in taps:
            kernel[1 + t_row, 1 + t_column, :, row, column] = weight[:, :, tap_row, tap_column]
    layer.conv.kernel[...] = kernel.reshape(3, 3, 3, 20)
    layer.conv.bias[...] = np.tile(transposed.bias.detach().numpy(), 4)

    x = normal(0, 2, 5, 6, 3)
    up = apply(lambda layer: layer(x), layer)
    np.testing.assert_allclose(up, from_torch(transposed(to_torch(x))), atol=1e-5)
    assert np.count_nonzero(kernel) == weight.size  # every weight has one place


# Encoder and decoder


def test_the_encoder_matches_torch():
    encoder = drawn(lambda: VQVAEEncoder(image_size=16, **TINY, rngs=nnx.Rngs(0)))
    images = normal(0, 2, 16, 16, 3)
    x = to_torch(images)
    for layer in encoder.strided:
        x = torch_conv(layer, x, stride=2, padding=1).relu()
    x = torch_blocks(encoder.blocks, torch_conv(encoder.conv, x, padding=1))
    expected = from_torch(torch_conv(encoder.conv_out, x.relu()))
    latents = apply(lambda encoder: encoder(images), encoder)
    np.testing.assert_allclose(latents, expected, atol=1e-4)
    assert latents.shape == (2, 4, 4, 5)


def test_the_decoder_matches_torch():
    decoder = drawn(lambda: VQVAEDecoder(image_size=16, **TINY, rngs=nnx.Rngs(0)))
    latents = normal(0, 2, 4, 4, 5)
    x = torch_blocks(decoder.blocks, torch_conv(decoder.conv_in, to_torch(latents), padding=1))
    for upsample in decoder.upsamples:
        y = torch_conv(upsample.conv, x.relu(), padding=1)
        # pixel_shuffle wants the sub-pixel index inside the channel's, ours is outside.
        y = y.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        x = torch.nn.functional.pixel_shuffle(y, 2)
    images = apply(lambda decoder: decoder(latents), decoder)
    np.testing.assert_allclose(images, from_torch(x), atol=1e-4)
    assert images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("num_downsamplings", [1, 2, 3])
def test_each_downsampling_halves_the_grid(num_downsamplings):
    arguments = TINY | {"image_size": 16, "num_downsamplings": num_downsamplings}
    side = 16 // 2**num_downsamplings

    def networks():
        return tuple(network(**arguments, rngs=nnx.Rngs(0)) for network in (VQVAEEncoder, VQVAEDecoder))

    def round_trip(images):
        encoder, decoder = networks()
        latents = encoder(images)
        return latents, decoder(latents)

    latents, images = nnx.eval_shape(round_trip, jnp.zeros((2, 16, 16, 3)))
    assert latents.shape == (2, side, side, 5)
    assert images.shape == (2, 16, 16, 3)
    assert nnx.eval_shape(networks)[0].downsampling == 2**num_downsamplings


def test_bfloat16_computes_low_and_keeps_parameters_float32():
    block = drawn(lambda: PlainResidualBlock(8, 4, jnp.bfloat16, nnx.Rngs(0)))
    x = normal(0, 1, 4, 4, 8)
    low = apply(lambda block: block(jnp.asarray(x, jnp.bfloat16)), block)
    assert low.dtype == jnp.bfloat16
    assert block.conv1.kernel.dtype == jnp.float32
    reference = drawn(lambda: PlainResidualBlock(8, 4, jnp.float32, nnx.Rngs(0)))
    reference = apply(lambda block: block(x), reference)
    assert np.linalg.norm(low.astype(jnp.float32) - reference) < 0.02 * np.linalg.norm(reference)


@pytest.mark.parametrize("network", [VQVAEEncoder, VQVAEDecoder])
@pytest.mark.parametrize("num_downsamplings", [0, 3])
def test_an_image_that_cannot_be_halved_so_often_is_refused(network, num_downsamplings):
    with pytest.raises(UserError, match=f"image_size 20 cannot be halved num_downsamplings = {num_downsamplings}"):
        network(**TINY | {"image_size": 20, "num_downsamplings": num_downsamplings}, rngs=nnx.Rngs(0))
