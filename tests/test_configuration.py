"""Reading configs: what is returned has the fields of the default config, each of its kind, whatever was given."""

import json
import sys
from pathlib import Path

import pytest

from vgpt_jax.configuration import check_workdir, claim_workdir, read_config, read_flags
from vgpt_jax.errors import UserError

CONFIGS = sorted(p for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__")


@pytest.fixture
def read(monkeypatch):
    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["main", *arguments, "--workdir=x"])  # config_flags looks for overrides there
        return read_flags(sys.argv)[0]

    return run


@pytest.fixture
def config_file(tmp_path):
    """Writes a config that does something to the default one; returns the flag that names it."""

    def write(*lines: str) -> str:
        body = "".join(f"    {line}\n" for line in ("config = default.get_config()", *lines, "return config"))
        (tmp_path / "mine.py").write_text(f"from configs import default\n\n\ndef get_config():\n{body}")
        return f"--config={tmp_path / 'mine.py'}"

    return write


def as_json(config) -> dict:
    return json.loads(config.to_json_best_effort())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_comes_back_from_its_workdir(read, tmp_path, path):
    config = read(f"--config={path}")
    claim_workdir(tmp_path, config)
    assert as_json(read_config(tmp_path)) == as_json(config)
    check_workdir(tmp_path, config)


def test_a_workdir_of_an_earlier_version_is_as_the_default_where_it_says_nothing(read, tmp_path):
    config = read("--config=configs/emoji.py")
    there = as_json(config) | {"a_field_of_then": 3}
    del there["max_skipped_steps"], there["classifier"], there["gpt"]["bias"]
    (tmp_path / "config.json").write_text(json.dumps(there))
    assert as_json(read_config(tmp_path)) == as_json(config)
    check_workdir(tmp_path, config)


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["config.gpt.d_model = 'wide'"], "gpt.d_model is 'wide', but must be a whole number"),
        (["config.gpt.d_model = True"], "gpt.d_model is True, but must be a whole number"),
        (["config.gpt.d_model = 10**30"], "gpt.d_model is 1000000000000000000000000000000, but must be a whole number"),
        (["config.gpt.d_model = 10**5000"], "gpt.d_model is a number that is too long to show"),
        (["config.gpt.attention_dropout = float('nan')"], "gpt.attention_dropout is nan, but must be a finite number"),
        (["config.data.flip = 1"], "data.flip is 1, but must be True or False"),
        (["config.data.folder = 'a\\nb'"], r"data.folder is 'a\nb', but must be a text without line breaks"),
        (["config.data.crop_scale = (0.5, 'a')"], "data.crop_scale is (0.5, 'a'), but must be a row"),
        (["config.classifier.widths = 8"], "classifier.widths is 8, but must be a row"),
        (["config.vector_quantize.proj_dim = 'a'"], "vector_quantize.proj_dim is 'a', but must be a whole number"),
        (["config.gpt.num_layers = 10**6"], "gpt.num_layers is 1000000, but must be at most 200"),
        (["config.classifier.widths = (8, 10**9)"], "classifier.widths is (8, 1000000000), but must be at most 8192"),
        (["config.gpt = 3"], "gpt is 3, but must be a section"),
        (["del config.gpt"], "the config has no gpt: let it change what configs/default.py returns"),
        (["del config.gpt.d_model"], "the config has no gpt.d_model"),
        (["config.gpt.unlock()", "config.gpt.d_modle = 3"], "nothing reads, gpt.d_modle: did you mean 'd_model'"),
        (["config = {}"], "its get_config() returns {}, not a ConfigDict"),
        (["raise SystemExit(3)"], "cannot be read (SystemExit: 3)"),
    ],
)
def test_what_a_config_file_must_not_hold(read, config_file, lines, named):
    with pytest.raises(UserError) as error:
        read(config_file("with config.ignore_type():", *(f"    {line}" for line in lines)))
    assert named in str(error.value)


def test_what_it_may_hold(read, config_file):
    flag = config_file(
        "config.vector_quantize.proj_dim = 4", "config.gpt.drop_path = 0", "config.vqgan.attn_resolutions = [8]"
    )
    config = read(flag)
    assert (config.vector_quantize.proj_dim, config.gpt.drop_path) == (4, 0)
    assert tuple(config.vqgan.attn_resolutions) == (8,)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"gpt": 3}', '{"seed": null}', "[" * 10**5, '{"gpt": {"d_model": NaN}}']
)
def test_a_damaged_config_of_a_workdir_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not a workdir of vgpt_jax.main"):
        read_config(tmp_path)
