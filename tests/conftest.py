"""Eight CPU devices for the sharding tests, and a cache folder that lives as long as the session."""

import os
import sys
from pathlib import Path

import pytest

# Before JAX starts its backend. Nothing in the suite depends on how many devices there are but what tests sharding.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session", autouse=True)
def _cache_dir(tmp_path_factory):
    """Rendered emoji and folder scans go to a temporary folder, here and in child processes."""
    os.environ["VGPT_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


TINY = {  # every stage in seconds: 16 px, 4x4 tokens, batches that eight devices can share
    "data.image_size": 16,
    "data.resize_size": 18,
    "vqvae.ch": 16,
    "vqvae.z_channels": 8,
    "vqvae.num_res_blocks": 1,
    "vector_quantize.num_codewords": 32,
    "vector_quantize.learning": "gradient",
    "vector_quantize.init_method": "latent_random",
    "vector_quantize.codebook_weight": 0.2,
    "vector_quantize.commitment_weight": 0.05,
    "vector_quantize.pretrain_steps": 5,
    "tokenizer_training.batch_size": 16,
    "tokenizer_training.num_steps": 40,
    "tokenizer_training.optimizer.warmup_steps": 5,
    "gpt.d_model": 32,
    "gpt.num_layers": 2,
    "gpt.num_heads": 2,
    "generator_training.batch_size": 16,
    "generator_training.num_steps": 40,
    "generator_training.optimizer.warmup_steps": 5,
    "classifier.widths": (8, 16),
    "classifier_training.batch_size": 16,
    "classifier_training.num_steps": 40,
    "classifier_training.optimizer.warmup_steps": 5,
    "sampling.top_k": 20,
    "sampling.num": 2,
    "logging.log_every": 5,
    "logging.eval_every": 20,
    "logging.checkpoint_every": 10,
}


@pytest.fixture(scope="session")
def tiny_overrides() -> dict:
    """Fields of ``configs/emoji.py`` and the values that make it tiny."""
    return dict(TINY)


@pytest.fixture
def tiny_config():
    """``configs/emoji.py``, made tiny."""
    return make_tiny_config()


def make_tiny_config():
    from configs import emoji

    config = emoji.get_config()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A workdir in which all three stages of the tiny config are finished. Not to be written to."""
    from vgpt_jax.main import train_all

    workdir = tmp_path_factory.mktemp("trained")
    train_all(make_tiny_config(), workdir)
    return workdir
