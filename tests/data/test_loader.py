import json

import numpy as np
import pytest

from vgpt_jax.data.loader import evaluation_batches, training_batches


class Numbers:
    """Ten examples that are their own index."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"index": np.int32(index)}


def with_draw(example, rng):
    return {**example, "draw": np.float64(rng.random())}


def batches(count, *, state=None, **options):
    iterator = training_batches(Numbers(), with_draw, **{"batch_size": 4, "seed": 3} | options)
    if state is not None:
        iterator.set_state(state)
    return [next(iterator) for _ in range(count)]


def stream(drawn, name="index"):
    return np.concatenate([batch[name] for batch in drawn])


def test_same_seed_same_batches():
    for first, second in zip(batches(5), batches(5), strict=True):
        np.testing.assert_array_equal(first["index"], second["index"])
        np.testing.assert_array_equal(first["draw"], second["draw"])


def test_another_seed_gives_another_order_and_other_draws():
    first, second = batches(5), batches(5, seed=4)
    assert not np.array_equal(stream(first), stream(second))
    assert not np.isin(stream(first, "draw"), stream(second, "draw")).any()


def test_every_example_once_an_epoch_in_a_new_order():
    # 15 batches of 4 are 6 epochs of 10: the batch size does not divide the epoch.
    epochs = stream(batches(15)).reshape(6, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(10), (6, 10)))
    assert len({epoch.tobytes() for epoch in epochs}) == 6


def test_draws_are_new_for_every_example_and_epoch():
    assert len(set(stream(batches(15), "draw"))) == 60


def test_position_is_kept_exactly():
    iterator = training_batches(Numbers(), with_draw, batch_size=4, seed=3)
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(4)]
    for resumed, uninterrupted in zip(batches(4, state=state), expected, strict=True):
        np.testing.assert_array_equal(resumed["index"], uninterrupted["index"])
        np.testing.assert_array_equal(resumed["draw"], uninterrupted["draw"])


def test_position_before_the_first_batch_is_kept():
    state = training_batches(Numbers(), with_draw, batch_size=4, seed=3).get_state()
    np.testing.assert_array_equal(stream(batches(3, state=state)), stream(batches(3)))


@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0], [1], [2], [3]), ([0, 2], [1, 3])])
@pytest.mark.parametrize("name", ["index", "draw"])
def test_the_rows_of_all_processes_are_the_batches_of_one(parts, name):
    alone = batches(6)
    for rows in parts:
        for batch, mine in zip(alone, batches(6, rows=rows), strict=True):
            np.testing.assert_array_equal(mine[name], batch[name][rows])


def test_position_of_one_process_is_that_of_two():
    iterator = training_batches(Numbers(), with_draw, batch_size=4, seed=3)
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    expected = next(iterator)["index"]
    for rows in ([0, 1], [2, 3]):
        (batch,) = batches(1, state=state, rows=rows)
        np.testing.assert_array_equal(batch["index"], expected[rows])


def test_evaluation_loads_the_rows_that_are_asked_for():
    whole = list(evaluation_batches(Numbers(), lambda example: example, batch_size=4))
    mine = list(evaluation_batches(Numbers(), lambda example: example, batch_size=4, rows=[1, 3]))
    for batch, part in zip(whole, mine, strict=True):
        for name in batch:
            np.testing.assert_array_equal(part[name], batch[name][[1, 3]])


def test_evaluation_is_one_pass_in_order_with_the_rest_masked():
    drawn = list(evaluation_batches(Numbers(), lambda example: {"twice": 2 * example["index"]}, batch_size=4))
    assert [set(batch) for batch in drawn] == [{"twice", "mask"}] * 3
    assert [batch["mask"].tolist() for batch in drawn] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert all(batch["twice"].shape == (4,) for batch in drawn)
    np.testing.assert_array_equal(np.concatenate([b["twice"][b["mask"]] for b in drawn]), 2 * np.arange(10))


def test_evaluation_batch_that_fits_is_not_filled_up():
    drawn = list(evaluation_batches(Numbers(), lambda example: example, batch_size=5))
    assert [batch["mask"].all() for batch in drawn] == [True, True]


def test_evaluation_batch_larger_than_the_source():
    (batch,) = evaluation_batches(Numbers(), lambda example: example, batch_size=16)
    assert batch["mask"].sum() == 10
    np.testing.assert_array_equal(batch["index"][:10], np.arange(10))
    assert batch["index"].shape == (16,)
