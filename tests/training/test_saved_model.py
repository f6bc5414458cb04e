"""A model folder brings back the module, says what it is, and is whole or not there."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
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


def changed(directory, **fields):
    metadata = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps(metadata | fields))


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
        (lambda d: (d / "metadata.json").write_text("[]"), "holds a list, not an object"),
        (lambda d: (d / "metadata.json").write_text("[" * 10**5), "cannot be read"),
        (lambda d: (d / "metadata.json").write_bytes(b"\xff{}"), "cannot be read"),
        (lambda d: (d / "metadata.json").write_text('{"kind": "gpt"}'), "damaged: format_version is None"),
        (lambda d: (d / "metadata.json").write_text('{"kind": "gpt", "format_version": "1"}'), "format_version is '1'"),
        (lambda d: (d / "metadata.json").write_text('{"kind": "gpt", "format_version": 1}'), "arguments is None"),
        (lambda d: changed(d, fingerprint=3), "damaged: fingerprint is 3"),
        (lambda d: changed(d, arguments={"num_codes": 8}), "damaged: its arguments make no gpt .*num_classes"),
        (lambda d: changed(d, arguments=ARGUMENTS | {"d_model": "wide"}), "damaged: its arguments make no gpt"),
        (lambda d: [p.unlink() for p in (d / "weights").rglob("*") if p.is_file()], "weights"),
    ],
)
def test_damage_is_one_clear_error(saved, damage, named):
    damage(saved[0])
    with pytest.raises(UserError, match=named):
        load_model(saved[0], "gpt")


@pytest.mark.parametrize(
    ("reason", "said"),
    [("RESOURCE_EXHAUSTED: ... [os_error_code='28']", "No space left on device"), ("ABORTED: no reason", "no reason")],
)
def test_what_the_system_refuses_is_an_os_error(monkeypatch, saved, reason, said):
    def refuse(*args, **kwargs):
        raise ValueError(reason)

    before = (saved[0] / "metadata.json").read_text()
    monkeypatch.setattr(ocp.Checkpointer, "save", refuse)
    with pytest.raises(OSError, match=said):
        save_model(saved[0], "gpt", saved[1], ARGUMENTS)
    assert (saved[0] / "metadata.json").read_text() == before
