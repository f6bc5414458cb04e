"""Reading settings: what is no number of ours, and what is made to be long, is one short error."""

from pathlib import Path

import pytest

from vgpt_jax import UserError
from vgpt_jax.pretrained.converted import REQUIRED, check_count, count_numbers, read_json, read_yaml, setting, shown

FILE = Path("config.json")


def read(value, kind, **options):
    return setting({"a": {"b": value}}, "a.b", kind, FILE, **options)


def test_values_are_read_as_they_are():
    assert read(3, int, least=3) == 3
    assert read((1, 2), list) == [1, 2]
    assert read(2, float) == 2
    assert read(-1.5, float) == -1.5
    assert read(False, bool) is False
    assert read({"c": 1}, dict) == {"c": 1}
    assert read(None, int, default=7) == 7
    assert setting([1], "a.b", str, FILE, "x") == "x"


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (-1, int, "a whole number from 0 to 2147483647"),
        (2**31, int, "a whole number from 0 to 2147483647"),
        (2**63, int, "a whole number from 0 to 2147483647"),
        (1.0, int, "a whole number"),
        (True, int, "a whole number"),
        ([1], int, "a whole number"),
        ([1, -1], list, "a list of whole numbers from 0 to 2147483647"),
        ([1, True], list, "a list of whole numbers"),
        (3, list, "a list of whole numbers"),
        (float("nan"), float, "a finite number"),
        (float("inf"), float, "a finite number"),
        (10**400, float, "a finite number"),
        (1e39, float, "a finite number"),
        (True, float, "a finite number"),
        (1, bool, "true or false"),
        (1, str, "a text"),
        ([], dict, "a section"),
    ],
)
def test_another_kind_or_range_is_refused(value, kind, wanted):
    with pytest.raises(UserError) as found:
        read(value, kind)
    assert f"config.json says a.b is {shown(value)}, but it must be {wanted}" in str(found.value)


def test_least_and_missing():
    with pytest.raises(UserError, match="a.b is 0, but it must be a whole number from 1 to"):
        read(0, int, least=1)
    for config in ({}, {"a": None}, {"a": [1]}, {"a": {"b": None}}):
        with pytest.raises(UserError, match="config.json does not say a.b"):
            setting(config, "a.b", int, FILE, REQUIRED)


def test_a_value_in_a_message_is_short():
    assert shown([16, "x"]) == "[16, 'x']"
    assert len(shown("x" * 10**6)) <= 100
    laughs = ["x"] * 10
    for _ in range(30):
        laughs = [laughs] * 10
    assert len(shown(laughs)) < 1000
    assert shown(10**5000) == "a int that is too long to show"


def test_files_that_are_nested_deeply(tmp_path):
    path = tmp_path / "file"
    for text in ("[" * 10**5, '{"a":' * 10**5):
        path.write_text(text)
        with pytest.raises(UserError, match="file cannot be read as JSON"):
            read_json(path)
    path.write_text("[" * 2000)
    with pytest.raises(UserError, match="file cannot be read as YAML"):
        read_yaml(path)


def test_numbers_in_names_are_counted_once_each():
    names = ["layers.0.a", "layers.0.b", "layers.999999999.a", f"layers.{'9' * 5000}.a", "layers.x.a", "my.layers.3.a"]
    tensors = dict.fromkeys(names)
    assert count_numbers("layers.", tensors) == 3
    check_count("n_layer", 3, "layers.", tensors, "file.pt")
    message = r"^file.pt does not fit: its settings say n_layer is 1000000000, but there are 3 layers.\*$"
    with pytest.raises(UserError, match=message):
        check_count("n_layer", 10**9, "layers.", tensors, "file.pt")
