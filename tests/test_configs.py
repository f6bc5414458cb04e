"""Every config builds its models, optimizers and train steps abstractly, without allocating a weight."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vgpt_jax.models.classifier import ConvClassifier
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.training import classifier_stage, generator_stage, tokenizer_stage
from vgpt_jax.training.from_config import (
    DISCRIMINATORS,
    abstract_tokenizer,
    classifier_arguments,
    gpt_arguments,
    tokenizer_arguments,
)
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.training.state import create_state
from vgpt_jax.training.tokenizer_step import DiscriminatorState, Recipe, TokenizerState, make_train_step

CONFIGS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__")


def get_config(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def abstract_step(build, training, make_train_step, batch, averaged=False, complete=lambda state: state):
    """Shapes of the state before and after a step, and of its metrics."""
    optimizer = make_optimizer(num_steps=training.num_steps, **training.optimizer)
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    before = jax.eval_shape(lambda: complete(create_state(build(nnx.Rngs(0)), optimizer, 0, averaged=averaged)[1]))
    after, metrics = jax.eval_shape(make_train_step(graph, optimizer), before, batch)
    return before, after, metrics


def image_batch(config, batch_size):
    size = config.data.image_size
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokenizer_builds_and_steps(name):
    """With its discriminator, where it has one, and without the perceptual network, whose weights are no config's."""
    config = get_config(name)
    training, arguments = config.tokenizer_training, tokenizer_arguments(config)
    tokenizer_stage.plan(config, make_mesh(), 120, Path("nowhere"))
    planned = tokenizer_stage.plan_adversary(config)
    adversary = planned[1] if planned else None

    def complete(state):
        discriminator = None
        if planned:
            make = DISCRIMINATORS[config.adversarial.discriminator]
            model = make(**planned[0], rngs=nnx.Rngs(0))
            discriminator = DiscriminatorState.of(create_state(model, adversary.optimizer, 0)[1])
        return TokenizerState(**vars(state), discriminator=discriminator)

    before, after, metrics = abstract_step(
        lambda rngs: Tokenizer(**arguments, rngs=rngs),
        training,
        lambda graph, optimizer: make_train_step(
            Recipe(graph, optimizer, training.reconstruction, ema_decay=training.ema_decay), adversary
        ),
        image_batch(config, training.batch_size),
        averaged=training.ema_decay > 0,
        complete=complete,
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert {"loss", "reconstruction", "commitment", "skipped", "skipped_in_a_row"} <= set(metrics)
    assert ("adversarial" in metrics) == (planned is not None)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_generator_builds_and_steps(name):
    config = get_config(name)
    training = config.generator_training
    tokenizer = abstract_tokenizer(config)
    arguments = gpt_arguments(config, tokenizer, 120)
    batch = {
        "token_ids": jax.ShapeDtypeStruct((training.batch_size, tokenizer.num_tokens), jnp.int32),
        "label": jax.ShapeDtypeStruct((training.batch_size,), jnp.int32),
    }
    before, after, metrics = abstract_step(
        lambda rngs: GPT(**arguments, rngs=rngs),
        training,
        lambda graph, optimizer: generator_stage.make_train_step(
            graph, optimizer, training.ema_decay, generator_stage.phases(config)[0]
        ),
        batch,
        averaged=training.ema_decay > 0,
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert set(metrics) == {"nats_per_token", "gradient_norm", "skipped", "skipped_in_a_row"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_classifier_builds_and_steps(name):
    config = get_config(name)
    training, arguments = config.classifier_training, classifier_arguments(config, num_classes=120)
    before, after, _ = abstract_step(
        lambda rngs: ConvClassifier(**arguments, rngs=rngs),
        training,
        lambda graph, optimizer: classifier_stage.make_train_step(graph, optimizer, training.label_smoothing),
        image_batch(config, training.batch_size),
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


def test_stanford_dogs_is_as_published():
    config = get_config("stfdogs")
    tokenizer = abstract_tokenizer(config)
    assert tokenizer.grid == (8, 8)  # 128 px at f16
    assert tokenizer.quantizer.codebook.shape == (4096, 12)
    assert tokenizer.encoder.downsampling == 16
    assert [len(level.attentions) for level in tokenizer.encoder.levels] == [0, 0, 0, 0, 2]
    _, adversary, first = tokenizer_stage.plan_adversary(config)
    assert (first, adversary.heard_from, adversary.ramp_steps, adversary.loss) == (50_000, 50_000, 0, "hinge")
    assert (adversary.weight, adversary.max_adaptive_weight, adversary.lecam_weight) == (0.8, 1e4, 0.0)
    arguments = gpt_arguments(config, tokenizer, 120)
    gpt = nnx.eval_shape(lambda: GPT(**arguments, rngs=nnx.Rngs(0)))
    assert gpt.token_embedding.shape == (4096 + 120 + 2, 768)
    assert (len(gpt.blocks), gpt.head_dim) == (12, 64)


@pytest.mark.parametrize("name", [c for c in CONFIGS if c != "default"])
def test_a_config_has_the_fields_of_default_and_no_other(name):
    def fields(config, prefix=""):
        return {
            f
            for key in config
            for f in (fields(config[key], f"{prefix}{key}.") if hasattr(config[key], "items") else {prefix + key})
        }

    assert fields(get_config(name)) == fields(get_config("default"))
