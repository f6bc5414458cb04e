"""The tokenizer's whole training step beside the same computation in PyTorch: ``python -m vgpt_jax.benchmarks.tokenizer_step``.

VQ-GAN at 64 px with ch 32, batch 8, float32, perceptual loss (EfficientNet-Lite0) and PatchGAN with the adaptive weight, Adam for
both players. On CPU the two take turns in one process, with the same weights, images and number of threads, and the ratio of
their medians is printed, with the parts in which PyTorch and XLA spend their time. On an accelerator our step is timed alone,
and its share of the chip's peak is printed, from the compiled step's own count of operations.
"""

import argparse
import sys

import jax
import numpy as np
import optax
from flax import nnx

from vgpt_jax.benchmarks.device import operations_of, print_parts, seconds_of, time_by_operation
from vgpt_jax.errors import check_range, exit_on_user_error
from vgpt_jax.hardware import peak_flops
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.models.patchgan import PatchGAN
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.load import load_perceptual
from vgpt_jax.progress import progress
from vgpt_jax.training.state import create_state
from vgpt_jax.training.tokenizer_step import Adversary, DiscriminatorState, Recipe, TokenizerState, make_train_step

QUANTIZER = {"num_codewords": 1024, "embedding_dim": 8}


def sizes(arguments: argparse.Namespace) -> dict:
    """The tokenizer's arguments but the quantizer's, for the command line's."""
    vqgan = {"z_channels": 128, "ch": arguments.ch, "ch_mult": (1, 2, 2, 4), "num_res_blocks": 2}
    vqgan["attn_resolutions"] = (arguments.image_size // 8,)
    return {"image_size": arguments.image_size, "architecture_args": vqgan}


class OurStep:
    """Our training step, compiled: `tokenizer` and `discriminator` are the models of step 0, `__call__` does a step."""

    def __init__(self, arguments: argparse.Namespace):
        plain = QUANTIZER | {"pretrain_steps": 0, "penalty_weight": 0.0, "init_method": "kaiming"}
        optimizer = optax.adam(1e-4, b1=0.5, b2=0.9)
        self.tokenizer = Tokenizer(
            **sizes(arguments), architecture="vqgan", quantizer_args=plain, dtype=arguments.dtype, rngs=nnx.Rngs(0)
        )
        dtype = np.float32 if arguments.dtype == "float32" else jax.numpy.bfloat16
        self.discriminator = PatchGAN(dtype=dtype, rngs=nnx.Rngs(1))
        graph, state = create_state(self.tokenizer, optimizer, 0)
        judge, other = create_state(self.discriminator, optimizer, 0)
        perceptual, self.frozen = nnx.split(load_perceptual("efficientnet", (0.0, 1.0)))
        state = TokenizerState(**vars(state), discriminator=DiscriminatorState.of(other))
        self.state = jax.tree.map(lambda x: x.copy(), state)  # the models keep theirs when the step takes these
        step = make_train_step(Recipe(graph, optimizer, "l1", perceptual), Adversary(judge, optimizer))
        shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
        self.batch = {"image": np.random.default_rng(0).uniform(size=shape).astype(np.float32)}
        jitted = jax.jit(step, donate_argnums=0)
        self.program = jitted.lower(self.state, self.batch, self.frozen).compile()

    def __call__(self) -> dict:
        self.state, metrics = jax.block_until_ready(self.program(self.state, self.batch, self.frozen))
        return metrics


def beside_pytorch(ours: OurStep, arguments: argparse.Namespace) -> None:
    """Times both steps in turns and prints the ratio."""
    import torch

    from vgpt_jax.benchmarks.torch_tokenizer import TokenizerTraining, time_parts

    torch.set_num_threads(arguments.threads)
    theirs = TokenizerTraining(**sizes(arguments), quantizer_args=QUANTIZER, discriminator_args={})
    theirs.load_from(ours.tokenizer, ours.discriminator)
    images = ours.batch["image"]
    first, peer = ours(), theirs.step(images)
    for name in ("reconstruction", "perceptual", "adversarial", "discriminator", "adversarial_weight"):
        print(f"first step, {name}: ours {float(first[name]):.6f}, PyTorch {peer[name]:.6f}")

    ours(), theirs.step(images)
    mine, other = [], []
    for _ in progress(range(arguments.rounds), "timing"):  # in turns, so that a slow moment hits both
        mine += seconds_of(ours, 3)
        other += seconds_of(lambda: theirs.step(images), 3)
    for name, seconds in (("vgpt_jax", mine), ("PyTorch", other)):
        print(f"{name}: median {1000 * np.median(seconds):.0f} ms a step, least {1000 * min(seconds):.0f} ms")
    print(f"ratio of the medians, PyTorch over vgpt_jax: {np.median(other) / np.median(mine):.2f}")
    print_parts("vgpt_jax", time_by_operation(ours, ours.program))
    print_parts("PyTorch", time_parts(theirs, images, num_steps=5))


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vgpt_jax.benchmarks.tokenizer_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--image_size", type=int, default=64, help="pixels (default 64)")
    parser.add_argument("--ch", type=int, default=32, help="channels at full resolution (default 32)")
    parser.add_argument("--batch_size", type=int, default=8, help="(default 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10, help="of three steps each (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's; XLA takes the machine's cores (default 2)")
    arguments = parser.parse_args(argv)
    for name in ("image_size", "ch", "batch_size", "rounds", "threads"):
        check_range(f"--{name}", getattr(arguments, name), least=1)
    if not accelerator_is_installed():
        keep_freed_memory()
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {arguments.image_size} px, ch {arguments.ch}, batch {arguments.batch_size}, {arguments.dtype}"
    )
    ours = OurStep(arguments)
    operations = operations_of(ours.program)
    if device.platform == "cpu":
        beside_pytorch(ours, arguments)
        return
    seconds_of(ours, 5)
    median = float(np.median(seconds_of(ours, 3 * arguments.rounds)))
    print(f"vgpt_jax: median {1000 * median:.1f} ms a step, {operations / median / 1e12:.1f} TFLOP/s")
    peak = peak_flops(device.device_kind, arguments.dtype)
    if peak:
        print(f"share of the peak of {peak / 1e12:.0f} TFLOP/s: {operations / median / peak:.1%}")
    else:
        print("the peak of this device is not in vgpt_jax/benchmarks/device.py")
    print_parts("vgpt_jax", time_by_operation(ours, ours.program))


if __name__ == "__main__":
    main(sys.argv[1:])
