"""The peer of the generator's benchmarks computes what ours computes, and the printed figures are what they say."""

import re
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.benchmarks import gpt_step, sampling
from vgpt_jax.benchmarks.device import measured_bandwidths, measured_flops
from vgpt_jax.hardware import peak_bandwidth
from vgpt_jax.models.gpt import GPT, SIZES

TINY = {"d_model": 8, "num_layers": 2, "num_heads": 2}
NO_DROPOUT = dict.fromkeys(("embedding_dropout", "residual_dropout", "attention_dropout"), 0.0)
PARAMS_IN_PRODUCTS = 21 * 8 + 2 * (9 * 24 + 9 * 8 + 9 * 32 + 33 * 8 + 4 * 8) + 2 * 8  # of `tiny_gpt`


def tiny_gpt(**options) -> GPT:
    """21 ids, every parameter random, so that no two of a kind can be mistaken for each other."""
    gpt = GPT(num_codes=16, num_classes=3, num_tokens=4, **TINY, **NO_DROPOUT, **options, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for _, param in nnx.to_flat_state(nnx.state(gpt, nnx.Param)):
        param[...] = param[...] + 0.3 * random.standard_normal(param[...].shape).astype(np.float32)
    return gpt


@pytest.fixture(scope="module")
def torch_gpt():
    pytest.importorskip("torch")
    if find_spec("transformers") is None:  # not imported here: the peer does that, without torchvision
        pytest.skip("transformers is not installed")
    from vgpt_jax.benchmarks import torch_gpt

    return torch_gpt


@pytest.mark.parametrize("tie_weights", [True, False])
def test_logits_equal_the_peers(tie_weights, torch_gpt):
    gpt = tiny_gpt(tie_weights=tie_weights)
    peer = torch_gpt.gpt2_like(gpt)
    assert sampling.greatest_difference(gpt, lambda ids: torch_gpt.logits(peer, ids)) < 1e-5
    gpt.blocks[1].norm2.bias[...] += 0.01
    assert sampling.greatest_difference(gpt, lambda ids: torch_gpt.logits(peer, ids)) > 1e-4


@pytest.mark.parametrize("other", [{"positions": "rotary"}, {"bias": False}, {"qk_norm": True}, {"random_order": True}])
def test_the_peer_takes_gpt2_only(other, torch_gpt):
    with pytest.raises((AttributeError, KeyError, RuntimeError)):
        torch_gpt.gpt2_like(tiny_gpt(**other))


def test_both_write_the_same_tokens_where_the_first_is_always_taken(torch_gpt):
    gpt = tiny_gpt(tie_weights=False)
    gpt.head[...] = gpt.head[...].at[gpt.num_codes :].set(0)  # of the peer's whole vocabulary, no class is ever first
    ours = sampling.OurSampler(gpt, 3, top_k=1)
    theirs = torch_gpt.sample(torch_gpt.gpt2_like(gpt), sampling.conditions_of(gpt, 3), 4, top_k=1)
    np.testing.assert_array_equal(ours(), theirs)
    assert ours.compile_seconds > 0


def test_every_call_writes_other_pictures_of_codes():
    raster, parallel = sampling.OurSampler(tiny_gpt(), 2), sampling.OurSampler(tiny_gpt(random_order=True), 2, 5, 3)
    for sampler in (raster, parallel):
        first, second = sampler(), sampler()
        assert first.shape == (2, 4)
        assert first.min() >= 0 and first.max() < 16
        assert (first != second).any()
    np.testing.assert_array_equal(np.sort(parallel.orders), [[0, 1, 2, 3]] * 2)


def test_losses_of_three_steps_agree(torch_gpt, monkeypatch):
    """At settings of which each is seen in the third loss, by 2e-3 and more. Adam enlarges the rounding of small gradients."""
    seen = {"learning_rate": 0.02, "weight_decay": 1.0, "grad_clip": 0.1}
    monkeypatch.setattr(gpt_step, "OPTIMIZER", gpt_step.OPTIMIZER | seen)
    gpt = tiny_gpt()
    ours, theirs = gpt_step.OurStep(gpt, 2), torch_gpt.GPT2Training(torch_gpt.gpt2_like(gpt), **gpt_step.OPTIMIZER)
    mine = [ours() for _ in range(3)]
    peer = [theirs.step(*ours.of_peer()) for _ in range(3)]
    assert mine[0] == pytest.approx(peer[0], abs=1e-5)
    np.testing.assert_allclose(mine, peer, atol=1e-4)


def test_work_is_counted_by_hand():
    assert sampling.params_in_products(tiny_gpt()) == PARAMS_IN_PRODUCTS
    assert sampling.params_in_products(tiny_gpt(tie_weights=False, random_order=True)) == PARAMS_IN_PRODUCTS
    work = sampling.work_of(tiny_gpt(), 3)  # at 2.5 positions on average
    assert work.weight_bytes == 4 * PARAMS_IN_PRODUCTS
    assert work.cache_bytes == 4 * (2 * 2 * 8) * 2.5 * 3
    assert work.operations == 3 * (2 * PARAMS_IN_PRODUCTS + (2 * 2 * 2 * 8) * 2.5)
    assert work.bytes == work.weight_bytes + work.cache_bytes
    assert sampling.work_of(tiny_gpt(dtype="bfloat16"), 3).bytes == work.bytes / 2
    step = 3 * 5 * 4 * (2 * PARAMS_IN_PRODUCTS + (2 * 2 * 2 * 8) * 4)
    assert gpt_step.operations_of_step(tiny_gpt(), 5) == step


def test_the_printed_figures():
    assert sampling.speed("x", [3.0, 1.0, 2.0], batch=10, num_tokens=100, num_steps=50) == (
        "  x: median 2.000 s, least 1.000 s; 500.0 tokens/s, 40.000 ms a step"
    )
    work = sampling.Work(weight_bytes=3e9, cache_bytes=1e9, operations=2e9)
    line = sampling.share_of_bandwidths(work, 0.5, {"a sum": 16e9, "a product": 10e9})
    assert line.endswith("3000.0 MB of weights and 1000.0 MB of the cache, 8.0 GB/s: 50% of a sum's 16.0 GB/s, "
                         "80% of a product's 10.0 GB/s")  # fmt: skip
    line = sampling.share_of_flops(work, 0.5, 16e9)
    assert line == "  a step does 2.00 GFLOP, 4.0 GFLOP/s: 25% of a matrix product's 16.0 GFLOP/s"
    line = sampling.floor(sampling.Work(3.35e9, 0.0, 0.0), 0.002, "NVIDIA H100 80GB HBM3")
    assert line.startswith("  2.000 ms a step; the floor is 1.000 ms")
    assert line.endswith("3.35 TB/s: 50% of the bandwidth")
    assert "not in" in sampling.floor(work, 1.0, "an abacus")
    assert gpt_step.speed("x", [0.3, 0.1, 0.2], 100) == "x: median 200.0 ms a step, least 100.0 ms; 500 tokens/s"
    line = gpt_step.share(2e12, 0.5, 16e12, "the peak")
    assert line == "2000.0 GFLOP a step, 4.000 TFLOP/s: 25.0% of the peak, 16.000 TFLOP/s"


def test_bandwidths():
    assert peak_bandwidth("NVIDIA H200") == 4.8e12
    assert peak_bandwidth("cpu") is None
    measured = measured_bandwidths(64)
    assert set(measured) == {"a sum", "a matrix-vector product"}
    assert min(measured.values()) > 0 and measured_flops("float32", 64) > 0


@pytest.fixture
def tiny_size(monkeypatch):
    """A size for the command lines, and what the device does; other tests may have loaded libtpu, and then there is no trace."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(sampling, "measured_bandwidths", lambda: {"a sum": 1e9})
    for module in (sampling, gpt_step):
        monkeypatch.setattr(module, "measured_flops", lambda dtype: 1e12)
    monkeypatch.setattr(gpt_step, "time_by_operation", lambda step, program: {"matrix products": 0.5})


def test_sampling_prints_both_and_the_shares(tiny_size, torch_gpt, capsys):
    options = ["--size", "tiny", "--num_tokens", "4", "--rounds", "1"]
    sampling.main([*options, "--batches", "1", "2", "--num_steps", "2"])
    out = capsys.readouterr().out
    assert float(re.search(r"difference of the first logits: (\S+)", out).group(1)) < 1e-5
    assert len(re.findall(r"^  (?:vgpt_jax|transformers): median", out, re.MULTILINE)) == 2 * 2 + 2
    one, two, more = re.split(r"^batch 2|^random order", out, flags=re.MULTILINE)[:3]
    assert "of a sum's 1.0 GB/s" in one and "GFLOP" not in one
    assert "of a matrix product's" in two and "GB/s" not in two
    assert "batch 1, 2 steps" in more


def test_gpt_step_prints_equal_losses_and_the_share(tiny_size, torch_gpt, capsys):
    gpt_step.main(["--size", "tiny", "--num_tokens", "4", "--batch_size", "2", "--rounds", "1"])
    out = capsys.readouterr().out
    for which in ("first", "second"):
        ours, peer = re.search(rf"{which} loss: ours (\S+), transformers (\S+)", out).groups()
        assert float(ours) == pytest.approx(float(peer), abs=1e-4)
    assert "of a matrix product, 1.000 TFLOP/s" in out
    assert "where the time goes" in out and "500.0 ms  matrix products" in out


@pytest.mark.parametrize("module", [sampling, gpt_step])
def test_without_the_peer_ours_is_timed_alone(module, tiny_size, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    batch = ["--batches", "1"] if module is sampling else ["--batch_size", "1"]
    module.main(["--size", "tiny", "--num_tokens", "4", "--rounds", "1", *batch])
    out = capsys.readouterr().out
    assert "the peer is not run: torch and transformers not installed" in out
    assert "vgpt_jax: median" in out and "transformers: median" not in out


def test_more_steps_than_tokens_are_refused(capsys):
    with pytest.raises(SystemExit):
        sampling.main(["--num_tokens", "4", "--num_steps", "5"])
    assert "num_steps is 5" in capsys.readouterr().err


def test_a_step_leaves_the_model_it_began_with():
    gpt = tiny_gpt()
    before = np.asarray(gpt.token_embedding[...])
    ours = gpt_step.OurStep(gpt, 2)
    ours()
    np.testing.assert_array_equal(gpt.token_embedding[...], before)
    assert int(jax.device_get(ours.state.step)) == 1
