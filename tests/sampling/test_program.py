"""The whole program: against a loop over the plain model in NumPy, in pieces, its outputs' shapes, and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import softmax

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.completion import Completion
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.sampling.guidance import guidance_scales
from vgpt_jax.sampling.program import Batch, ClassifierScore, Plan, draw_pictures, in_pieces
from vgpt_jax.sampling.request import Drawing
from vgpt_jax.training.sharding import make_mesh

LABELS, INDICES, SEED = np.array([0, 2], np.int32), np.array([4, 9], np.int32), 11
MASK = np.arange(16).reshape(4, 4) % 3 == 0


@pytest.fixture(scope="module")
def given() -> Completion:
    return Completion(np.random.default_rng(0).random((16, 16, 3), np.float32), MASK)


@nnx.jit
def plain(gpt, ids, orders):
    """Logits ``[B, N, V]``, all at once and without a cache."""
    return gpt(ids, None, orders if gpt.random_order else None)


def written_by_hand(model, drawing: Drawing, given_ids=None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and orders ``[2, 16]`` of ``LABELS``: one token at a time, without a cache, every logit in float64."""
    gpt = model.gpt
    keys = [jax.random.fold_in(jax.random.key(SEED), index) for index in INDICES]
    uniforms = np.stack([jax.random.uniform(key, (16,)) for key in keys])
    ranks = np.tile(np.arange(16.0), (2, 1))
    if drawing.order == "random":
        ranks = np.stack([jax.random.uniform(jax.random.fold_in(key, 1), (16,)) for key in keys])
    if given_ids is not None:
        ranks[:, MASK.ravel()] = -1
    orders = np.argsort(ranks, axis=1, kind="stable")
    writing = orders if gpt.random_order else np.tile(np.arange(16), (2, 1))
    scales = guidance_scales(16, drawing.guidance, drawing.guidance_schedule)
    ids, each = np.zeros((2, 16), np.int64), np.arange(2)
    for i in range(16):
        before = np.take_along_axis(ids, writing, axis=1)[:, :-1]
        of_class, blank = (
            np.float64(plain(gpt, np.concatenate([first[:, None], before], axis=1), writing))[:, i, :32]
            for first in (32 + LABELS, np.full(2, gpt.begin_id))
        )
        logits = of_class if scales is None else blank + scales[i] * (of_class - blank)
        place = writing[:, i]
        shares = np.cumsum(softmax(logits / drawing.temperature, axis=1), axis=1)
        token = np.argmax(shares > uniforms[each, place, None], axis=1)
        if given_ids is not None:
            token = np.where(MASK.ravel()[place], given_ids[place], token)
        ids[each, place] = token
    return ids, orders


@pytest.mark.parametrize(
    ("toy", "options", "completed"),
    [
        ("raster_toy", {}, False),
        ("raster_toy", {}, True),
        ("random_toy", {"order": "random"}, False),
        ("random_toy", {"order": "random", "guidance": 3.0, "guidance_schedule": "linear"}, False),
        ("random_toy", {"order": "random"}, True),
        ("random_toy", {}, True),
    ],
)
def test_the_program_writes_what_a_loop_over_the_model_does(request, given, toy, options, completed):
    model, drawing = request.getfixturevalue(toy), Drawing(temperature=1.2, seed=SEED, **options)
    given_ids = np.asarray(model.tokenizer.encode(given.image[None] * 2 - 1)).ravel() if completed else None
    (drawn,) = model.draw(LABELS, drawing, indices=INDICES, completion=given if completed else None)
    ids, orders = written_by_hand(model, drawing, given_ids)
    np.testing.assert_array_equal(drawn.token_ids.reshape(2, 16), ids)
    np.testing.assert_array_equal(drawn.orders, orders)
    assert len(np.unique(ids)) > 4


@pytest.mark.parametrize(("examples", "piece"), [(7, 3), (7, 7), (8, 4), (5, 1), (3, 100), (64, 24), (1, 2)])
def test_in_pieces_is_the_function_at_once(examples, piece):
    sizes = []

    def function(x):
        sizes.append(len(x))
        return jnp.stack([x.sum(axis=1), x[:, 0] * 2], axis=1)

    x = np.random.default_rng(1).integers(0, 1000, (examples, 4))
    y = jax.jit(lambda x: in_pieces(function, x, piece))(x)
    np.testing.assert_array_equal(y, np.stack([x.sum(axis=1), x[:, 0] * 2], axis=1))
    assert max(sizes) <= piece


def shapes_of(model, score, plan: Plan, candidates: int) -> dict:
    """What `draw_pictures` gives for so many candidates, by name."""
    count = jax.ShapeDtypeStruct((candidates,), jnp.int32)
    is_module = isinstance(score, nnx.Module)
    graph, state = nnx.split((model.gpt, model.tokenizer, score if is_module else None))
    draw = functools.partial(draw_pictures, graph, score=None if is_module else score, plan=plan)
    options = Drawing().options(model.gpt)
    drawn = jax.eval_shape(draw, state, Batch(count, count, count), np.uint32(0), options, None, (-1.0, 1.0))
    return {name: value.shape for name, value in drawn.items()}


def test_of_the_candidates_only_the_best_and_all_scores_come_back(random_toy, toy_classifier):
    kept = {"images": (2, 16, 16, 3), "token_ids": (2, 4, 4), "orders": (2, 16), "chosen": (2,)}
    score = ClassifierScore(toy_classifier, random_toy.value_range)
    assert shapes_of(random_toy, score, Plan(2), 20) == kept | {"scores": (20,)}
    assert shapes_of(random_toy, lambda images, labels: images[:, 0, 0, 0], Plan(2), 20) == kept | {"scores": (20,)}
    assert shapes_of(random_toy, None, Plan(2), 2) == kept


def test_a_score_that_is_not_a_number_for_each_picture_is_refused(random_toy):
    with pytest.raises(UserError, match=r"the score of 4 pictures has shape \(4, 1\)"):
        shapes_of(random_toy, lambda images, labels: images[:, 0, 0, :1], Plan(2), 4)


def sharded(module: nnx.Module, mesh) -> nnx.Module:
    """The module with every array that can be cut in eight, along its first or its last axis, cut so."""
    cut = []

    def place(x):
        axes = [axis for axis in (0, x.ndim - 1) if x.ndim > 1 and x.shape[axis] % 8 == 0]
        spec = [None] * x.ndim
        if axes:
            spec[axes[0]] = "data"
            cut.append(x.shape)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    graph, state = nnx.split(module)
    state = jax.tree.map(place, state)
    assert len(cut) > 4
    return nnx.merge(graph, state)


def on_mesh(model, gpt) -> CondVisualGPT:
    names = model.class_names
    return CondVisualGPT(model.tokenizer, gpt, class_names=names, value_range=model.value_range, mesh=make_mesh())


@pytest.mark.parametrize("how", [pytest.param("plain", marks=pytest.mark.long), "guided", "ranked"])
def test_eight_devices_draw_what_one_does(raster_toy, random_toy, toy_classifier, how):
    model, options, accept_n, score = {
        "plain": (raster_toy, {}, 1, None),
        "guided": (random_toy, {"guidance": 3.0, "order": "random"}, 1, None),
        "ranked": (raster_toy, {}, 3, ClassifierScore(toy_classifier, (-1.0, 1.0))),
    }[how]
    labels = np.array([0, 0, 1, 2, 2], np.int32)
    models = [model, on_mesh(model, sharded(model.gpt, make_mesh()))]
    assert not models[1].gpt.token_embedding[...].sharding.is_fully_replicated  # stays as it was cut
    if how == "ranked":
        models.append(on_mesh(model, model.gpt))
        assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(nnx.state(models[2].gpt)))
    one, *eight = (next(m.draw(labels, Drawing(seed=SEED, **options), accept_n=accept_n, score=score)) for m in models)
    for drawn in eight:
        for name in ("token_ids", "labels", "orders", "indices"):
            np.testing.assert_array_equal(getattr(drawn, name), getattr(one, name), err_msg=name)
        np.testing.assert_allclose(drawn.images, one.images, atol=1e-5)
        if score is not None:
            np.testing.assert_allclose(drawn.candidate_scores, one.candidate_scores, atol=1e-5)


def test_the_batch_of_a_request_is_shared_by_the_devices(raster_toy, monkeypatch):
    """Each device has its share of the candidates, those that fill the batch included."""
    seen = []

    def look(graph, state, batch, *rest, score, plan):
        seen.extend([batch.labels.addressable_shards, batch.slots, plan])
        zeros = {name: np.zeros((8, 1), np.int32) for name in ("images", "token_ids", "orders")}
        return zeros | {"chosen": np.arange(8)}

    monkeypatch.setattr("vgpt_jax.sampling.cond_visual_gpt.draw_pictures", look)
    (drawn,) = on_mesh(raster_toy, raster_toy.gpt).draw(np.array([0, 1, 2], np.int32), Drawing())
    shards, slots, plan = seen
    assert [shard.data.tolist() for shard in shards] == [[label] for label in (0, 1, 2, 2, 2, 2, 2, 2)]
    np.testing.assert_array_equal(slots, [0, 1, 2, -1, -1, -1, -1, -1])
    assert (plan.devices, plan.num_kept) == (8, 8)
    np.testing.assert_array_equal(drawn.labels, [0, 1, 2])
