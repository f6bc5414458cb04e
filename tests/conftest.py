"""Eight CPU devices for the sharding tests, a cache folder that lives as long as the session, tiny configs and models."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before JAX starts its backend. Nothing in the suite depends on how many devices there are but what tests sharding.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# What one process has compiled the others, and those that tests start, need not; nor does the next run. The small programs too:
# every module's tests want the same ones, many to a test.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).with_name("helpers"))]

from vgpt_jax.host_memory import collect_garbage_rarely  # noqa: E402 - where it lies is known only now

collect_garbage_rarely()


FIRST = (  # files and folders that take longest, the longest first
    "reliability",
    "test_notebook.py",
    "training/test_recipe.py",
    "data/test_stanford_dogs.py",
    "test_compile_ahead.py",
    "test_command_lines.py",
    "training",
    "benchmarks",
)


def pytest_collection_modifyitems(items):
    """What takes long comes first, or one of the suite's processes would be at it long after the other is done."""

    def place(item) -> int:
        path = item.path.relative_to(Path(__file__).parent)
        return next((i for i, first in enumerate(FIRST) if path.is_relative_to(first)), len(FIRST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _cache_dir(tmp_path_factory):
    """Rendered emoji and folder scans go to a temporary folder, here and in child processes."""
    os.environ["VGPT_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs():
    """Programs of a module are let go with it: those of all together take gigabytes."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """Runs are on one device, as on a laptop: for modules whose tests are not about meshes."""
    import jax

    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield


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


@pytest.fixture(scope="session")
def tiny_arguments(tiny_overrides) -> list[str]:
    """The same as arguments of a command line."""
    return [f"--config.{name}={value}" for name, value in tiny_overrides.items()]


@pytest.fixture
def tiny_config():
    """``configs/emoji.py``, made tiny."""
    from configs import emoji

    config = emoji.get_config()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_arguments) -> Path:
    """A workdir in which all three stages of the tiny config are finished, by one device, as by a command. There is one for all
    processes of the suite. Not to be written to."""
    from quick_compile import ENVIRONMENT

    folder = tmp_path_factory.getbasetemp()
    workdir = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained"
    with workdir.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits
        if not (workdir / "classifier" / "model").exists():
            command = [sys.executable, "-m", "vgpt_jax.main", "--config=configs/emoji.py", f"--workdir={workdir}"]
            ended = subprocess.run(
                [*command, *tiny_arguments],
                cwd=Path(__file__).parents[1],
                env=os.environ | ENVIRONMENT,
                capture_output=True,
                text=True,
            )
            assert ended.returncode == 0, ended.stderr
    return workdir


@pytest.fixture
def error_of(capsys):
    """Runs a command line that is wrong, and returns the one line that it says."""

    def run(command, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        return lines[-1]

    return run


TOY_TOKENIZER = {  # 16 px, 4x4 tokens of 32 codes
    "image_size": 16,
    "architecture": "vqvae",
    "architecture_args": {"ch": 8, "z_channels": 8, "num_downsamplings": 2, "num_res_blocks": 1, "res_channels": 4},
    "quantizer": "fsq",
    "quantizer_args": {"levels": [4, 8]},
}
TOY_GPT = {"num_codes": 32, "num_classes": 3, "num_tokens": 16, "d_model": 32, "num_layers": 2, "num_heads": 2}
TOY_CLASSIFIER = {"num_classes": 3, "value_range": [-1.0, 1.0], "widths": [8, 8]}


def random_module(make, gain: float):
    """``make()`` with random weights, matrices with so much gain that what they give is far from uniform. Compiles nothing."""
    import jax
    import numpy as np
    from flax import nnx

    rng = np.random.default_rng(7)

    def draw(path, x):
        if x.ndim < 2:
            return jax.numpy.full(x.shape, "scale" in jax.tree_util.keystr(path), x.dtype)
        return jax.numpy.asarray(rng.normal(0, gain / np.prod(x.shape[:-1]) ** 0.5, x.shape), x.dtype)

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map_with_path(draw, state))


@pytest.fixture(scope="session", name="random_module")
def _random_module():
    return random_module


def make_toy(random_order: bool):
    from flax import nnx

    from vgpt_jax.models.gpt import GPT
    from vgpt_jax.models.tokenizer import Tokenizer
    from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT

    arguments = TOY_GPT | {"random_order": random_order, "class_dropout": 0.1 if random_order else 0.0}
    return CondVisualGPT(
        random_module(lambda: Tokenizer(**TOY_TOKENIZER, rngs=nnx.Rngs(0)), 1.5),
        random_module(lambda: GPT(**arguments, rngs=nnx.Rngs(0)), 3.0),
        class_names=("Cats", "Big Dogs", "Small Dogs"),
        value_range=(-1.0, 1.0),
    )


@pytest.fixture(scope="session")
def raster_toy():
    """A `CondVisualGPT` of random weights that writes in raster order, without guidance: three classes, 4x4 of 32 codes."""
    return make_toy(random_order=False)


@pytest.fixture(scope="session")
def random_toy():
    """The same in random order, with guidance."""
    return make_toy(random_order=True)


@pytest.fixture(scope="session")
def toy_classifier():
    """A classifier of random weights for the pictures of both, in -1..1."""
    from flax import nnx

    from vgpt_jax.models.classifier import ConvClassifier

    return random_module(lambda: ConvClassifier(**TOY_CLASSIFIER, rngs=nnx.Rngs(0)), 2.0)


@pytest.fixture(scope="session")
def random_workdir(random_toy, toy_classifier, tmp_path_factory) -> Path:
    """A workdir with ``random_toy`` and ``toy_classifier``. Not to be written to."""
    from vgpt_jax.training.saved_model import save_model

    workdir = tmp_path_factory.mktemp("random_toy")
    names = {"class_names": list(random_toy.class_names)}
    of_tokenizer = save_model(
        workdir / "tokenizer" / "model", "tokenizer", random_toy.tokenizer, TOY_TOKENIZER, value_range=[-1.0, 1.0]
    )
    names_and_tokenizer = names | {"tokenizer_fingerprint": of_tokenizer["fingerprint"]}
    arguments = TOY_GPT | {"random_order": True, "class_dropout": 0.1}
    save_model(workdir / "generator" / "model", "gpt", random_toy.gpt, arguments, **names_and_tokenizer)
    save_model(workdir / "classifier" / "model", "classifier", toy_classifier, TOY_CLASSIFIER, **names)
    return workdir
