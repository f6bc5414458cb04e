"""The generator's whole training step beside Hugging Face's GPT-2: ``python -m vgpt_jax.benchmarks.gpt_step``.

GPT-2 of 85M parameters (``--size B``) with 4,096 codes and 120 classes, 256 tokens a picture, no dropout; cross-entropy of the
image tokens, gradients clipped to norm 1, AdamW. On CPU the two take turns in one process, with the same weights, tokens and
hyperparameters; the first two losses of both and the ratio of their medians are printed, the share of XLA's rate of a matrix
product in the same run, and the parts in which XLA spends its time. In bfloat16 our step is timed alone, for the peer's
parameters would be bfloat16 too, and so on an accelerator, where its share of the chip's peak is printed:
``--batch_size 64 --dtype bfloat16`` fills one.
"""

import argparse
import sys

import jax
import numpy as np
from flax import nnx

from vgpt_jax.benchmarks.device import measured_flops, print_parts, seconds_of, time_by_operation
from vgpt_jax.benchmarks.sampling import load_peer, new_gpt, params_in_products
from vgpt_jax.errors import check_range, exit_on_user_error
from vgpt_jax.hardware import peak_flops
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.models.gpt import GPT, SIZES
from vgpt_jax.progress import progress
from vgpt_jax.training.generator_stage import make_train_step
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.state import create_state

OPTIMIZER = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "weight_decay": 0.05, "grad_clip": 1.0}


class OurStep:
    """Our training step, compiled: `gpt` is the model of step 0, `__call__` does a step and returns the loss before it."""

    def __init__(self, gpt: GPT, batch_size: int):
        self.gpt, random = gpt, np.random.default_rng(0)
        optimizer = make_optimizer(num_steps=1, **OPTIMIZER)
        graph, state = create_state(gpt, optimizer, 0)
        self.state = jax.tree.map(lambda x: x.copy(), state)  # the model keeps its own when the step takes these
        tokens = random.integers(0, gpt.num_codes, (batch_size, gpt.num_tokens)).astype(np.int32)
        labels = random.integers(0, gpt.num_classes, batch_size).astype(np.int32)
        self.batch = {"token_ids": tokens, "label": labels}
        jitted = jax.jit(make_train_step(graph, optimizer), donate_argnums=0)
        self.program = jitted.lower(self.state, self.batch).compile()

    def __call__(self) -> float:
        self.state, metrics = jax.block_until_ready(self.program(self.state, self.batch))
        return float(metrics["nats_per_token"])

    def of_peer(self) -> tuple[np.ndarray, np.ndarray]:
        """The batch as the peer takes it: inputs, the conditions first, and targets, both ``[B, N]`` int32."""
        tokens, labels = self.batch["token_ids"], self.batch["label"]
        return np.concatenate([self.gpt.num_codes + labels[:, None], tokens[:, :-1]], axis=1), tokens


def operations_of_step(gpt: GPT, batch_size: int) -> float:
    """FLOP of a training step, by hand: three times the forward pass. Attention is counted over all pairs of positions."""
    attention, tokens = gpt.blocks[0].attention, batch_size * gpt.num_tokens
    pairs = 4 * len(gpt.blocks) * attention.num_heads * gpt.head_dim * gpt.num_tokens
    return 3.0 * tokens * (2 * params_in_products(gpt) + pairs)


def speed(name: str, seconds: list[float], num_tokens: int) -> str:
    """A line on the times of some steps with so many tokens each."""
    median = float(np.median(seconds))
    least = 1000 * min(seconds)
    return f"{name}: median {1000 * median:.1f} ms a step, least {least:.1f} ms; {num_tokens / median:.0f} tokens/s"


def share(operations: float, seconds: float, flops: float, of: str) -> str:
    """A line on the arithmetic of a step, beside the rate ``flops`` of something."""
    return (
        f"{operations / 1e9:.1f} GFLOP a step, {operations / seconds / 1e12:.3f} TFLOP/s: "
        f"{operations / seconds / flops:.1%} of {of}, {flops / 1e12:.3f} TFLOP/s"
    )


def beside_pytorch(ours: OurStep, peer, rounds: int) -> float:
    """Times both steps in turns and prints the ratio; returns the median of ours."""
    from vgpt_jax.benchmarks.torch_gpt import GPT2Training

    theirs, batch = GPT2Training(peer, **OPTIMIZER), ours.of_peer()
    for which in ("first", "second"):
        print(f"{which} loss: ours {ours():.6f}, transformers {theirs.step(*batch):.6f}")
    mine, other = [], []
    for _ in progress(range(rounds), "timing"):  # in turns, so that a slow moment hits both
        mine += seconds_of(ours, 1)
        other += seconds_of(lambda: theirs.step(*batch), 1)
    for name, seconds in (("vgpt_jax", mine), ("transformers", other)):
        print(speed(name, seconds, batch[1].size))
    print(f"ratio of the medians, transformers over vgpt_jax: {np.median(other) / np.median(mine):.2f}")
    return float(np.median(mine))


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vgpt_jax.benchmarks.gpt_step", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="B", help="of the generator (default B)")
    parser.add_argument("--batch_size", type=int, default=8, help="(default 8)")
    parser.add_argument("--num_tokens", type=int, default=256, help="of a picture (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10, help="of one step each (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's; XLA takes the process' cores (default 2)")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "rounds", "threads"):
        check_range(f"--{name}", getattr(arguments, name), least=1)
    check_range("--num_tokens", arguments.num_tokens, least=2)
    if not accelerator_is_installed():
        keep_freed_memory()
    device = jax.devices()[0]
    gpt = new_gpt(arguments.size, arguments.num_tokens, arguments.dtype)
    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(gpt, nnx.Param)))
    print(
        f"{device.device_kind}, size {arguments.size}, {params / 1e6:.1f}M parameters with the embeddings, "
        f"batch {arguments.batch_size} of {arguments.num_tokens} tokens, {arguments.dtype}"
    )
    on_cpu = device.platform == "cpu"
    peer = load_peer(gpt, arguments) if on_cpu and arguments.dtype == "float32" else None
    ours = OurStep(gpt, arguments.batch_size)
    operations = operations_of_step(gpt, arguments.batch_size)
    if peer is not None:
        median = beside_pytorch(ours, peer, arguments.rounds)
    else:
        seconds_of(ours, 5)
        seconds = seconds_of(ours, arguments.rounds)
        median = float(np.median(seconds))
        print(speed("vgpt_jax", seconds, arguments.batch_size * arguments.num_tokens))
    peak = None if on_cpu else peak_flops(device.device_kind, arguments.dtype)
    if on_cpu:
        print(share(operations, median, measured_flops(arguments.dtype), "a matrix product"))
    elif peak:
        print(share(operations, median, peak, "the peak"))
    else:
        print("the peak of this device is not in vgpt_jax/benchmarks/device.py")
    print_parts("vgpt_jax", time_by_operation(ours, ours.program))


if __name__ == "__main__":
    main(sys.argv[1:])
