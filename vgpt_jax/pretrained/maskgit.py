"""MaskGIT's VQ-GAN (Chang et al. 2022, arXiv 2202.04200) as google-research publishes it: a pytree of arrays in Flax's msgpack.

params/encoder/{Conv_i, ResBlock_i, GroupNorm_0}    numbered in the order in which the forward pass comes to them
params/decoder/...                                  the same
params/quantizer/codebook                           [K, D]
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError, listed
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.converted import Converted, source_of
from vgpt_jax.pretrained.strict import Table, load_strictly, unchanged
from vgpt_jax.pretrained.taming import finished_quantizer

IMAGE_SIZE = 256
VALUE_RANGE = [0.0, 1.0]
PARTS = {"encoder", "decoder", "quantizer"}


def read_maskgit(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """A tokenizer. Its sizes are read off the tensors.

    Args:
      paths: the file ``tokenizer_imagenet256_checkpoint``, or another of its kind.
      image_size: pixels. None: 256. The network is made of convolutions, and takes any that can be halved as often as it does.

    Raises:
      UserError: the file is not there, is damaged, or holds something else; or the image size does not fit.
    """
    if len(paths) != 1:
        raise UserError(f"MaskGIT's tokenizer is one file, but {len(paths)} are given")
    (path,) = paths
    tensors = _read(path)
    architecture = _architecture(tensors, path)
    num_codes, width = _shape(tensors, "quantizer.codebook", 2, path)
    arguments = {
        "image_size": image_size or IMAGE_SIZE,
        "architecture": "maskgit_vqgan",
        "architecture_args": architecture,
        "quantizer_args": {  # the losses are those that it was trained with
            "num_codewords": num_codes,
            "embedding_dim": width,
            "penalty_weight": 0.0,
            "pretrain_steps": 0,
            "init_method": "kaiming",
            "commitment_weight": 0.25,
            "codebook_weight": 1.0,
            "entropy_weight": 0.1,
            "entropy_temperature": 0.01,
        },
        "code_factorization": False,
    }

    def create() -> Tokenizer:
        return Tokenizer(**arguments, rngs=nnx.Rngs(0))

    table = _table(architecture) | finished_quantizer(arguments["quantizer_args"])
    table |= {"quantizer.codebook": (unchanged, ("quantizer.codebook",))}
    model = load_strictly(create, tensors, table, str(path))
    yield Converted("tokenizer", model, arguments, {"value_range": VALUE_RANGE, "source": source_of("maskgit", paths)})


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name, with dots between the levels."""
    from flax.serialization import msgpack_restore

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        stored = msgpack_restore(path.read_bytes())  # data alone: arrays, numbers, text, containers
    except Exception as error:  # msgpack, NumPy and Flax each have errors of their own for bytes that make no sense
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise UserError(f"{path} is damaged, or no checkpoint in Flax's msgpack ({reason})") from error
    params = stored.get("params") if isinstance(stored, dict) else None
    if not isinstance(params, dict) or not params.keys() >= PARTS:
        found = listed(map(str, params if isinstance(params, dict) else stored if isinstance(stored, dict) else ()))
        raise UserError(
            f"{path} holds no tokenizer of MaskGIT, which has params of {', '.join(sorted(PARTS))}"
            + (f", but {found}" if found else "")
        )
    others = {name: value for name, value in stored.items() if name != "params"}
    return dict(_flattened(params, "")) | dict(_flattened(others, ""))


def _flattened(tree: Any, path: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _flattened(branch, f"{path}.{name}" if path else str(name))
    else:
        yield path, np.asarray(tree)


def _shape(tensors: Mapping[str, np.ndarray], name: str, ndim: int, path: Path) -> tuple[int, ...]:
    """Of a tensor that the sizes are read off.

    Raises:
      UserError: it is not there, or has another number of dimensions.
    """
    found = tensors.get(name)
    if found is None or found.ndim != ndim:
        what = "missing" if found is None else f"of shape {found.shape}"
        raise UserError(f"{path} does not fit: {name} is {what}, and the network's sizes are read off it")
    return found.shape


def _architecture(tensors: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    """The arguments of encoder and decoder."""

    def count(kind: str) -> int:
        pattern = re.compile(kind.replace(".", r"\.") + r"_(\d+)\..*")
        return max((int(found[1]) + 1 for name in tensors if (found := pattern.fullmatch(name))), default=0)

    num_levels = count("decoder.Conv") - 1  # a convolution at both ends, and one for every doubling
    num_blocks = count("encoder.ResBlock")  # of every level, and once more
    if num_levels < 1 or num_blocks == 0 or num_blocks % (num_levels + 1):
        raise UserError(
            f"{path} does not fit: {num_blocks} residual blocks are not those of {max(num_levels, 0)} levels"
        )
    num_res_blocks = num_blocks // (num_levels + 1)
    ch = _shape(tensors, "encoder.Conv_0.kernel", 4, path)[3]
    widths = [
        _shape(tensors, f"encoder.ResBlock_{i * num_res_blocks}.Conv_0.kernel", 4, path)[3] for i in range(num_levels)
    ]
    if ch == 0 or any(width % ch for width in widths):
        raise UserError(f"{path} does not fit: its levels have {widths} channels, which are no multiples of {ch}")
    return {
        "z_channels": _shape(tensors, "encoder.Conv_1.kernel", 4, path)[3],
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": num_res_blocks,
    }


def _table(architecture: Mapping[str, Any]) -> Table:
    ch, ch_mult, num_res_blocks = (architecture[name] for name in ("ch", "ch_mult", "num_res_blocks"))
    num_levels = len(ch_mult)
    table = {}

    def add(ours: str, theirs: str, *leaves: str) -> None:
        for leaf in leaves:
            table[f"{ours}.{leaf}"] = (unchanged, (f"{theirs}.{leaf}",))

    def add_blocks(part: str, places: Sequence[str], widths: Sequence[int]) -> None:
        """Residual blocks from each of ``widths`` to the next, numbered in a row, to ``places`` in ours."""
        for i, place in enumerate(places):
            theirs, ours = f"{part}.ResBlock_{i}", f"{part}.{place}"
            for n in (1, 2):
                add(f"{ours}.norm{n}", f"{theirs}.GroupNorm_{n - 1}", "scale", "bias")
                add(f"{ours}.conv{n}", f"{theirs}.Conv_{n - 1}", "kernel")
            if widths[i] != widths[i + 1]:
                add(f"{ours}.shortcut", f"{theirs}.Conv_2", "kernel")

    down = [ch * m for m in ch_mult for _ in range(num_res_blocks)]
    levels = [f"levels.{i}.{j}" for i in range(num_levels) for j in range(num_res_blocks)]
    middle = [f"middle.{j}" for j in range(num_res_blocks)]
    lowest = [down[-1]] * num_res_blocks
    add_blocks("encoder", levels + middle, [ch, *down, *lowest])
    add_blocks("decoder", middle + levels, [down[-1], *lowest, *reversed(down)])
    add("encoder.conv_in", "encoder.Conv_0", "kernel")
    add("encoder.conv_out", "encoder.Conv_1", "kernel", "bias")
    add("decoder.conv_in", "decoder.Conv_0", "kernel", "bias")
    for i in range(num_levels - 1):
        add(f"decoder.upsamples.{i}.conv", f"decoder.Conv_{i + 1}", "kernel", "bias")
    add("decoder.conv_out", f"decoder.Conv_{num_levels}", "kernel", "bias")
    for part in ("encoder", "decoder"):
        add(f"{part}.norm_out", f"{part}.GroupNorm_0", "scale", "bias")
    return table
