"""The peer of the speed benchmark computes what our step computes, and the breakdown finds the work."""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgpt_jax.benchmarks import tokenizer_step
from vgpt_jax.benchmarks.device import operations_of, time_by_operation
from vgpt_jax.benchmarks.torch_tokenizer import TokenizerTraining
from vgpt_jax.hardware import peak_flops


@pytest.mark.long
def test_both_steps_have_the_same_losses(monkeypatch):
    """With fewer levels and blocks than are timed, which are compiled for longer than the rest of the benchmarks together."""
    arguments = argparse.Namespace(image_size=32, ch=8, batch_size=2, dtype="float32")
    timed = tokenizer_step.sizes(arguments)
    vqgan = timed["architecture_args"] | {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (16,)}
    monkeypatch.setattr(tokenizer_step, "sizes", lambda arguments: timed | {"architecture_args": vqgan})
    ours = tokenizer_step.OurStep(arguments)
    theirs = TokenizerTraining(
        **tokenizer_step.sizes(arguments), quantizer_args=tokenizer_step.QUANTIZER, discriminator_args={}
    )
    theirs.load_from(ours.tokenizer, ours.discriminator)
    for tolerance in (
        1e-4,
        2e-2,
    ):  # Adam's first step is the sign of each gradient, and of some only rounding decides it
        mine, peer = ours(), theirs.step(ours.batch["image"])
        for name, value in peer.items():
            assert float(mine[name]) == pytest.approx(value, rel=tolerance, abs=tolerance / 10), name


def test_operations_are_counted_and_found_by_kind():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # other tests load libtpu, with which there is no trace
        operations, seconds = pool.submit(of_a_convolution_and_a_product).result()
    products = 2 * 4 * 32 * 32 * 16 * 16 * (9 + 1)
    assert 0.85 * products < operations < 1.2 * products  # the kernel meets no pixel beyond the border
    assert seconds["convolutions, forward and gradient of images"] > 0
    assert sum(seconds.values()) < 1.0


def of_a_convolution_and_a_product() -> tuple[float, dict[str, float]]:
    def f(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout)
        return jnp.tanh(y) @ jnp.ones((16, 16))

    x, kernel = np.ones((4, 32, 32, 16), np.float32), np.ones((3, 3, 16, 16), np.float32)
    program = jax.jit(f).lower(x, kernel).compile()
    return operations_of(program), time_by_operation(lambda: jax.block_until_ready(program(x, kernel)), program)


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("cpu", "float32") is None
