"""Best of n: the same candidates as without ranking, and the best of them, by whatever scores."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.classifier import ConvClassifier
from vgpt_jax.models.efficientnet_lite0 import EfficientNetLite0
from vgpt_jax.sampling import cond_visual_gpt
from vgpt_jax.sampling.program import ClassifierScore
from vgpt_jax.sampling.request import Drawing
from vgpt_jax.sampling.rerank import ClassConditionedRejectionSampler

OPTIONS = {"temperature": 1.3, "top_k": 20, "seed": 1}


@pytest.fixture(scope="module")
def sampler(raster_toy, toy_classifier) -> ClassConditionedRejectionSampler:
    return ClassConditionedRejectionSampler(raster_toy, toy_classifier)


@pytest.fixture(scope="module")
def candidates(raster_toy):
    """Ten of each of two classes, drawn without ranking."""
    return raster_toy.sample(["cats", "small"], num=10, **OPTIONS)


def test_the_best_of_n_is_the_best_of_the_same_candidates(sampler, candidates):
    ranked = sampler.sample(["cats", "small"], num=2, accept_n=5, **OPTIONS)
    scores = jax.nn.softmax(sampler.classifier(candidates.images * 2 - 1), axis=-1)  # its value range is -1..1
    scores = np.asarray(scores)[np.arange(20), candidates.labels].reshape(4, 5)
    np.testing.assert_allclose(ranked.candidate_scores, scores, atol=1e-5)
    np.testing.assert_array_equal(ranked.scores, ranked.candidate_scores.max(axis=1))
    np.testing.assert_array_equal(ranked.chosen, scores.argmax(axis=1))
    best = np.arange(4) * 5 + scores.argmax(axis=1)
    np.testing.assert_array_equal(ranked.token_ids, candidates.token_ids[best])
    np.testing.assert_allclose(ranked.images, candidates.images[best], atol=1e-5)
    np.testing.assert_array_equal(ranked.indices, best)
    np.testing.assert_array_equal(ranked.labels, [0, 0, 2, 2])
    assert len(set(ranked.chosen)) > 1


def test_best_of_one_is_what_comes(sampler, candidates):
    one = sampler.sample(["cats"], num=3, accept_n=1, **OPTIONS)
    np.testing.assert_array_equal(one.token_ids, candidates.token_ids[:3])
    np.testing.assert_array_equal(one.candidate_scores[:, 0], one.scores)
    np.testing.assert_array_equal(one.chosen, [0, 0, 0])


def test_a_picture_is_drawn_again_by_its_index(sampler):
    ranked = sampler.sample(["cats", "small"], num=2, accept_n=5, **OPTIONS)
    (again,) = sampler.model.draw(ranked.labels[[3, 1]], Drawing.of(**OPTIONS), indices=ranked.indices[[3, 1]])
    np.testing.assert_array_equal(again.token_ids, ranked.token_ids[[3, 1]])
    np.testing.assert_array_equal(again.indices, ranked.indices[[3, 1]])


def test_the_orders_are_those_of_the_best(random_toy, toy_classifier):
    sampler = ClassConditionedRejectionSampler(random_toy, toy_classifier)
    ranked = sampler.sample([0, 2], accept_n=5, order="random", **OPTIONS)
    drawing = Drawing.of(order="random", **OPTIONS)
    every = random_toy.sample([0, 2], num=5, order="random", **OPTIONS)
    np.testing.assert_array_equal(ranked.orders, every.orders[ranked.indices])
    np.testing.assert_array_equal(ranked.token_ids, every.token_ids[ranked.indices])
    assert ranked.chosen.any()
    (again,) = random_toy.draw(ranked.labels, drawing, indices=ranked.indices)
    np.testing.assert_array_equal(again.orders, ranked.orders)


def test_more_candidates_than_fit_into_a_batch_come_in_rounds(sampler, monkeypatch):
    at_once = sampler.sample(["cats", "small"], accept_n=10, **OPTIONS)
    monkeypatch.setattr(cond_visual_gpt, "MAX_BATCH", 4)  # 4, 4 and 2
    rounds = list(sampler.stream(["cats", "small"], accept_n=10, **OPTIONS))
    assert [len(samples.labels) for samples in rounds] == [1, 1]
    rounds = cond_visual_gpt.Samples.joined(rounds)
    for name in ("token_ids", "labels", "indices", "chosen", "orders"):
        np.testing.assert_array_equal(getattr(rounds, name), getattr(at_once, name), err_msg=name)
    for name in ("images", "scores", "candidate_scores"):
        np.testing.assert_allclose(getattr(rounds, name), getattr(at_once, name), atol=1e-5, err_msg=name)


def test_batches_are_filled_and_their_split_changes_nothing(sampler, monkeypatch):
    at_once = sampler.sample(["cats", "small"], num=2, accept_n=5, **OPTIONS)
    monkeypatch.setattr(cond_visual_gpt, "MAX_BATCH", 16)  # three times five candidates, then one
    parts = list(sampler.stream(["cats", "small"], num=2, accept_n=5, **OPTIONS))
    assert [len(samples.labels) for samples in parts] == [3, 1]
    np.testing.assert_array_equal(np.concatenate([p.token_ids for p in parts]), at_once.token_ids)
    np.testing.assert_array_equal(np.concatenate([p.indices for p in parts]), at_once.indices)


def test_a_function_may_score(raster_toy, candidates):
    redness = lambda images, labels: images[..., 0].mean((1, 2)) - images[..., 1].mean((1, 2))  # noqa: E731
    ranked = ClassConditionedRejectionSampler(raster_toy, redness).sample(["cats", "small"], accept_n=10, **OPTIONS)
    scores = (candidates.images[..., 0] - candidates.images[..., 1]).mean((1, 2)).reshape(2, 10)
    np.testing.assert_allclose(ranked.candidate_scores, scores, atol=1e-5)
    np.testing.assert_array_equal(ranked.indices, [scores[0].argmax(), 10 + scores[1].argmax()])


def test_a_function_is_told_the_labels_also_where_there_are_none(raster_toy):
    sampler = ClassConditionedRejectionSampler(raster_toy, lambda images, labels: labels)
    assert sampler.sample([2, 0], accept_n=2, **OPTIONS).candidate_scores.tolist() == [[2, 2], [0, 0]]
    assert sampler.sample(None, num=2, accept_n=2, **OPTIONS).candidate_scores.tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("at_once", [64, 4])
def test_a_score_that_is_no_number_loses_and_never_to_another_picture(raster_toy, candidates, monkeypatch, at_once):
    """The best half of the cats is no number, and no small dog is one: what comes is a small dog all the same."""
    means = candidates.images[:10].mean((1, 2, 3))
    middle = float(np.sort(means)[4:6].mean())

    def score(images, labels):
        mean = images.mean((1, 2, 3))
        return jnp.where((labels == 2) | (mean > middle), jnp.nan, mean)

    monkeypatch.setattr(cond_visual_gpt, "MAX_BATCH", at_once)
    drawn = ClassConditionedRejectionSampler(raster_toy, score).sample(["cats", "small"], accept_n=10, **OPTIONS)
    assert drawn.indices.tolist() == [np.where(means > middle, -np.inf, means).argmax(), 10]
    np.testing.assert_array_equal(np.isnan(drawn.candidate_scores), [means > middle, [True] * 10])
    np.testing.assert_array_equal(drawn.token_ids, candidates.token_ids[drawn.indices])


def test_scores_that_are_all_the_least_keep_the_first_of_their_own(raster_toy):
    sampler = ClassConditionedRejectionSampler(raster_toy, lambda images, labels: jnp.full(labels.shape, -jnp.inf))
    assert sampler.sample([0, 1, 2], accept_n=2, **OPTIONS).indices.tolist() == [0, 2, 4]


def test_a_modules_weights_are_no_part_of_the_program(raster_toy, toy_classifier):
    """Another classifier of the same shapes compiles nothing."""
    graph, state = nnx.split(toy_classifier)
    other = nnx.merge(graph, jax.tree.map(lambda x: -x, state))
    one = raster_toy.sample([0], num=4, score=ClassifierScore(toy_classifier, (-1.0, 1.0)), **OPTIONS)
    compiled = cond_visual_gpt.draw_pictures._cache_size()
    two = raster_toy.sample([0], num=4, score=ClassifierScore(other, (-1.0, 1.0)), **OPTIONS)
    assert cond_visual_gpt.draw_pictures._cache_size() == compiled
    assert np.abs(one.scores - two.scores).max() > 1e-3


def test_what_cannot_be_ranked_is_refused(sampler, raster_toy):
    with pytest.raises(UserError, match="knows 5 classes, the generator 3"):
        ClassConditionedRejectionSampler(raster_toy, ConvClassifier(num_classes=5, widths=(8,), rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="cond is None"):
        sampler.sample(None)
    with pytest.raises(UserError, match="accept_n is 0"):
        sampler.stream(["cats"], accept_n=0)  # at the call, before anything is drawn
    with pytest.raises(UserError, match="accept_n is 2, but there is nothing that scores"):
        raster_toy.draw(np.zeros(1, np.int32), Drawing(), accept_n=2)
    with pytest.raises(UserError, match="temperature is 0"):
        sampler.stream(["cats"], temperature=0)


def test_a_classifier_of_other_classes_is_refused(random_workdir, tmp_path):
    shutil.copytree(random_workdir, tmp_path / "run")
    metadata = tmp_path / "run" / "classifier" / "model" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"class_names": ["a", "b", "c"]}))
    with pytest.raises(UserError, match="was trained on other classes"):
        ClassConditionedRejectionSampler.from_pretrained(tmp_path / "run")


# Classifiers that know other labels


@pytest.fixture(scope="module")
def by_labels(raster_toy, toy_classifier):
    """The toy's classifier as one of elsewhere, whose images are in 0..1."""
    labels = ("small dogs", "big dogs, young", "Big dogs, old")
    return ClassConditionedRejectionSampler(raster_toy, toy_classifier, labels=labels, value_range=(0.0, 1.0))


def test_labels_are_found_by_name_and_those_of_a_class_are_added_up(by_labels, toy_classifier, raster_toy):
    drawn = raster_toy.sample(["big", "small"], num=4, **OPTIONS)
    ranked = by_labels.sample(["big", "small"], accept_n=4, **OPTIONS)
    scores = np.asarray(jax.nn.softmax(toy_classifier(drawn.images), axis=-1))
    expected = np.stack([scores[:4, 1] + scores[:4, 2], scores[4:, 0]])
    np.testing.assert_allclose(ranked.candidate_scores, expected, atol=1e-5)
    np.testing.assert_array_equal(ranked.indices, [expected[0].argmax(), 4 + expected[1].argmax()])


def test_a_class_that_the_classifier_does_not_know_is_refused_where_it_is_asked_for(by_labels):
    with pytest.raises(UserError, match="the classifier has no label for Cats: choose another"):
        by_labels.stream(["small", "cats"])


def test_labels_must_be_as_many_as_the_classifier_knows(raster_toy, toy_classifier):
    with pytest.raises(UserError, match="knows 3 classes, its list of labels 2"):
        ClassConditionedRejectionSampler(raster_toy, toy_classifier, labels=("a", "b"))


def test_without_a_classifier_what_comes_is_kept(random_workdir):
    sampler = ClassConditionedRejectionSampler.from_pretrained(random_workdir, classifier="none")
    assert sampler.sample(["cats"], accept_n=1, **OPTIONS).scores is None
    with pytest.raises(UserError, match="nothing that scores"):
        sampler.sample(["cats"], accept_n=2, **OPTIONS)


def test_the_classifier_is_the_workdirs_own_or_else_efficientnet(random_workdir, tmp_path):
    own = ClassConditionedRejectionSampler.from_pretrained(random_workdir)
    assert isinstance(own.classifier, ConvClassifier)
    assert own.matches is None
    shutil.copytree(random_workdir, tmp_path / "run", ignore=shutil.ignore_patterns("classifier"))
    other = ClassConditionedRejectionSampler.from_pretrained(tmp_path / "run")
    assert isinstance(other.classifier.network, EfficientNetLite0)
    with pytest.raises(UserError, match="no label for Big Dogs: choose another"):
        other.stream(["big dogs"])
    with pytest.raises(UserError, match="there is no trained classifier"):
        ClassConditionedRejectionSampler.from_pretrained(tmp_path / "run", classifier="own")
