"""A model folder brings back the module, says what it is, and is whole or not there."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.training.saved_model import fingerprint, load_model, read_metadata, save_model

# tensorstore drops its coroutines where a file is missing
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ARGUMENTS = {"num_codes": 8, "num_classes": 2, "num_tokens": 4, "d_model": 8, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def saved(tmp_path):
    gpt = GPT(**ARGUMENTS, rngs=nnx.Rngs(1))
    save_model(tmp_path / "model", "gpt", gpt, ARGUMENTS, class_names=["a", "b"])
    return tmp_path / "model", gpt


def test_a_model_comes_back_to_the_bit(saved):
    directory, gpt = saved
    loaded, metadata = load_model(directory, "gpt")
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(gpt)))
    assert metadata["class_names"] == ["a", "b"]
    assert metadata["arguments"] == ARGUMENTS
    ids = np.array([[8, 1, 2]])
    np.testing.assert_array_equal(loaded(ids), gpt(ids))


def test_saving_again_replaces(saved):
    directory, _ = saved
    other = GPT(**ARGUMENTS, rngs=nnx.Rngs(2))
    save_model(directory, "gpt", other, ARGUMENTS)
    loaded, metadata = load_model(directory, "gpt")
    np.testing.assert_array_equal(loaded.token_embedding[...], other.token_embedding[...])
    assert "class_names" not in metadata
    assert [p.name for p in directory.parent.iterdir()] == ["model"]


def test_the_fingerprint_sees_one_bit_and_the_arguments():
    state = {"a": np.arange(4, dtype=np.float32)}
    other = {"a": np.nextafter(state["a"], np.float32(9))}
    assert fingerprint({}, state) == fingerprint({}, {"a": state["a"].copy()})
    assert len({fingerprint({}, state), fingerprint({}, other), fingerprint({"k": 1}, state)}) == 3


def test_a_missing_model_and_another_kind_are_refused(saved, tmp_path):
    with pytest.raises(UserError, match="there is no trained tokenizer"):
        read_metadata(tmp_path / "nothing", "tokenizer")
    with pytest.raises(UserError, match="holds a gpt, but a tokenizer"):
        read_metadata(saved[0], "tokenizer")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "metadata.json").write_text("{"), "cannot be read"),
        (
            lambda d: (d / "metadata.json").write_text(
                (d / "metadata.json").read_text().replace('"num_codes": 8', '"num_codes": 9')
            ),
            "weights",
        ),
        (lambda d: (d / "metadata.json").write_text(json.dumps({"kind": "gpt", "format_version": 99})), "format 99"),
        (lambda d: [p.unlink() for p in (d / "weights").rglob("*") if p.is_file()], "weights"),
    ],
)
def test_damage_is_one_clear_error(saved, damage, named):
    damage(saved[0])
    with pytest.raises(UserError, match=named):
        load_model(saved[0], "gpt")
