"""Sampling from a trained workdir: seeds, classes, batches, pixels, and the best of n."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.classifier import ConvClassifier
from vgpt_jax.sampling import cond_visual_gpt
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.sampling.progressive import decode_so_far
from vgpt_jax.sampling.rerank import ClassConditionedRejectionSampler

OPTIONS = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def model(trained) -> CondVisualGPT:
    return CondVisualGPT.from_pretrained(trained)


@pytest.fixture(scope="module")
def sampler(trained) -> ClassConditionedRejectionSampler:
    return ClassConditionedRejectionSampler.from_pretrained(trained)


def test_same_seed_same_pictures(model):
    one, two = (model.sample(["flags", "smileys"], num=2, seed=3, **OPTIONS) for _ in range(2))
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.token_ids, two.token_ids)
    assert (model.sample(["flags", "smileys"], num=2, seed=4, **OPTIONS).token_ids != one.token_ids).any()


def test_the_greatest_seed_is_a_seed(model):
    greatest = model.sample(["flags"], num=2, seed=2**32 - 1, **OPTIONS)
    assert (greatest.token_ids != model.sample(["flags"], num=2, seed=2**31 - 1, **OPTIONS).token_ids).any()


def test_labels_shapes_and_ranges(model):
    samples = model.sample(["flags", 0, "animals"], num=2, **OPTIONS)
    np.testing.assert_array_equal(samples.labels, [8, 8, 0, 0, 2, 2])
    assert samples.images.shape == (6, 16, 16, 3)
    assert samples.token_ids.shape == (6, 4, 4)
    assert samples.images.min() >= 0 and samples.images.max() <= 1
    assert samples.token_ids.min() >= 0 and samples.token_ids.max() < 32


def test_images_are_the_decoded_ids(model):
    samples = model.sample(["flags"], num=3, **OPTIONS)
    decoded = np.clip(model.tokenizer.decode(samples.token_ids), 0, 1)
    np.testing.assert_allclose(samples.images, decoded, atol=1e-5)


def test_a_picture_does_not_depend_on_how_many_follow(model, monkeypatch):
    many = model.sample(["flags"], num=11, **OPTIONS)
    np.testing.assert_array_equal(model.sample(["flags"], num=5, **OPTIONS).token_ids, many.token_ids[:5])
    monkeypatch.setattr(cond_visual_gpt, "MAX_BATCH", 4)  # split into 4, 4, 3
    np.testing.assert_array_equal(model.sample(["flags"], num=11, **OPTIONS).token_ids, many.token_ids)


def test_seven_after_eight_compiles_nothing(model):
    model.sample(["flags"], num=8, **OPTIONS)
    compiled = cond_visual_gpt._draw._cache_size()
    model.sample(["smileys"], num=7, temperature=0.7, top_k=20, top_p=0.5, seed=9)
    assert cond_visual_gpt._draw._cache_size() == compiled


def test_the_class_changes_the_picture(model):
    assert (
        model.sample(["flags"], num=4, **OPTIONS).token_ids != model.sample(["smileys"], num=4, **OPTIONS).token_ids
    ).any()


def test_unconditional_sampling(model):
    samples = model.sample(None, num=3, **OPTIONS)
    np.testing.assert_array_equal(samples.labels, -1)
    assert samples.images.shape == (3, 16, 16, 3)


def test_top_p_1_is_no_top_p(model):
    np.testing.assert_array_equal(
        model.sample(["flags"], num=2, top_p=1.0).token_ids, model.sample(["flags"], num=2).token_ids
    )


@pytest.mark.parametrize(
    ("cond", "options", "named"),
    [
        (["dragons"], {}, "there is no class 'dragons'"),
        ([9], {}, "class index 9"),
        ([], {}, "no class was given"),
        (["flags"], {"top_k": 33}, "32 codes"),
        (["flags"], {"temperature": 0}, "temperature"),
        (["flags"], {"num": 0}, "num is 0"),
        (["flags"], {"seed": -1}, "seed is -1"),
        (["flags"], {"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_bad_requests_are_one_clear_error(model, cond, options, named):
    with pytest.raises(UserError, match=named):
        model.sample(cond, **options)


def test_the_best_of_n_is_kept(sampler):
    ranked = sampler.sample(["flags", "objects"], num=2, accept_n=5, seed=1, **OPTIONS)
    drawn = sampler.model.sample(["flags", "objects"], num=10, seed=1, classifier=sampler.classifier, **OPTIONS)
    scores = drawn.scores.reshape(4, 5)
    np.testing.assert_array_equal(ranked.candidate_scores, scores)
    np.testing.assert_array_equal(ranked.scores, scores.max(axis=1))
    for i in range(4):
        np.testing.assert_array_equal(ranked.images[i], drawn.images[5 * i + ranked.chosen[i]])
    np.testing.assert_array_equal(ranked.labels, [8, 8, 6, 6])


def test_scores_are_the_classifiers_softmax_of_the_wanted_class(sampler):
    samples = sampler.model.sample(["flags", "symbols"], num=3, classifier=sampler.classifier, **OPTIONS)
    probabilities = jax.nn.softmax(sampler.classifier(samples.images), axis=-1)  # value range 0..1
    np.testing.assert_allclose(samples.scores, probabilities[np.arange(6), samples.labels], atol=1e-5)


def test_a_classifier_of_other_classes_is_refused(model):
    with pytest.raises(UserError, match="knows 5 classes"):
        ClassConditionedRejectionSampler(model, ConvClassifier(num_classes=5, widths=(8,), rngs=nnx.Rngs(0)))


def test_a_generator_of_another_tokenizer_is_refused(trained, tmp_path):
    shutil.copytree(trained / "tokenizer" / "model", tmp_path / "tokenizer" / "model")
    shutil.copytree(trained / "generator" / "model", tmp_path / "generator" / "model")
    metadata = tmp_path / "tokenizer" / "model" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="was trained on the ids of tokenizer"):
        CondVisualGPT.from_pretrained(tmp_path)


def test_a_folder_without_models_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        CondVisualGPT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no trained tokenizer"):
        CondVisualGPT.from_pretrained(tmp_path)


def test_the_last_frame_of_the_decoding_is_the_picture_and_the_first_is_not(model):
    samples = model.sample(["flags", "smileys"], **OPTIONS)
    frames = decode_so_far(model, samples.token_ids, np.array([1, 8, 16]))
    assert frames.shape == (3, 2, 16, 16, 3)
    np.testing.assert_allclose(frames[-1], samples.images, atol=1e-5)
    assert np.abs(frames[0] - samples.images).max() > 1e-3


def test_a_frame_sees_no_token_that_comes_later(model):
    ids = model.sample(["flags"], **OPTIONS).token_ids
    other = ids.copy()
    other.reshape(1, -1)[:, 8:] = (other.reshape(1, -1)[:, 8:] + 1) % 32
    counts = np.array([8])
    np.testing.assert_array_equal(decode_so_far(model, ids, counts), decode_so_far(model, other, counts))
