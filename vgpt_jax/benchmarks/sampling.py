"""Writing token by token beside Hugging Face's ``GPT2LMHeadModel.generate``: ``python -m vgpt_jax.benchmarks.sampling``.

GPT-2 of 85M parameters (``--size B``) with 4,096 codes and 120 classes writes pictures of 256 tokens, top-k 100, temperature 1.
The two take turns in one process, with the same weights; compilation is timed apart. On CPU the printed shares are of what this
device does in the same run: of the rate at which XLA reads memory, at batch 1, where a step is reading, and of XLA's rate of a
matrix product, at the largest batch. On an accelerator the time of a step stands beside its floor, the bytes it has to read over
the memory's bandwidth by the data sheet, and the peer is run only where PyTorch sees the device.

``--num_steps`` also times writing several tokens a step, by a model of random order.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.benchmarks.device import measured_bandwidths, measured_flops, seconds_of
from vgpt_jax.errors import check_range, exit_on_user_error
from vgpt_jax.hardware import peak_bandwidth
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.models.gpt import GPT, SIZES
from vgpt_jax.progress import progress
from vgpt_jax.sampling.generate import Options, generate
from vgpt_jax.sampling.parallel import generate_in_parallel, group_sizes

NUM_CODES, NUM_CLASSES, TOP_K = 4096, 120, 100


def new_gpt(size: str, num_tokens: int, dtype: str, **options) -> GPT:
    """A GPT-2 of a size in ``SIZES`` with random weights, without dropout."""
    sizes = SIZES[size] | {"num_codes": NUM_CODES, "num_classes": NUM_CLASSES, "num_tokens": num_tokens}
    rates = dict.fromkeys(("embedding_dropout", "residual_dropout", "attention_dropout"), 0.0)
    return GPT(**sizes, **rates, dtype=dtype, **options, rngs=nnx.Rngs(0))


@dataclass(frozen=True)
class Work:
    """What a step of one token each has to do, on average over a picture.

    Attributes: ``weight_bytes`` and ``cache_bytes`` that are read; ``operations``, FLOP.
    """

    weight_bytes: float
    cache_bytes: float
    operations: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes


def params_in_products(gpt: GPT) -> int:
    """The number of parameters that every token meets: all but the tables from which it takes one row."""
    looked_up = {"position_embedding", "target_embedding"} | (set() if gpt.head is None else {"token_embedding"})
    params = nnx.to_flat_state(nnx.state(gpt, nnx.Param))
    return sum(param[...].size for path, param in params if path[0] not in looked_up)


def work_of(gpt: GPT, batch: int) -> Work:
    """Of a step for ``batch`` sequences, counted by hand. Of the cache, only what is written already has to be read."""
    attention, layers = gpt.blocks[0].attention, len(gpt.blocks)
    positions = (gpt.num_tokens + 1) / 2  # the mean of 1 to N
    params, itemsize = params_in_products(gpt), jnp.dtype(gpt.compute_dtype).itemsize
    cached = 2 * layers * gpt.num_kv_heads * gpt.head_dim * positions * batch  # keys and values
    scores_and_sums = 4 * layers * attention.num_heads * gpt.head_dim * positions * batch
    return Work(params * itemsize, cached * itemsize, 2 * params * batch + scores_and_sums)


class OurSampler:
    """Our generation, compiled for a batch: ``compile_seconds``; `__call__` writes pictures and returns ids ``[B, N]``.

    Args:
      gpt: in raster order, or of random order.
      batch: pictures at once.
      top_k: as in `sampling.generate.Options`.
      num_steps: steps of a model of random order. None: one token after the other, in raster order.
    """

    def __init__(self, gpt: GPT, batch: int, top_k: int = TOP_K, num_steps: int | None = None):
        graph, self.state = nnx.split(gpt)
        random = np.random.default_rng(0)
        self.conditions = conditions_of(gpt, batch)
        self.orders = random.permuted(np.tile(np.arange(gpt.num_tokens, dtype=np.int32), (batch, 1)), axis=1)
        sizes = num_steps and tuple(group_sizes(gpt.num_tokens, num_steps).tolist())

        def write(state: nnx.State, conditions: Array, orders: Array, key: Array) -> Array:
            gpt, uniforms = nnx.merge(graph, state), jax.random.uniform(key, orders.shape)
            options = Options(temperature=1.0, top_k=top_k)
            if sizes:
                return generate_in_parallel(gpt, conditions, uniforms, options, orders=orders, sizes=sizes)
            return generate(gpt, conditions, uniforms, options)

        self.key = jax.random.key(0)
        begun = time.perf_counter()
        self.program = jax.jit(write).lower(self.state, self.conditions, self.orders, self.key).compile()
        self.compile_seconds = time.perf_counter() - begun

    def __call__(self) -> np.ndarray:
        self.key, key = jax.random.split(self.key)
        return np.asarray(self.program(self.state, self.conditions, self.orders, key))


def conditions_of(gpt: GPT, batch: int) -> np.ndarray:
    """Ids ``[B]`` int32 of random classes."""
    classes = np.random.default_rng(0).integers(0, gpt.num_classes, batch)
    return (gpt.num_codes + classes).astype(np.int32)


def greatest_difference(gpt: GPT, logits_of_peer: Callable[[np.ndarray], np.ndarray], batch: int = 2) -> float:
    """Between the logits ``[B, T, V]`` of both for a class each and random tokens."""
    tokens = np.random.default_rng(1).integers(0, gpt.num_codes, (batch, min(gpt.num_tokens, 16) - 1))
    ids = np.concatenate([conditions_of(gpt, batch)[:, None], tokens.astype(np.int32)], axis=1)
    graph, state = nnx.split(gpt)
    ours = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, ids)
    return float(np.abs(np.asarray(ours) - logits_of_peer(ids)).max())


def speed(name: str, seconds: list[float], batch: int, num_tokens: int, num_steps: int) -> str:
    """A line on the times of some batches of pictures."""
    median = float(np.median(seconds))
    return (
        f"  {name}: median {median:.3f} s, least {min(seconds):.3f} s; {batch * num_tokens / median:.1f} tokens/s, "
        f"{1000 * median / num_steps:.3f} ms a step"
    )


def share_of_bandwidths(work: Work, step_seconds: float, bandwidths: dict[str, float]) -> str:
    """A line on the rate at which a step reads, beside those measured."""
    rate = work.bytes / step_seconds
    shares = (f"{rate / of:.0%} of {name}'s {of / 1e9:.1f} GB/s" for name, of in bandwidths.items())
    return (
        f"  a step reads {work.weight_bytes / 1e6:.1f} MB of weights and {work.cache_bytes / 1e6:.1f} MB of the cache, "
        f"{rate / 1e9:.1f} GB/s: {', '.join(shares)}"
    )


def share_of_flops(work: Work, step_seconds: float, flops: float) -> str:
    """A line on the arithmetic of a step, beside a measured matrix product's."""
    rate = work.operations / step_seconds
    return (
        f"  a step does {work.operations / 1e9:.2f} GFLOP, {rate / 1e9:.1f} GFLOP/s: "
        f"{rate / flops:.0%} of a matrix product's {flops / 1e9:.1f} GFLOP/s"
    )


def floor(work: Work, step_seconds: float, device_kind: str) -> str:
    """A line on the time of a step beside the time that its reading takes at the memory's peak."""
    peak = peak_bandwidth(device_kind)
    if peak is None:
        return "  the memory's bandwidth of this device is not in vgpt_jax/benchmarks/device.py"
    least = work.bytes / peak
    return (
        f"  {1000 * step_seconds:.3f} ms a step; the floor is {1000 * least:.3f} ms, for {work.bytes / 1e6:.1f} MB at "
        f"{peak / 1e12:.2f} TB/s: {least / step_seconds:.0%} of the bandwidth"
    )


def cores() -> int:
    """How many of the machine's this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load_peer(gpt: GPT, arguments: argparse.Namespace):
    """Hugging Face's GPT-2 with the same weights, or None where it cannot run on the device that ours runs on."""
    on_cpu = jax.default_backend() == "cpu"
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        print(f"the peer is not run: {' and '.join(missing)} not installed")
        return None
    import torch

    if not on_cpu and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        print("the peer is not run: PyTorch does not see this device")
        return None
    from vgpt_jax.benchmarks import torch_gpt

    torch.set_num_threads(arguments.threads)
    peer = torch_gpt.gpt2_like(gpt, getattr(torch, arguments.dtype), "cpu" if on_cpu else "cuda")
    if on_cpu:
        print(f"XLA uses the {cores()} cores of this process, PyTorch {arguments.threads} threads")
        print(f"load before: {os.getloadavg()[0]:.1f}; where others are at work, PyTorch's threads wait for each other")
    difference = greatest_difference(gpt, lambda ids: torch_gpt.logits(peer, ids))
    print(f"greatest difference of the first logits: {difference:.2g}")
    return peer


def compare(gpt: GPT, peer, batch: int, rounds: int) -> float:
    """Times both in turns and prints it; returns the seconds of a step of ours, by the median."""
    ours = OurSampler(gpt, batch)
    print(f"\nbatch {batch}: compiled in {ours.compile_seconds:.1f} s")
    ours()
    mine, other = [], []
    if peer is not None:
        from vgpt_jax.benchmarks.torch_gpt import sample

        conditions = conditions_of(gpt, batch)
        theirs = lambda: sample(peer, conditions, gpt.num_tokens, TOP_K)  # noqa: E731
        sample(peer, conditions, min(8, gpt.num_tokens), TOP_K)
    for _ in progress(range(rounds), f"timing, batch {batch}"):  # in turns, so that a slow moment hits both
        mine += seconds_of(ours, 1)
        if peer is not None:
            other += seconds_of(theirs, 1)
    print(speed("vgpt_jax", mine, batch, gpt.num_tokens, gpt.num_tokens))
    if peer is not None:
        print(speed("transformers", other, batch, gpt.num_tokens, gpt.num_tokens))
        print(f"  ratio of the medians, transformers over vgpt_jax: {np.median(other) / np.median(mine):.2f}")
    return float(np.median(mine)) / gpt.num_tokens


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vgpt_jax.benchmarks.sampling", description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 10, 32], help="pictures at once (1 10 32)")
    parser.add_argument("--num_tokens", type=int, default=256, help="of a picture (default 256)")
    parser.add_argument("--size", choices=list(SIZES), default="B", help="of the generator (default B)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="of one batch of pictures each (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's; XLA takes the process' cores (default 2)")
    parser.add_argument(
        "--num_steps", type=int, nargs="+", default=[], help="also write in so many steps, by a model of random order"
    )
    arguments = parser.parse_args(argv)
    for name, numbers in (("batches", arguments.batches), ("num_steps", arguments.num_steps)):
        for number in numbers:
            check_range(f"--{name}", number, least=1)
    for name in ("rounds", "threads"):
        check_range(f"--{name}", getattr(arguments, name), least=1)
    check_range("--num_tokens", arguments.num_tokens, least=2)
    for steps in arguments.num_steps:
        group_sizes(arguments.num_tokens, steps)  # raises what does not fit
    if not accelerator_is_installed():
        keep_freed_memory()
    device = jax.devices()[0]
    gpt = new_gpt(arguments.size, arguments.num_tokens, arguments.dtype)
    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(gpt, nnx.Param)))
    print(
        f"{device.device_kind}, size {arguments.size}, {params / 1e6:.1f}M parameters with the embeddings, "
        f"{arguments.num_tokens} tokens, top-k {TOP_K}, {arguments.dtype}"
    )
    on_cpu = device.platform == "cpu"
    peer = load_peer(gpt, arguments)
    for batch in arguments.batches:
        step_seconds, work = compare(gpt, peer, batch, arguments.rounds), work_of(gpt, batch)
        if not on_cpu:
            print(floor(work, step_seconds, device.device_kind))
            continue
        if batch == 1:
            print(share_of_bandwidths(work, step_seconds, measured_bandwidths()))
        if batch == max(arguments.batches):
            print(share_of_flops(work, step_seconds, measured_flops(arguments.dtype)))

    if arguments.num_steps:
        del gpt, peer
        gpt = new_gpt(arguments.size, arguments.num_tokens, arguments.dtype, random_order=True)
        print("\nrandom order, several tokens a step")
    for batch in arguments.batches if arguments.num_steps else ():
        for steps in arguments.num_steps:
            ours = OurSampler(gpt, batch, num_steps=steps)
            print(f"\nbatch {batch}, {steps} steps: compiled in {ours.compile_seconds:.1f} s")
            ours()
            print(speed("vgpt_jax", seconds_of(ours, arguments.rounds), batch, arguments.num_tokens, steps))


if __name__ == "__main__":
    main(sys.argv[1:])
