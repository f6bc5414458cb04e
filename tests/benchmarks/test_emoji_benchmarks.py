"""The benchmarks that train on emoji: their variants build, and what they write goes on where it was."""

import json
from pathlib import Path

import numpy as np
import pytest

from vgpt_jax.benchmarks import collapse, quantizers, switch_on
from vgpt_jax.benchmarks.emoji_runs import emoji_config, markdown_table, steps_of, typical
from vgpt_jax.data.datasets import load_sources
from vgpt_jax.quantizers import QUANTIZERS
from vgpt_jax.training import tokenizer_stage
from vgpt_jax.training.from_config import abstract_tokenizer
from vgpt_jax.training.sharding import make_mesh

RESULT = {
    "psnr": 20.0,
    "feature_distance": 0.5,
    "code_use": 0.9,
    "perplexity": 300.0,
    "num_codes": 512,
    "num_tokens": 144,
}
RESULT |= {"step_ms": 30.0}


def test_every_variant_builds_and_every_quantizer_has_one():
    configs = {name: emoji_config(overrides) for name, overrides in quantizers.VARIANTS.items()}
    for name, config in configs.items():
        assert abstract_tokenizer(config).num_tokens >= 144, name
    assert {config.tokenizer.quantizer for config in configs.values()} == set(QUANTIZERS)


@pytest.mark.parametrize("settings", [collapse.SETTINGS, switch_on.SETTINGS])
def test_the_settings_of_the_others_are_sound(settings):
    for overrides in settings.values():
        tokenizer_stage.plan(emoji_config(overrides), make_mesh(), 9, Path("nowhere"))


def test_steps_are_those_of_the_stage(tiny_overrides):
    config = emoji_config(
        tiny_overrides | {"tokenizer_training.num_steps": 8, "tokenizer_training.optimizer.warmup_steps": 1}
    )
    runs = list(steps_of("tiny", config))
    assert [run.step for run in runs] == list(range(1, 9))
    assert int(runs[-1].state.step) == 8
    assert all(np.isfinite(run.metrics["loss"]) and run.seconds > 0 for run in runs)


@pytest.mark.parametrize(("learning", "where"), [("gradient", "params"), ("ema", "buffers")])
def test_far_codes_are_far_from_every_latent(learning, where, tiny_config, tmp_path):
    tiny_config.vector_quantize.update(init_method="kaiming", learning=learning)
    stage = tokenizer_stage.build(tiny_config, make_mesh(), tmp_path, load_sources(tiny_config.data))
    before = np.asarray(getattr(stage.state, where)["quantizer"]["codebook"][...])
    after = np.asarray(getattr(collapse.far_codes(stage.state), where)["quantizer"]["codebook"][...])
    np.testing.assert_allclose(after - before, 10.0, rtol=1e-5)


def test_results_that_are_there_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(quantizers, "run", lambda name, steps, seed: ran.append(name) or RESULT)
    quantizers.main(["--out", str(tmp_path), "--only", "plain"])
    quantizers.main(["--out", str(tmp_path), "--only", "plain", "FSQ"])
    assert ran == ["plain", "FSQ"]
    assert set(json.loads((tmp_path / "results.json").read_text())["results"]) == {"plain", "FSQ"}
    assert (tmp_path / "table.md").read_text().count("\n") == 4
    assert (tmp_path / "plot.png").is_file()
    with pytest.raises(SystemExit):
        quantizers.main(["--out", str(tmp_path), "--only", "plain", "--steps", "300"])
    assert "holds results of" in capsys.readouterr().err


def test_a_table_and_a_median():
    assert markdown_table([{"a": "1", "b": "x"}]) == "| a | b |\n| --- | --- |\n| 1 | x |"
    assert typical([9.0, 9.0, 0.001, 0.003, 0.002, 0.002]) == pytest.approx(2.0)
