import json

import numpy as np
import pytest

from vgpt_jax.data.sources import ArraySource
from vgpt_jax.data.token_cache import TokenSource, checksum, read_token_cache, write_token_cache
from vgpt_jax.data.transforms import ImageTransform
from vgpt_jax.data.views import CacheViews
from vgpt_jax.errors import UserError

CLASSES = ("a", "b", "c")


def source(count, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return ArraySource(
        images, (np.arange(count) % 3).astype(np.int32), CLASSES, tuple(f"{seed}/{i}" for i in range(count))
    )


TRAINING, HELD_OUT = source(7, 0), source(3, 1)
SHARD_SIZE = 2  # 4 shards of the training part, 2 of the held-out one


def encode(images):
    """A tokenizer that can be done by hand: the id of a 2x2 patch is the red of its upper left pixel."""
    return np.asarray(images[:, ::2, ::2, 0]).astype(np.int32)


def write(directory, encode=encode, views="flip", sources=(TRAINING, HELD_OUT), transform=None, **options):
    # The value range of uint8 makes the ids readable off the pictures.
    transform = transform or ImageTransform(image_size=4, value_range=(0.0, 255.0))
    arguments = {
        "batch_size": 3,
        "num_codes": 256,
        "token_shape": (2, 2),
        "fingerprint": "abc",
        "shard_size": SHARD_SIZE,
    }
    views = CacheViews(views, transform), CacheViews("none", transform)
    write_token_cache(directory, encode, sources, views, **arguments | options)


def read(directory, fingerprint="abc"):
    return read_token_cache(directory, fingerprint=fingerprint)


def patch_ids(images):
    return images[:, ::2, ::2, 0].reshape(len(images), 4)


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


FLIPPED = np.stack([patch_ids(TRAINING.images), patch_ids(TRAINING.images[:, :, ::-1])])


def test_round_trip_with_flips(tmp_path):
    write(tmp_path / "tokens")
    training, held_out = read(tmp_path / "tokens")
    assert not np.array_equal(FLIPPED[0], FLIPPED[1])
    np.testing.assert_array_equal(training.token_ids, FLIPPED)
    np.testing.assert_array_equal(held_out.token_ids, patch_ids(HELD_OUT.images)[None])
    np.testing.assert_array_equal(training.labels, TRAINING.labels)
    np.testing.assert_array_equal(held_out.labels, [0, 1, 2])
    assert training.class_names == held_out.class_names == CLASSES
    assert [shard.shape for shard in training.shards] == [(2, 2, 4)] * 3 + [(2, 1, 4)]
    assert all(isinstance(shard, np.memmap) for shard in training.shards)
    for i in range(14):
        view, picture = divmod(i, 7)
        assert training[i]["token_ids"].tolist() == FLIPPED[view, picture].tolist()
        assert training[i]["label"] == picture % 3
    np.testing.assert_array_equal(training.counts(256), np.bincount(FLIPPED.ravel(), minlength=256))


def test_ten_crops_of_each_picture(tmp_path):
    """Six pixels at least, of which every crop takes four: ids by slices of the picture."""
    images = np.random.default_rng(3).integers(0, 256, (5, 6, 6, 3), np.uint8)
    big = ArraySource(images, np.zeros(5, np.int32), ("a",), tuple("12345"))
    transform = ImageTransform(image_size=4, resize_size=6, value_range=(0.0, 255.0))
    write(tmp_path / "tokens", views="ten_crop", sources=(big, big), transform=transform, batch_size=4)
    crops = [images[:, top : top + 4, left : left + 4] for top, left in ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))]
    expected = np.stack([patch_ids(c) for c in crops] + [patch_ids(c[:, :, ::-1]) for c in crops])
    training, held_out = read(tmp_path / "tokens")
    np.testing.assert_array_equal(training.token_ids, expected)
    np.testing.assert_array_equal(held_out.token_ids, expected[:1])


def test_encode_sees_batches_of_one_size(tmp_path):
    shapes = []

    def noting(images):
        shapes.append(images.shape)
        return encode(images)

    write(tmp_path / "tokens", noting)
    assert set(shapes) == {(3, 4, 4, 3)}
    assert (
        len(shapes) == 3 * 2 + 1 + 2
    )  # two views of two pictures fill two batches, of one picture one; then the held-out ones


@pytest.mark.parametrize("num_codes", [256, 1 << 16, (1 << 16) + 1])
def test_greatest_id_is_kept_in_as_few_bytes_as_it_needs(tmp_path, num_codes):
    write(tmp_path / "tokens", lambda images: np.full((len(images), 2, 2), num_codes - 1), num_codes=num_codes)
    for part in read(tmp_path / "tokens"):
        assert (part[0]["token_ids"] == num_codes - 1).all()
        assert part.token_ids.dtype == (np.uint16 if num_codes <= 1 << 16 else np.int32)


def interrupt_after(calls):
    """An `encode` that is interrupted in call number ``calls`` + 1."""
    done = []

    def interrupted(images):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(None)
        return encode(images)

    return interrupted


@pytest.mark.parametrize("calls", [0, 3, 7])
def test_an_interrupted_cache_is_refused_and_finished_to_the_same_bytes(tmp_path, calls):
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "tokens", interrupt_after(calls))
    with pytest.raises(UserError, match="is not finished: .* of 6 shards are missing"):
        read(tmp_path / "tokens")
    before = {name: (tmp_path / "tokens" / name).stat().st_mtime_ns for name in files_of(tmp_path / "tokens")}
    write(tmp_path / "tokens")
    assert files_of(tmp_path / "tokens") == files_of(tmp_path / "whole")
    assert len(before) == 1 + 2 * {0: 0, 3: 1, 7: 4}[calls]  # the metadata, and two files of each shard that was whole
    assert all((tmp_path / "tokens" / name).stat().st_mtime_ns == time for name, time in before.items())


def test_a_finished_cache_is_left_alone(tmp_path):
    write(tmp_path / "tokens")
    write(tmp_path / "tokens", interrupt_after(0))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_together_write_what_one_writes(tmp_path, count):
    write(tmp_path / "alone")
    for index in reversed(range(count)):  # in whatever order
        if index == 0:
            with pytest.raises(UserError, match="token cache in"):
                read(tmp_path / "tokens")
        write(tmp_path / "tokens", process_index=index, process_count=count, num_threads=index + 1)
    assert files_of(tmp_path / "tokens") == files_of(tmp_path / "alone")


def test_a_process_writes_its_own_shards_alone(tmp_path):
    write(tmp_path / "tokens", process_index=1, process_count=3)
    assert {p.stem for p in (tmp_path / "tokens").iterdir()} == {"training-00001-of-00004", "held_out-00001-of-00002"}


def test_shards_that_another_tokenizer_left_without_metadata_are_written_again(tmp_path):
    write(
        tmp_path / "tokens", lambda images: 0 * encode(images), fingerprint="before", process_index=1, process_count=2
    )
    write(tmp_path / "tokens")
    np.testing.assert_array_equal(read(tmp_path / "tokens")[0].token_ids, FLIPPED)


def test_cache_of_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "tokens", fingerprint="abc")
    for again in (lambda: read(tmp_path / "tokens", "xyz"), lambda: write(tmp_path / "tokens", fingerprint="xyz")):
        with pytest.raises(UserError, match="written by tokenizer abc, but the tokenizer here is xyz"):
            again()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": "none"}, "of other views"),
        ({"transform": ImageTransform(image_size=4, resize_size=5, value_range=(0.0, 255.0))}, "of other views"),
        ({"sources": (source(7, 2), HELD_OUT)}, "of other pictures"),
        ({"sources": (TRAINING, source(2, 1))}, "of other pictures"),
        ({"num_codes": 512}, "differs in num_codes"),
    ],
)
def test_cache_of_other_views_or_data_is_refused(tmp_path, options, said):
    write(tmp_path / "tokens")
    with pytest.raises(UserError, match=f"{said}.*delete it"):
        write(tmp_path / "tokens", **options)


def test_missing_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no token cache"):
        read(tmp_path / "tokens")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "tokens")


@pytest.mark.parametrize("name", ["training-00002-of-00004", "held_out-00000-of-00002"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped bits", "missing"])
def test_a_damaged_shard_is_named_and_written_again_once_it_is_deleted(tmp_path, name, damage):
    write(tmp_path / "tokens")
    whole = files_of(tmp_path / "tokens")
    path = tmp_path / "tokens" / f"{name}.npy"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-3])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped bits":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = "not finished: 1 of 6" if damage == "missing" else "cannot be read .*delete it"
    with pytest.raises(UserError, match=f"{name}.*{said}|{said}.*{name}"):
        read(tmp_path / "tokens")
    path.unlink(missing_ok=True)
    write(tmp_path / "tokens")
    assert files_of(tmp_path / "tokens") == whole


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"format": 1}'])
def test_damaged_metadata_is_refused(tmp_path, text):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "metadata.json").write_text(text)
    for again in (read, write):
        with pytest.raises(UserError, match="cannot be read.*delete it"):
            again(tmp_path / "tokens")


def test_what_the_metadata_say(tmp_path):
    write(tmp_path / "tokens")
    metadata = json.loads((tmp_path / "tokens" / "metadata.json").read_text())
    assert metadata["fingerprint"] == "abc"
    assert metadata["class_names"] == list(CLASSES)
    assert metadata["parts"]["training"]["data"] == TRAINING.identity
    assert metadata["parts"]["training"]["num_views"] == 2
    assert metadata["parts"]["held_out"]["num_pictures"] == 3


def test_source_goes_through_the_pictures_view_after_view():
    ids = np.arange(12, dtype=np.uint16).reshape(2, 3, 2)
    for shards in ((ids,), (ids[:, :2], ids[:, 2:])):
        tokens = TokenSource(shards, np.array([7, 8, 9], np.int32), CLASSES)
        assert len(tokens) == 6
        drawn = [tokens[i] for i in range(6)]
        assert [example["token_ids"].tolist() for example in drawn] == [
            [0, 1],
            [2, 3],
            [4, 5],
            [6, 7],
            [8, 9],
            [10, 11],
        ]
        assert [int(example["label"]) for example in drawn] == [7, 8, 9, 7, 8, 9]
        assert drawn[0]["token_ids"].dtype == np.int32
        np.testing.assert_array_equal(tokens.token_ids, ids)
        for outside in (6, -1):
            with pytest.raises(IndexError):
                tokens[outside]


def test_checksum_differs_with_an_id_the_type_and_the_shape():
    ids = np.zeros((2, 3, 4), np.uint16)
    changed = ids.copy()
    changed[1, 2, 3] = 1
    others = [ids, changed, ids.astype(np.int32), ids.reshape(2, 4, 3)]
    assert len({checksum(x) for x in others}) == 4
    assert checksum(np.asfortranarray(changed)) == checksum(changed)
