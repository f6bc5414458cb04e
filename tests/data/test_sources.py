"""What sources share: whose examples they are, and where what is derived from them is kept."""

from pathlib import Path

import numpy as np

from vgpt_jax.data.sources import ArraySource, chosen_cache_dir, identity_of, remembered
from vgpt_jax.data.token_cache import TokenSource


def test_identity_differs_with_names_classes_and_labels():
    labels = np.array([0, 1, 0], np.int32)
    same = [
        identity_of(("a", "b"), ("x", "y", "z"), labels),
        identity_of(["a", "b"], ["x", "y", "z"], labels.astype(np.int64)),
    ]
    assert same[0] == same[1]
    others = [
        identity_of(("b", "a"), ("x", "y", "z"), labels),
        identity_of(("a", "b"), ("y", "x", "z"), labels),
        identity_of(("a", "b"), ("x", "y", "z"), labels[::-1] + 1),
    ]
    assert len({same[0], *others}) == 4


def test_identity_of_tokens_differs_with_one_id():
    ids = np.zeros((2, 3, 4), np.uint16)
    changed = ids.copy()
    changed[1, 2, 3] = 1
    sources = [TokenSource((i,), np.zeros(3, np.int32), ("a",)) for i in (ids, ids.copy(), changed)]
    assert sources[0].identity == sources[1].identity != sources[2].identity


def test_an_array_source_gives_its_examples():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    source = ArraySource(images, np.array([1, 0], np.int32), ("a", "b"), ("x", "y"))
    assert len(source) == 2
    np.testing.assert_array_equal(source[1]["image"], images[1])
    assert source[0]["label"] == 1


def test_the_cache_folder_is_the_one_given_or_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("VGPT_JAX_CACHE", "~/there")
    assert chosen_cache_dir("~/here") == Path.home() / "here"
    assert chosen_cache_dir("") == Path.home() / "there"
    monkeypatch.delenv("VGPT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert chosen_cache_dir(None) == Path("/xdg/vgpt_jax")


def test_what_is_remembered_is_found_out_once_and_again_where_it_is_damaged(tmp_path, capsys):
    asked = []

    def find_out():
        asked.append(None)
        return {"found": len(asked)}

    path = tmp_path / "deep" / "known.json"
    assert [remembered(path, find_out, "it")["found"] for _ in range(2)] == [1, 1]
    path.write_text("{")
    assert remembered(path, find_out, "it") == {"found": 2}
    assert remembered(path / "below a file.json", find_out, "it") == {"found": 3}
    assert "it could not be remembered" in capsys.readouterr().err
