"""What the decoder makes of the tokens so far."""

import jax.numpy as jnp
import numpy as np
import pytest

from vgpt_jax.sampling import progressive
from vgpt_jax.sampling.progressive import decode_so_far


@pytest.fixture(scope="module")
def samples(random_toy):
    return random_toy.sample([0, 1, 2], order="random", seed=2)


def frames_of(model, token_ids, orders, counts) -> np.ndarray:
    return np.stack(list(decode_so_far(model, token_ids, orders, np.array(counts))))


def test_the_last_frame_is_the_picture_and_the_first_is_not(random_toy, samples):
    frames = frames_of(random_toy, samples.token_ids, samples.orders, [1, 8, 16])
    assert frames.shape == (3, 3, 16, 16, 3) and frames.dtype == np.float32
    np.testing.assert_allclose(frames[-1], samples.images, atol=1e-5)
    assert np.abs(frames[0] - samples.images).max() > 1e-3


def test_a_frame_is_what_is_written_with_the_mean_code_elsewhere(random_toy, samples):
    tokenizer = random_toy.tokenizer
    codes = np.asarray(tokenizer.quantizer.dequantize(jnp.arange(32)))
    counts = [0, 5, 11]
    frames = frames_of(random_toy, samples.token_ids, samples.orders, counts)
    for frame, count in zip(frames, counts, strict=True):
        latents = np.tile(codes.mean(axis=0), (3, 16, 1))
        for picture in range(3):
            for place in samples.orders[picture, :count]:
                latents[picture, place] = codes[samples.token_ids[picture].ravel()[place]]
        images = np.asarray(tokenizer.decode_latents(jnp.asarray(latents.reshape(3, 4, 4, -1))))
        np.testing.assert_allclose(frame, np.clip(images, -1, 1) / 2 + 0.5, atol=1e-5)


def test_a_frame_sees_no_token_that_comes_later(random_toy, samples):
    """Later in each picture's own order, not in raster order."""
    assert len({tuple(order) for order in samples.orders}) == 3
    other = samples.token_ids.reshape(3, 16).copy()
    for ids, order in zip(other, samples.orders, strict=True):
        ids[order[8:]] = (ids[order[8:]] + 1) % 32
    other = other.reshape(3, 4, 4)
    one, two = (frames_of(random_toy, ids, samples.orders, [8, 9]) for ids in (samples.token_ids, other))
    np.testing.assert_array_equal(one[0], two[0])
    assert (np.abs(one[1] - two[1]).reshape(3, -1).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_how_frames_are_batched_changes_nothing(random_toy, samples, monkeypatch, batch):
    counts = [2, 6, 10, 14, 16]
    expected = frames_of(random_toy, samples.token_ids, samples.orders, counts)
    monkeypatch.setattr(progressive, "MAX_BATCH", batch)
    frames = list(decode_so_far(random_toy, samples.token_ids, samples.orders, np.array(counts)))
    assert len(frames) == 5
    np.testing.assert_allclose(np.stack(frames), expected, atol=1e-5)
