"""Every config builds its models, optimizers and train steps abstractly, without allocating a weight."""

import importlib
from pathlib import Path

import jax
import pytest
from flax import nnx

from vgpt_jax.models.gpt import GPT
from vgpt_jax.training.from_config import (
    abstract_tokenizer,
    gpt_arguments,
)
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.training.stages import STAGES
from vgpt_jax.training.tokenizer_stage import plan_adversary

CONFIGS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__")


def get_config(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_stage_builds_and_steps(name):
    """Each of its steps, as shapes: what comes out is a state as the one before, and metrics that are numbers."""
    config = get_config(name)
    for stage, module in STAGES.items():
        planned = module.program(config, make_mesh(), 120, Path("nowhere"))
        for first, step in planned.train_steps.items():
            after, metrics = jax.eval_shape(step, planned.state, planned.batch, planned.frozen)
            shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (planned.state, after)]
            assert shapes[0] == shapes[1]
            assert all(metric.shape == () for metric in metrics.values())
            wanted = {"tokenizer": "reconstruction", "generator": "nats_per_token", "classifier": "cross_entropy"}
            assert {wanted[stage], "gradient_norm", "skipped", "skipped_in_a_row"} <= set(metrics)
            assert ("adversarial" in metrics) == (stage == "tokenizer" and first > 0)
        assert (len(planned.train_steps) > 1) == (
            stage == "tokenizer" and config.adversarial.discriminator != "none" or config.gpt.random_order
        )


def test_stanford_dogs_is_as_published():
    config = get_config("stfdogs")
    tokenizer = abstract_tokenizer(config)
    assert tokenizer.grid == (8, 8)  # 128 px at f16
    assert tokenizer.quantizer.codebook.shape == (4096, 12)
    assert tokenizer.encoder.downsampling == 16
    assert [len(level.attentions) for level in tokenizer.encoder.levels] == [0, 0, 0, 0, 2]
    _, adversary, first = plan_adversary(config)
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
