import numpy as np
import pytest

from vgpt_jax.data.sources import ArraySource
from vgpt_jax.data.token_cache import TokenSource, read_token_cache, write_token_cache
from vgpt_jax.data.transforms import ImageTransform
from vgpt_jax.errors import UserError

CLASSES = ("a", "b", "c")


def source(count, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return ArraySource(images, (np.arange(count) % 3).astype(np.int32), CLASSES, tuple(str(i) for i in range(count)))


TRAINING, HELD_OUT = source(5, 0), source(3, 1)


def encode(images):
    """A tokenizer that can be done by hand: the id of a 2x2 patch is the red of its upper left pixel."""
    return np.asarray(images[:, ::2, ::2, 0]).astype(np.int32)


def write(directory, encode=encode, num_codes=256, **options):
    # The value range of uint8 makes the ids readable off the pictures.
    transform = ImageTransform(image_size=4, crop="random", flip=True, value_range=(0.0, 255.0))
    arguments = {"batch_size": 2, "token_shape": (2, 2), "fingerprint": "abc"} | options
    write_token_cache(directory, encode, TRAINING, HELD_OUT, transform, num_codes=num_codes, **arguments)


def patch_ids(images):
    return images[:, ::2, ::2, 0].reshape(len(images), 4)


def test_round_trip_with_flips(tmp_path):
    write(tmp_path / "tokens")
    training, held_out = read_token_cache(tmp_path / "tokens", fingerprint="abc")
    expected = np.stack([patch_ids(TRAINING.images), patch_ids(TRAINING.images[:, :, ::-1])])
    assert not np.array_equal(expected[0], expected[1])
    np.testing.assert_array_equal(training.token_ids, expected)
    np.testing.assert_array_equal(held_out.token_ids, patch_ids(HELD_OUT.images)[None])
    np.testing.assert_array_equal(training.labels, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(held_out.labels, [0, 1, 2])
    assert training.class_names == held_out.class_names == CLASSES


def test_writing_twice_gives_the_same(tmp_path):
    write(tmp_path / "tokens")
    before, _ = read_token_cache(tmp_path / "tokens", fingerprint="abc")
    write(tmp_path / "tokens", batch_size=4)
    after, _ = read_token_cache(tmp_path / "tokens", fingerprint="abc")
    np.testing.assert_array_equal(before.token_ids, after.token_ids)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_encode_sees_batches_of_one_size(tmp_path):
    shapes = set()

    def noting(images):
        shapes.add(images.shape)
        return encode(images)

    write(tmp_path / "tokens", noting, batch_size=2)
    assert shapes == {(2, 4, 4, 3)}


@pytest.mark.parametrize("num_codes", [256, 1 << 16, (1 << 16) + 1])
def test_greatest_id_is_kept(tmp_path, num_codes):
    write(tmp_path / "tokens", lambda images: np.full((len(images), 2, 2), num_codes - 1), num_codes)
    for part in read_token_cache(tmp_path / "tokens", fingerprint="abc"):
        assert (part[0]["token_ids"] == num_codes - 1).all()


def test_cache_of_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "tokens", fingerprint="abc")
    with pytest.raises(UserError, match="written by tokenizer abc, but the tokenizer here is xyz"):
        read_token_cache(tmp_path / "tokens", fingerprint="xyz")


def test_missing_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_token_cache(tmp_path / "tokens", fingerprint="abc")


@pytest.mark.parametrize("part", ["training", "held_out"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped bits", "missing"])
def test_damaged_arrays_are_refused(tmp_path, part, damage):
    write(tmp_path / "tokens")
    path = tmp_path / "tokens" / f"{part}.npz"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped bits":
        at = whole.index(b"\x93NUMPY") + 128  # the first id, behind NumPy's header
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    else:
        path.unlink()
    with pytest.raises(UserError, match="cannot be read .*delete it"):
        read_token_cache(tmp_path / "tokens", fingerprint="abc")


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_damaged_metadata_is_refused(tmp_path, text):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "metadata.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        read_token_cache(tmp_path / "tokens", fingerprint="abc")


def interrupt_after(calls):
    """An `encode` that is interrupted in call number ``calls`` + 1."""
    done = []

    def interrupted(images):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(None)
        return encode(images)

    return interrupted


@pytest.mark.parametrize("calls", [0, 3, 7])  # 6 calls write the training part: 3 batches, twice
def test_interrupted_write_leaves_no_cache(tmp_path, calls):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "tokens", interrupt_after(calls))
    assert not (tmp_path / "tokens").exists()
    write(tmp_path / "tokens")
    training, _ = read_token_cache(tmp_path / "tokens", fingerprint="abc")
    np.testing.assert_array_equal(training.token_ids[0], patch_ids(TRAINING.images))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_interrupted_write_leaves_the_cache_before_it(tmp_path):
    write(tmp_path / "tokens", fingerprint="before")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "tokens", interrupt_after(3), fingerprint="after")
    training, _ = read_token_cache(tmp_path / "tokens", fingerprint="before")
    np.testing.assert_array_equal(training.token_ids[0], patch_ids(TRAINING.images))


def test_source_goes_through_the_pictures_view_after_view():
    token_ids = np.arange(12, dtype=np.uint16).reshape(2, 3, 2)
    tokens = TokenSource(token_ids, np.array([7, 8, 9], np.int32), CLASSES)
    assert len(tokens) == 6
    drawn = [tokens[i] for i in range(6)]
    assert [example["token_ids"].tolist() for example in drawn] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert [int(example["label"]) for example in drawn] == [7, 8, 9, 7, 8, 9]
    assert drawn[0]["token_ids"].dtype == np.int32
    with pytest.raises(IndexError):
        tokens[6]
