"""Each stage learns, and a step on eight devices is the step on one."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.data.datasets import load_sources
from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.training import generator_stage, tokenizer_stage
from vgpt_jax.training.from_config import (
    abstract_tokenizer,
    at_image_size,
    gpt_arguments,
    tokenizer_arguments,
)
from vgpt_jax.training.metric_log import curves
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.sharding import check_batch_size, make_mesh, shard_batch
from vgpt_jax.training.state import create_sharded_state, start_from
from vgpt_jax.training.tokenizer_step import Recipe, TokenizerState, make_train_step


def tokenizer_parts(config, mesh, optimizer):
    arguments = tokenizer_arguments(config)
    graph, state = create_sharded_state(lambda rngs: Tokenizer(**arguments, rngs=rngs), optimizer, 0, mesh)
    state = TokenizerState(**vars(state), discriminator=None)
    return state, make_train_step(Recipe(graph, optimizer, "l2"))


def random_batch(index: int) -> dict:
    rng = np.random.default_rng(index)
    return {
        "image": rng.random((16, 16, 16, 3), np.float32),
        "label": rng.integers(0, 9, 16).astype(np.int32),
        "token_ids": rng.integers(0, 32, (16, 16)).astype(np.int32),
    }


def test_codes_are_the_latents_of_the_global_batch(tiny_config):
    """After the warm start, codes come from the examples of all eight devices."""
    tiny_config.vector_quantize.update(pretrain_steps=1)
    optimizer = make_optimizer(learning_rate=1e-9, num_steps=10)
    state, train_step = tokenizer_parts(tiny_config, make_mesh(), optimizer)
    arguments = tokenizer_arguments(tiny_config)
    latents = Tokenizer(**arguments, rngs=nnx.Rngs(0)).latents(jnp.asarray(random_batch(0)["image"]))
    state, _ = jax.jit(train_step)(state, shard_batch(make_mesh(), random_batch(0)))
    codes = state.params["quantizer"]["codebook"][...]
    distances = np.linalg.norm(np.asarray(codes)[:, None] - np.asarray(latents).reshape(1, -1, 8), axis=-1)
    assert distances.min(axis=1).max() < 1e-4
    example_of_code = distances.argmin(axis=1) // 16
    assert len(set((example_of_code // 2).tolist())) > 4  # two examples a device


def test_every_stage_learns(trained):
    tokenizer = curves(trained / "tokenizer")
    assert tokenizer["reconstruction"][-1][1] < 0.5 * tokenizer["reconstruction"][0][1]
    generator = curves(trained / "generator")
    assert generator["held_out/nats_per_token"][-1][1] < 0.95 * np.log(32)
    assert generator["held_out/bits_per_token"][-1][1] == pytest.approx(
        generator["held_out/nats_per_token"][-1][1] / np.log(2)
    )
    classifier = curves(trained / "classifier")
    assert classifier["held_out/cross_entropy"][-1][1] < np.log(9)


def test_every_stage_leaves_pictures_curves_and_logs(trained):
    for stage, picture in (("tokenizer", "reconstructions"), ("generator", "samples")):
        assert (trained / stage / "pictures" / f"{picture}_0000040.png").is_file()
    for stage in ("tokenizer", "generator", "classifier"):
        assert (trained / stage / "curves.png").is_file()
        assert (trained / stage / "parameters.txt").read_text().strip()
        assert any((trained / stage / "tensorboard").iterdir())


def test_a_trained_tokenizer_has_the_same_ids_in_bfloat16(trained):
    model, metadata = load_model(trained / "tokenizer" / "model", "tokenizer")
    images = jnp.asarray(np.random.default_rng(0).random((32, 16, 16, 3), np.float32))
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: Tokenizer(**metadata["arguments"] | {"dtype": "bfloat16"}, rngs=nnx.Rngs(0)))
    )
    low = nnx.merge(graph, nnx.state(model))
    np.testing.assert_array_equal(low.encode(images), model.encode(images))
    assert low(images).quantized.z_q.dtype == jnp.float32
    assert (np.asarray(low(images).quantized.z_e) != np.asarray(model(images).quantized.z_e)).any()


def test_code_metrics_wait_for_the_end_of_the_warm_start(tiny_config, tmp_path):
    tiny_config.vector_quantize.update(pretrain_steps=30)
    stage = tokenizer_stage.build(tiny_config, make_mesh(), tmp_path, load_sources(tiny_config.data))
    assert not {"code_use", "perplexity"} & set(stage.evaluate(stage.state).scalars)
    warm = stage.state.replace(buffers=jax.tree.map(lambda x: x + 30 if x.ndim == 0 else x, stage.state.buffers))
    assert {"code_use", "perplexity", "code_entropy", "psnr", "ssim"} <= set(stage.evaluate(warm).scalars)


def test_training_can_start_from_a_trained_model(trained, tiny_config):
    mesh, optimizer = make_mesh(), make_optimizer(learning_rate=1e-3, num_steps=10)
    state, _ = tokenizer_parts(tiny_config, mesh, optimizer)
    directory = trained / "tokenizer" / "model"
    started = start_from(state, str(directory), "tokenizer", mesh)
    loaded, _ = load_model(directory, "tokenizer")
    np.testing.assert_array_equal(started.params["quantizer"]["codebook"][...], loaded.quantizer.codebook[...])
    assert int(started.buffers["quantizer"]["steps"][...]) == 40


def test_what_starts_from_a_trained_model_is_built_like_it(trained, tiny_config):
    """But for what changes no result: dropout, the weights of losses. And images may be of another size."""
    alike = tokenizer_arguments(tiny_config)
    tiny_config.vqvae.ch, tiny_config.vector_quantize.commitment_weight = 24, 0.7
    tiny_config.tokenizer_training.init_from = str(trained / "tokenizer" / "model")
    arguments = tokenizer_arguments(tiny_config)
    assert arguments["quantizer_args"].pop("commitment_weight") == 0.7
    del alike["quantizer_args"]["commitment_weight"]
    assert arguments == alike | {"architecture_args": arguments["architecture_args"]}
    assert arguments["architecture_args"]["ch"] == 16
    tiny_config.data.image_size = 32
    assert abstract_tokenizer(tiny_config).grid == (8, 8)
    tiny_config.data.value_range = (-1.0, 1.0)
    with pytest.raises(
        UserError, match=r"value_range is \[-1.0, 1.0\] in the config, but \[0.0, 1.0\] in the tokenizer in"
    ):
        tokenizer_arguments(tiny_config)


def test_attention_stays_at_its_level_where_images_are_of_another_size():
    arguments = {"image_size": 256, "architecture_args": {"ch": 8, "attn_resolutions": [16, 64]}}
    assert at_image_size(arguments, 128)["architecture_args"] == {"ch": 8, "attn_resolutions": [8, 32]}
    assert at_image_size(arguments, 384)["image_size"] == 384
    with pytest.raises(UserError, match=r"attention at \[16, 64\] px cannot be one for 200 px"):
        at_image_size(arguments, 200)


def test_a_generator_is_for_the_tokenizer_in_the_workdir(trained, tiny_config):
    tiny_config.vector_quantize.num_codewords = 64  # not the 32 of the one that is there
    assert generator_stage.plan(tiny_config, make_mesh(), 9, trained)[0]["num_codes"] == 32
    assert generator_stage.plan(tiny_config, make_mesh(), 9, Path("nowhere"))[0]["num_codes"] == 64
    tiny_config.data.image_size = 32
    with pytest.raises(UserError, match="data.image_size is 32 in the config, but 16 in the tokenizer in"):
        generator_stage.plan(tiny_config, make_mesh(), 9, trained)


def test_a_generator_goes_on_with_the_classes_that_it_knows(trained, tiny_config):
    """Others begin anew; codes, the begin and the padding token are those of the trained one."""
    directory = trained / "generator" / "model"
    loaded, metadata = load_model(directory, "gpt")
    tiny_config.generator_training.init_from = str(directory)
    tiny_config.gpt.update(num_layers=5, residual_dropout=0.3)
    class_names = ("robots", "Flags", "Food & Drink")
    arguments = gpt_arguments(tiny_config, abstract_tokenizer(tiny_config), len(class_names))
    assert (arguments["num_layers"], arguments["residual_dropout"], arguments["num_classes"]) == (2, 0.3, 3)
    mesh, optimizer = make_mesh(), make_optimizer(learning_rate=1e-3, num_steps=10)
    _, state = create_sharded_state(lambda rngs: GPT(**arguments, rngs=rngs), optimizer, 0, mesh)
    fresh = np.asarray(state.params["token_embedding"][...])
    adapt = partial(generator_stage.known_classes, class_names)
    state = start_from(state, str(directory), "gpt", mesh, adapt)
    found, theirs = np.asarray(state.params["token_embedding"][...]), np.asarray(loaded.token_embedding[...])
    flags, food = (metadata["class_names"].index(name) for name in class_names[1:])
    expected = np.concatenate([theirs[:32], fresh[32:33], theirs[[32 + flags, 32 + food]], theirs[-2:]])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        state.params["blocks"][1]["attention"]["qkv"]["kernel"][...], loaded.blocks[1].attention.qkv.kernel[...]
    )
    tiny_config.vector_quantize.num_codewords = 64
    with pytest.raises(UserError, match="holds a generator of num_codes 32, but the tokenizer has 64"):
        gpt_arguments(tiny_config, abstract_tokenizer(tiny_config), 3)


def test_a_warm_start_that_never_ends_is_refused(tiny_config):
    tiny_config.vector_quantize.update(pretrain_steps=40)
    with pytest.raises(UserError, match="never be used"):
        tokenizer_stage.plan(tiny_config, make_mesh(), 9, Path("nowhere"))


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="classifier_training.batch_size is 12"):
        check_batch_size(make_mesh(), 12, "classifier_training.batch_size")
