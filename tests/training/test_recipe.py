"""The tokenizer's stage with everything on, and quantizers that give several tokens a position, through the whole pipeline."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.data.datasets import load_sources
from vgpt_jax.errors import UserError
from vgpt_jax.main import train_all
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.sampling.progressive import decode_so_far
from vgpt_jax.training import generator_stage, tokenizer_stage
from vgpt_jax.training.metric_log import curves
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.sharding import make_mesh, shard_batch

pytestmark = pytest.mark.usefixtures("one_device")


def full_recipe(config):
    config.data.update(image_size=32, resize_size=34)
    config.perceptual.name = "efficientnet"
    config.adversarial.update(discriminator="patchgan", start=0.5, warmup_steps=2, ramp_steps=2, lecam_weight=0.01)
    config.adversarial.diff_augment = ("color", "translation", "cutout")
    config.patchgan.update(ndf=8, num_layers=2)
    config.tokenizer_training.update(num_steps=12, ema_decay=0.9)
    config.vector_quantize.pretrain_steps = 2
    config.logging.update(log_every=1, eval_every=12, checkpoint_every=12)
    return config


@pytest.mark.long
def test_the_full_recipe_trains_logs_and_saves_the_averages(tiny_config, tmp_path):
    config = full_recipe(tiny_config)
    stage = tokenizer_stage.build(config, make_mesh(), tmp_path, load_sources(config.data))
    state, seen = stage.state, []
    for step in range(12):
        state, metrics = stage.step_after(step)(state, shard_batch(make_mesh(), next(stage.batches)), stage.frozen)
        seen.append({name: float(value) for name, value in metrics.items()})
    assert all(np.isfinite(list(metrics.values())).all() for metrics in seen)
    assert all("perceptual" in metrics for metrics in seen)
    assert [i for i, metrics in enumerate(seen) if "adversarial" in metrics] == list(range(6, 12))
    weights = [metrics["adversarial_weight"] for metrics in seen[6:]]
    assert weights[:2] == [0.0, 0.0] and min(weights[2:]) > 0

    found = stage.evaluate(state).scalars
    assert {"psnr", "ssim", "feature_distance", "code_use", "perplexity", "code_entropy"} <= set(found)
    stage.finish(state)
    model, _ = load_model(tmp_path / "tokenizer" / "model", "tokenizer")
    for saved, average, last in zip(
        *map(jax.tree.leaves, (nnx.state(model, nnx.Param), state.averages, state.params)), strict=True
    ):
        np.testing.assert_array_equal(saved, average)
        assert (np.asarray(average) != np.asarray(last)).any()


def test_the_other_discriminator_is_built_for_the_pictures(tiny_config):
    config = full_recipe(tiny_config)
    config.adversarial.discriminator = "stylegan_discriminator"
    config.stylegan_discriminator.update(ch=8, blur=(1, 2, 1))
    arguments, adversary, first = tokenizer_stage.plan_adversary(config)
    assert (arguments["image_size"], arguments["ch"], first, adversary.heard_from) == (32, 8, 6, 8)
    config.stylegan_discriminator.max_ch = 4
    with pytest.raises(UserError, match="stylegan_discriminator.max_ch is 4"):
        tokenizer_stage.plan(config, make_mesh(), 9, Path("nowhere"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("adversarial.start", 40, "adversarial.start is step 40, but tokenizer_training.num_steps only 12"),
        ("adversarial.discriminator", "patch", "adversarial.discriminator is 'patch'"),
        ("adversarial.loss", "wgan", "adversarial.loss is 'wgan'"),
        ("adversarial.diff_augment", ("colour",), "adversarial.diff_augment is 'colour'"),
        ("adversarial.lecam_weight", -1.0, "adversarial.lecam_weight is -1"),
        ("patchgan.num_layers", 5, "patchgan.num_layers"),
        ("patchgan.norm", "layer", "patchgan.norm is 'layer'"),
        ("perceptual.name", "vgg", "perceptual.name is 'vgg'"),
        ("perceptual.vgg_file", "nowhere.pth", "perceptual.vgg_file is 'nowhere.pth', but there is no such file"),
        ("tokenizer_training.ema_decay", 1.0, "tokenizer_training.ema_decay is 1"),
    ],
)
def test_what_the_recipe_cannot_do_is_said_before_it_begins(field, value, message, tiny_config):
    config = full_recipe(tiny_config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        tokenizer_stage.plan(config, make_mesh(), 9, Path("nowhere"))


COMPOSED = {
    "residual_quantize": ({"num_quantizers": 2}, (4, 4, 2)),
    "multi_scale_quantize": ({"scales": (1, 2, 4), "num_phi": 2}, (21,)),
}


@pytest.mark.parametrize("name", ["residual_quantize", pytest.param("multi_scale_quantize", marks=pytest.mark.long)])
def test_every_shape_of_tokens_is_trained_cached_and_sampled(name, tiny_config, tmp_path):
    options, shape = COMPOSED[name]
    tiny_config.tokenizer.quantizer = name
    tiny_config[name].update(**options)
    tiny_config.stages = ("tokenizer", "generator")
    for stage in tiny_config.stages:
        tiny_config[f"{stage}_training"].num_steps = 10
    tiny_config.vector_quantize.pretrain_steps = 2
    tiny_config.logging.eval_every = 10
    train_all(tiny_config, tmp_path / "run")
    assert "held_out/code_use" in curves(tmp_path / "run" / "tokenizer")
    model = CondVisualGPT.from_pretrained(tmp_path / "run", make_mesh())
    as_evaluated = vars(generator_stage.drawing_of(tiny_config, seed=1))  # the program is compiled already
    samples = model.sample(range(len(model.class_names)), num=2, **as_evaluated)
    count = 2 * len(model.class_names)
    assert samples.token_ids.shape == (count, *shape)
    assert samples.images.shape == (count, 16, 16, 3)
    so_far = list(decode_so_far(model, samples.token_ids, samples.orders, np.array([1, model.tokenizer.num_tokens])))
    np.testing.assert_allclose(so_far[-1], samples.images, atol=1e-5)
    assert np.abs(so_far[0] - samples.images).max() > 1e-3
