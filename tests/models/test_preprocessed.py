"""Against Hugging Face's own preprocessing of bytes, and the steps by hand."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vgpt_jax.errors import UserError
from vgpt_jax.models.preprocessed import Preprocessed


def door(**arguments):
    """What a network would be given, compiled."""
    return jax.jit(Preprocessed(lambda x: x, **arguments).pixels)


def picture(height, width, seed=0):
    """Smooth and noisy parts, with the whole range of bytes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = 128 + 100 * np.sin(rows[..., None] / 3 + np.arange(3)) * np.cos(columns[..., None] / 4)
    return np.clip(waves + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("shape", "size"), [((16, 16), 32), ((40, 40), 16), ((21, 34), 16)])
@pytest.mark.parametrize(("resample", "method"), [(0, "nearest"), (1, "lanczos"), (2, "bilinear"), (3, "bicubic")])
def test_pixels_are_those_of_hugging_face(shape, size, resample, method):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)  # one that does not fit torch would break the import
        processors = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
        mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
        processor = processors.ViTImageProcessorPil(
            size={"height": size, "width": size}, resample=resample, image_mean=mean, image_std=std
        )
        image = picture(*shape)
        expected = processor(image, input_data_format="channels_last")["pixel_values"][0]
    scale, shift = 1 / np.array(std), -np.array(mean) / np.array(std)
    ours = door(image_size=size, resize_size=size, method=method, scale=scale, shift=shift)(image[None] / 255)[0]
    # Pillow rounds to bytes after each of its two passes, with weights of 22 bits: within a byte and a half of ours.
    difference = np.abs(np.asarray(ours) - np.moveaxis(np.asarray(expected), 0, -1)) * np.array(std) * 255
    assert difference.max() <= (1e-3 if method == "nearest" else 1.5)
    assert difference.mean() < 0.5


@pytest.mark.parametrize("wide", [True, False])
def test_the_short_side_is_resized_and_the_centre_cut_out(wide):
    image = picture(30, 45) if wide else picture(45, 30)
    resized = np.asarray(Image.fromarray(image).resize((24, 16) if wide else (16, 24), Image.Resampling.BICUBIC))
    expected = resized[2:14, 6:18] if wide else resized[6:18, 2:14]
    ours = door(image_size=12, resize_size=16, method="bicubic")(image[None] / 255)
    assert ours.shape == (1, 12, 12, 3)
    assert np.abs(np.asarray(ours[0]) * 255 - expected).max() <= 1.5  # of bytes, as above


def test_each_picture_is_scaled_by_its_own_extremes():
    rng = np.random.default_rng(1)
    pictures = np.stack([rng.uniform(0.2, 0.6, (8, 8, 3)), rng.uniform(0.0, 1.0, (8, 8, 3)), np.full((8, 8, 3), 0.3)])
    low, high = pictures[:2].min((1, 2, 3), keepdims=True), pictures[:2].max((1, 2, 3), keepdims=True)
    same = {"image_size": 8, "resize_size": 8}
    ours = door(**same, min_max=True, scale=(2.0, 2.0, 2.0), shift=(-1.0, 0.0, 1.0))(pictures)
    expected = 2.0 * (pictures[:2] - low) / (high - low) + np.array([-1.0, 0.0, 1.0])
    np.testing.assert_allclose(ours[:2], expected, atol=1e-5)
    np.testing.assert_allclose(
        ours[2], np.broadcast_to([-1.0, 0.0, 1.0], (8, 8, 3))
    )  # flat, and no number is divided by 0
    np.testing.assert_allclose(door(**same)(pictures), pictures, atol=1e-6)  # of their size already: as they are


def test_overshoot_is_cut_off_and_bytes_keep_their_range():
    step = np.zeros((1, 8, 8, 3), np.float32)
    step[:, :, 4:] = 1.0
    ours = door(image_size=24, resize_size=24, method="bicubic")(step)
    assert float(ours.min()) == 0.0 and float(ours.max()) == 1.0
    kernel = jax.image.resize(step, (1, 24, 24, 3), "cubic")
    assert kernel.min() < -0.01  # which is what was cut off


def test_the_network_gets_the_pixels_and_gradients_come_back():
    network = nnx.Linear(4 * 4 * 3, 2, rngs=nnx.Rngs(0))

    class Flat(nnx.Module):
        def __init__(self):
            self.linear = network

        def __call__(self, x):
            return self.linear(x.reshape(len(x), -1))

    graph, state = nnx.split(Preprocessed(Flat(), image_size=4, resize_size=4, scale=(2.0,) * 3, shift=(-1.0,) * 3))

    @jax.jit
    def run(state, x):
        classify = partial(lambda s, y: nnx.merge(graph, s)(y), state)
        return classify(x), jax.grad(lambda y: jnp.sum(classify(y)[:, 0]))(x)

    images = np.random.default_rng(2).uniform(0.1, 0.9, (2, 8, 8, 3)).astype(np.float32)
    logits, gradient = run(state, images)
    pixels = 2 * np.asarray(Preprocessed(None, image_size=4, resize_size=4).pixels(images)) - 1
    np.testing.assert_allclose(logits, network(pixels.reshape(2, -1)), atol=1e-5)
    total = gradient.sum((1, 2))  # resizing keeps the sum of the weights
    expected = 2 * np.asarray(network.kernel[...])[:, 0].reshape(16, 3).sum(0)
    np.testing.assert_allclose(total, np.broadcast_to(expected, (2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0, "resize_size": 8}, "preprocessing.image_size is 0, but must be at least 1"),
        ({"image_size": 8, "resize_size": 4}, "preprocessing.resize_size is 4, but must be at least 8"),
        (
            {"image_size": 8, "resize_size": 8, "method": "box"},
            "preprocessing.method is 'box', but must be one of bicu",
        ),
        ({"image_size": 8, "resize_size": 8, "scale": [1.0]}, "preprocessing.scale is .1.0., but must be a number for"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Preprocessed(None, **arguments)
