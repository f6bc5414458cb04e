"""The record of what was drawn: written and read back, and refused where it is none."""

import json

import numpy as np
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.cond_visual_gpt import Samples
from vgpt_jax.sampling.record import Record, read_record
from vgpt_jax.sampling.request import Drawing

SETTINGS = {
    "from_pretrained": "runs/toy",
    "cls_name": ["cats"],
    "num": 1,
    "accept_n": 3,
    "complete": None,
    "keep": None,
}


def some_samples(**fields) -> Samples:
    ids = np.arange(32, dtype=np.int32).reshape(2, 4, 4)
    return Samples(
        images=np.zeros((2, 16, 16, 3), np.float32),
        token_ids=ids,
        labels=np.array([2, 0], np.int32),
        orders=np.tile(np.arange(16, dtype=np.int32), (2, 1)),
        indices=np.array([1, 5], np.int32),
        **fields,
    )


@pytest.fixture
def record(raster_toy) -> Record:
    record = Record(SETTINGS, Drawing(temperature=0.8, top_k=5, order="random", seed=2**32 - 1), [])
    scores = np.array([[0.25, 0.5, 0.125], [0.0, 0.5, 0.75]], np.float32)
    record.add(raster_toy, some_samples(scores=scores.max(axis=1), candidate_scores=scores))
    return record


def test_what_is_written_is_read_back(record, tmp_path):
    record.write(tmp_path / "deep" / "out.json")
    assert read_record(tmp_path / "deep" / "out.json") == record


def test_a_picture_is_told_of_in_full(record):
    first, second = record.pictures
    assert first == {
        "class": "Small Dogs",
        "label": 2,
        "index": 1,
        "score": 0.5,
        "chosen": 1,
        "candidate_scores": [0.25, 0.5, 0.125],
        "token_ids": np.arange(16).reshape(4, 4).tolist(),
    }
    assert (second["class"], second["chosen"], second["score"]) == ("Cats", 2, 0.75)


def test_pictures_without_a_class_or_a_score_are_told_of_too(raster_toy):
    record, samples = Record(SETTINGS, Drawing(), []), some_samples()
    samples.labels[0] = -1
    record.add(raster_toy, samples)
    assert record.pictures[0]["class"] is None and record.pictures[0]["label"] == -1
    assert "score" not in record.pictures[0] and "chosen" not in record.pictures[0]


def test_a_score_that_is_no_number_was_not_chosen(raster_toy):
    scores = np.array([[np.nan, 0.5, 0.25], [np.nan, np.nan, np.nan]], np.float32)
    samples = some_samples(scores=np.array([0.5, np.nan], np.float32), candidate_scores=scores)
    np.testing.assert_array_equal(samples.chosen, [1, 0])
    record = Record(SETTINGS, Drawing(), [])
    record.add(raster_toy, samples)
    assert [picture["chosen"] for picture in record.pictures] == [1, 0]


def test_a_missing_record_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="there is no record"):
        read_record(tmp_path / "none.json")
    with pytest.raises(UserError, match="there is no record"):
        read_record(tmp_path)


def damaged(change):
    def apply(text: str) -> str:
        found = json.loads(text)
        change(found)
        return json.dumps(found)

    return apply


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda text: text[: len(text) // 2], "is no record"),
        (lambda text: "[1, 2]", "is no record"),
        (lambda text: "\udcff", "is no record"),
        (damaged(lambda found: found.pop("drawing")), "no 'drawing'"),
        (damaged(lambda found: found["settings"].pop("keep")), "no 'keep'"),
        (damaged(lambda found: found.update(settings="no")), "is no record"),
        (damaged(lambda found: found.update(pictures=3)), "is no record"),
        (damaged(lambda found: found.update(pictures=[3])), "is no record"),
        (damaged(lambda found: found["pictures"][0].pop("token_ids")), "no 'token_ids'"),
        (damaged(lambda found: found["pictures"][1].update(index="first")), "is no record"),
        (damaged(lambda found: found["pictures"][1].update(label=None)), "is no record"),
        (damaged(lambda found: found["drawing"].update(temperature="hot")), "hot"),
        (damaged(lambda found: found["drawing"].update(colour=1)), "no sampling option 'colour'"),
    ],
)
def test_a_damaged_record_is_one_clear_error(record, tmp_path, damage, named):
    path = tmp_path / "out.json"
    record.write(path)
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=named):
        read_record(path)
