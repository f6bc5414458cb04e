"""Drawing pictures of classes: seeds, labels, batches, pixels, and what is loaded from a workdir."""

import json
import shutil

import numpy as np
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.sampling import cond_visual_gpt
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.sampling.request import Drawing

OPTIONS = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}


def test_same_seed_same_pictures(raster_toy):
    one, two = (raster_toy.sample(["cats", "small"], num=2, seed=3, **OPTIONS) for _ in range(2))
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.token_ids, two.token_ids)
    other = raster_toy.sample(["cats", "small"], num=2, seed=4, **OPTIONS)
    assert (other.token_ids != one.token_ids).any(axis=(1, 2)).all()


def test_the_greatest_seed_is_a_seed(raster_toy):
    greatest, half = (raster_toy.sample(["cats"], num=4, seed=s, **OPTIONS) for s in (2**32 - 1, 2**31 - 1))
    assert (greatest.token_ids != half.token_ids).any(axis=(1, 2)).all()


def test_labels_shapes_and_ranges(raster_toy):
    samples = raster_toy.sample(["Small Dogs", 0, "big"], num=2, **OPTIONS)
    np.testing.assert_array_equal(samples.labels, [2, 2, 0, 0, 1, 1])
    np.testing.assert_array_equal(samples.indices, np.arange(6))
    np.testing.assert_array_equal(samples.orders, np.tile(np.arange(16), (6, 1)))
    assert samples.images.shape == (6, 16, 16, 3) and samples.images.dtype == np.float32
    assert samples.token_ids.shape == (6, 4, 4)
    assert {samples.token_ids.dtype, samples.labels.dtype, samples.indices.dtype, samples.orders.dtype} == {
        np.dtype(np.int32)
    }
    assert samples.images.min() >= 0 and samples.images.max() <= 1
    assert samples.token_ids.min() >= 0 and samples.token_ids.max() < 32
    assert samples.scores is None and samples.candidate_scores is None and samples.chosen is None


def test_images_are_the_decoded_ids_in_0_to_1(raster_toy):
    samples = raster_toy.sample(["cats"], num=4, **OPTIONS)
    decoded = np.clip(raster_toy.tokenizer.decode(samples.token_ids), -1, 1) / 2 + 0.5  # the value range is -1..1
    np.testing.assert_allclose(samples.images, decoded, atol=1e-5)
    assert samples.images.std() > 0.05


def test_a_picture_does_not_depend_on_how_many_follow_or_on_the_batch(raster_toy, monkeypatch):
    many = raster_toy.sample(["cats"], num=9, **OPTIONS)
    np.testing.assert_array_equal(raster_toy.sample(["cats"], num=4, **OPTIONS).token_ids, many.token_ids[:4])
    monkeypatch.setattr(cond_visual_gpt, "MAX_BATCH", 4)
    parts = list(raster_toy.draw(np.zeros(9, np.int32), Drawing(**OPTIONS)))
    assert [len(part.labels) for part in parts] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate([part.token_ids for part in parts]), many.token_ids)
    np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), np.arange(9))


def test_a_picture_is_drawn_again_by_its_index(raster_toy):
    many = raster_toy.sample(["cats", "small"], num=4, **OPTIONS)
    (again,) = raster_toy.draw(np.array([2, 0], np.int32), Drawing(**OPTIONS), indices=np.array([6, 1], np.int32))
    np.testing.assert_array_equal(again.token_ids, many.token_ids[[6, 1]])
    np.testing.assert_allclose(again.images, many.images[[6, 1]], atol=1e-5)


def test_seven_after_ten_and_other_numbers_compile_nothing(raster_toy, random_toy):
    def draw(num: int, temperature: float, top_p: float, scale: float, schedule: str, seed: int):
        raster_toy.sample(["cats"], num=num, temperature=temperature, top_k=20, top_p=top_p, seed=seed)
        guided = {"guidance": scale, "guidance_schedule": schedule, "guidance_power": 0.5}
        return random_toy.sample(["big"], num=num, temperature=temperature, seed=seed, **guided).token_ids

    draw(10, 1.3, 0.9, 2.0, "linear", 0)
    compiled = cond_visual_gpt.draw_pictures._cache_size()
    one = draw(7, 0.7, 0.5, 3.0, "cut_off", 9)
    assert cond_visual_gpt.draw_pictures._cache_size() == compiled
    assert (draw(7, 0.7, 0.5, 9.0, "cut_off", 9) != one).any()  # the scale counts


def test_guidance_of_1_is_none_and_costs_nothing(random_toy):
    plain = random_toy.sample(["cats"], num=4)
    compiled = cond_visual_gpt.draw_pictures._cache_size()
    for schedule in ("constant", "linear", "power_cosine"):
        guided = random_toy.sample(["cats"], num=4, guidance=1.0, guidance_schedule=schedule)
        np.testing.assert_array_equal(guided.token_ids, plain.token_ids)
    assert cond_visual_gpt.draw_pictures._cache_size() == compiled


def test_the_class_changes_the_picture(raster_toy):
    cats, dogs = (raster_toy.sample([name], num=4, **OPTIONS).token_ids for name in ("cats", "small"))
    assert (cats != dogs).any(axis=(1, 2)).all()


def test_pictures_without_a_class(random_toy):
    """They are those of guidance 0, which leaves the class out, of any class."""
    samples = random_toy.sample(None, num=4)
    np.testing.assert_array_equal(samples.labels, -1)
    np.testing.assert_array_equal(samples.token_ids, random_toy.sample(["cats"], num=4, guidance=0.0).token_ids)


def test_orders_are_each_pictures_own(random_toy):
    samples = random_toy.sample(["cats"], num=4, order="random")
    np.testing.assert_array_equal(np.sort(samples.orders), np.tile(np.arange(16), (4, 1)))
    assert len({tuple(order) for order in samples.orders}) == 4
    assert (samples.token_ids != random_toy.sample(["cats"], num=4).token_ids).any()


def test_samples_are_joined(raster_toy):
    parts = [raster_toy.sample([label], num=2, **OPTIONS) for label in (0, 1)]
    joined = cond_visual_gpt.Samples.joined(parts)
    np.testing.assert_array_equal(joined.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(joined.images[2:], parts[1].images)
    assert joined.scores is None


@pytest.mark.parametrize(
    ("cond", "options", "named"),
    [
        (["dragons"], {}, "there is no class 'dragons'"),
        (["dogs"], {}, "fits 2 classes"),
        ([3], {}, "class index 3"),
        ([-1], {}, "class index -1"),
        ([], {}, "no class was given"),
        (["cats"], {"top_k": 33}, "32 codes"),
        (["cats"], {"temperature": 0}, "temperature"),
        (["cats"], {"num": 0}, "num is 0"),
        (["cats"], {"seed": -1}, "seed is -1"),
        (["cats"], {"seed": 2**32}, "seed is 4294967296"),
        (["cats"], {"colour": "red"}, "no sampling option 'colour'"),
        (["cats"], {"guidance": 2.0}, "class_dropout"),
        (["cats"], {"order": "random"}, "gpt.random_order"),
    ],
)
def test_bad_requests_are_one_clear_error(raster_toy, cond, options, named):
    with pytest.raises(UserError, match=named):
        raster_toy.sample(cond, **options)


def test_a_tokenizer_and_a_generator_that_do_not_fit_are_refused(raster_toy):
    with pytest.raises(UserError, match="built for 3 classes, but is given 2"):
        CondVisualGPT(raster_toy.tokenizer, raster_toy.gpt, class_names=("a", "b"), value_range=(-1.0, 1.0))


def test_what_is_loaded_draws_what_was_saved(random_toy, random_workdir):
    model = CondVisualGPT.from_pretrained(random_workdir)
    assert (model.class_names, model.value_range) == (random_toy.class_names, (-1.0, 1.0))
    samples, expected = (m.sample(["cats"], num=4) for m in (model, random_toy))
    np.testing.assert_array_equal(samples.token_ids, expected.token_ids)
    np.testing.assert_allclose(samples.images, expected.images, atol=1e-5)


def test_what_was_trained_draws_its_classes(trained):
    model = CondVisualGPT.from_pretrained(trained)
    samples = model.sample(["flags", 0, "animals"], **OPTIONS)
    np.testing.assert_array_equal(samples.labels, [8, 0, 2])
    np.testing.assert_allclose(samples.images, np.clip(model.tokenizer.decode(samples.token_ids), 0, 1), atol=1e-5)


def test_a_generator_of_another_tokenizer_is_refused(random_workdir, tmp_path):
    shutil.copytree(random_workdir / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(random_workdir / "generator", tmp_path / "generator")
    metadata = tmp_path / "tokenizer" / "model" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="was trained on the ids of tokenizer"):
        CondVisualGPT.from_pretrained(tmp_path)


def test_a_folder_without_models_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        CondVisualGPT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no trained tokenizer"):
        CondVisualGPT.from_pretrained(tmp_path)
