"""Checkpoints of LlamaGen (Sun et al. 2024, arXiv 2406.06525): its tokenizer, and its class-conditional generator.

A file holds one of them; which one its tensors tell. What they cannot tell (heads, the base of the rotation) stands in a
``config.json`` beside the file, or follows from the published sizes. Where we need a row that these checkpoints have no
counterpart for (the embedding of hidden tokens, the output projection to classes) it is zero.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import BLOCKS, GPT, SIZES
from vgpt_jax.pretrained.converted import (
    Converted,
    count_numbers,
    numbered_class_names,
    open_state_dict,
    read_json,
    setting,
    source_of,
)
from vgpt_jax.pretrained.stored_tensor import StoredTensor
from vgpt_jax.pretrained.strict import Table, joined_kernel, linear_kernel, load_strictly, unchanged
from vgpt_jax.pretrained.taming import PARTS, load_vqgan

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
VALUE_RANGE = [-1.0, 1.0]
OUR_PARTS = PARTS | {"blocks": "res", "block1": "0", "attention": "1", "block2": "2"}
NAMED_SIZES = (256, 384, 512)
DEFAULT_IMAGE_SIZE, DEFAULT_DOWNSAMPLING = 256, 16
MAX_TOKENS = 2**16  # of a picture: 4096 pixels a side, where a token is 16. The published ones have 1024 at most.
DROPOUT = {"embedding_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.0}  # as it was trained


def read_llamagen(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """The tokenizer among some files, then the generator, or the one of them that is there.

    Args:
      paths: files, or folders with files that end in one of ``SUFFIXES``.
      image_size: in pixels. None: that of the generator's grid, or else 256.

    Raises:
      UserError: a file is missing, damaged, of another model, or does not fit; or two are of the same kind.
    """
    found: dict[str, tuple[Path, dict[str, StoredTensor]]] = {}
    for file in _files(paths):
        tensors = open_state_dict(file, ("ema", "model", "state_dict"))
        kind = _kind(file, tensors)
        if kind in found:
            raise UserError(f"{found[kind][0]} and {file} both hold a {kind}: give one")
        found[kind] = file, tensors
    downsampling, side = DEFAULT_DOWNSAMPLING, None
    if "tokenizer" in found:
        downsampling = 2 ** (count_numbers("encoder.conv_blocks.", found["tokenizer"][1]) - 1)
    if "gpt" in found:
        side = _grid_side(found["gpt"][0], image_size, downsampling)
    if "tokenizer" in found:
        file, tensors = found.pop("tokenizer")
        yield _read_tokenizer(file, tensors, image_size or (side * downsampling if side else DEFAULT_IMAGE_SIZE))
    if "gpt" in found:
        file, tensors = found.pop("gpt")
        yield _read_gpt(file, tensors, side)


def _files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not inside:
                raise UserError(f"{path} has no file that ends in {', '.join(SUFFIXES)}")
            files += inside
        else:
            files.append(path)
    return files


def _kind(file: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Which of the two a file holds.

    Raises:
      UserError: neither.
    """
    if "cls_embedding.embedding_table.weight" in tensors and "tok_embeddings.weight" in tensors:
        return "gpt"
    if "quantize.embedding.weight" in tensors and any(name.startswith("encoder.conv_blocks.") for name in tensors):
        return "tokenizer"
    if any(name.startswith("cls_embedding.") for name in tensors):
        raise UserError(f"{file} is conditioned on text, but only LlamaGen's class-conditional generators can be read")
    names = ", ".join(list(tensors)[:3])
    raise UserError(f"{file} holds neither a tokenizer nor a generator of LlamaGen; its first tensors are {names}")


def _shape(file: Path, tensors: Mapping[str, StoredTensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from.

    Raises:
      UserError: it is not there, is empty, or has another number of dimensions.
    """
    if name not in tensors:
        raise UserError(f"{file} does not fit: {name} is missing")
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise UserError(
            f"{file} does not fit: {name} has shape {shape}, but needs {dimensions} dimensions, none of them 0"
        )
    return shape


def _config(file: Path) -> tuple[dict[str, Any], Path]:
    """Settings beside a file, empty where there are none."""
    path = file.with_name("config.json")
    return read_json(path) if path.is_file() else {}, path


def _generator_config(file: Path) -> tuple[dict[str, Any], Path]:
    """The same, but the section of the generator where there is one."""
    config, path = _config(file)
    return setting(config, "gpt", dict, path, config), path


# The tokenizer


def _level(network: str, level: int, num_levels: int) -> str:
    return f"conv_blocks.{level}"  # in the order of the computation in both, as ours


def _read_tokenizer(file: Path, tensors: dict[str, StoredTensor], image_size: int) -> Converted:
    config, config_file = _config(file)
    for section in (config, *config.values()):
        if isinstance(section, dict) and not setting(section, "codebook_l2_norm", bool, config_file, True):
            raise UserError(
                f"{config_file} says codebook_l2_norm is False, but only tokenizers that normalise can be read"
            )
    shape = functools.partial(_shape, file, tensors)
    ch, levels = shape("encoder.conv_in.weight", 4)[0], range(count_numbers("encoder.conv_blocks.", tensors))
    widths = [shape(f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in levels]
    if any(width % ch for width in widths):
        raise UserError(f"{file} has levels of {widths} channels, which are no multiples of its first {ch}")
    codes, width = shape("quantize.embedding.weight", 2)
    attended = [i for i in levels if f"encoder.conv_blocks.{i}.attn.0.norm.weight" in tensors]
    arguments = {
        "image_size": image_size,
        "architecture_args": {
            "z_channels": shape("encoder.conv_out.weight", 4)[0],
            "ch": ch,
            "ch_mult": [width // ch for width in widths],
            "num_res_blocks": count_numbers("encoder.conv_blocks.0.res.", tensors),
            "attn_resolutions": [image_size // 2**i for i in attended],
        },
        "quantizer_args": {
            "num_codewords": codes,
            "embedding_dim": width,
            "l2_norm": True,
            "penalty_weight": 0.0,
            "pretrain_steps": 0,
            "init_method": "kaiming",
            "commitment_weight": 0.25,
            "codebook_weight": 1.0,
        },
        "factorization_bias": True,
    }
    used = ["quantize.codebook_used"]
    tokenizer = load_vqgan(arguments, tensors, OUR_PARTS, _level, str(file), used)
    metadata = {"source": source_of("llamagen", [file]), "value_range": VALUE_RANGE}
    return Converted("tokenizer", tokenizer, arguments, metadata)


# The generator


def _grid_side(file: Path, image_size: int | None, downsampling: int) -> int:
    """How many tokens a generator's pictures have a side.

    Raises:
      UserError: their number is no square, or so large that the table of rotations would not be in memory.
    """
    side = _stated_side(file, image_size, downsampling)
    if side**2 > MAX_TOKENS:
        raise UserError(f"{file}: pictures of {side}x{side} tokens are more than can be read, {MAX_TOKENS} tokens")
    return side


def _stated_side(file: Path, image_size: int | None, downsampling: int) -> int:
    config, config_file = _generator_config(file)
    tokens = setting(config, "block_size", int, config_file, None, least=1)
    if tokens is not None:
        if math.isqrt(tokens) ** 2 != tokens:
            raise UserError(f"{config_file} says block_size is {tokens}, which is no square grid")
        return math.isqrt(tokens)
    named = [size for size in NAMED_SIZES if re.search(rf"_{size}(?!\d)", file.stem)]
    if named:
        return named[0] // DEFAULT_DOWNSAMPLING
    return (image_size or DEFAULT_IMAGE_SIZE) // downsampling


def _read_gpt(file: Path, tensors: dict[str, StoredTensor], side: int) -> Converted:
    config, config_file = _generator_config(file)
    shape = functools.partial(_shape, file, tensors)
    num_codes, width = shape("tok_embeddings.weight", 2)
    embeddings, _ = shape("cls_embedding.embedding_table.weight", 2)
    num_layers = count_numbers("layers.", tensors)
    num_classes = setting(config, "num_classes", int, config_file, embeddings - 1, least=1)
    if num_classes < 1:
        raise UserError(
            f"{file} has {embeddings} embedding of classes, which is that of no class: there is none to draw"
        )
    if num_classes not in (embeddings, embeddings - 1):
        raise UserError(
            f"{config_file} says num_classes is {num_classes}, but {file} has {embeddings} embeddings of classes"
        )
    published = {(size["num_layers"], size["d_model"]): size["num_heads"] for size in SIZES.values()}
    known = published.get((num_layers, width), width // 64 if width % 64 == 0 else None)
    num_heads = setting(config, "n_head", int, config_file, known, least=1)
    if num_heads is None:
        raise UserError(
            f"{file} does not tell how many heads its width of {width} is divided into: put a config.json beside it with "
            '{"gpt": {"n_head": ...}}'
        )
    if width % num_heads:
        raise UserError(f"{config_file} says n_head is {num_heads}, which does not divide the width {width}")
    rows, _ = shape("layers.0.attention.wqkv.weight", 2)
    num_kv_heads = max((rows // (width // num_heads) - num_heads) // 2, 1)
    num_kv_heads = setting(config, "n_kv_head", int, config_file, num_kv_heads, least=1)
    arguments = {
        "num_codes": num_codes,
        "num_classes": num_classes,
        "num_tokens": side**2,
        "grid": [side, side],
        "d_model": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        **BLOCKS["llama"],
        "positions": "rotary_llamagen",
        "norm_epsilon": float(setting(config, "norm_eps", float, config_file, 1e-5)),
        "mlp_width": shape("layers.0.feed_forward.w1.weight", 2)[0],
        "rotary_base": float(setting(config, "rope_base", float, config_file, 10_000.0)),
        **DROPOUT,
        "class_dropout": 0.1 if embeddings > num_classes else 0.0,  # guidance needs the null class
        "tie_weights": False,
    }

    def create() -> GPT:
        return GPT(**arguments, rngs=nnx.Rngs(0))

    buffers = [name for name in tensors if name in ("freqs_cis", "causal_mask") or ".attention.kv_cache." in name]
    gpt = load_strictly(create, tensors, _table(arguments, embeddings), str(file), buffers)
    metadata = {
        "source": source_of("llamagen", [file] + [config_file] * config_file.is_file()),
        "class_names": numbered_class_names(num_classes),
        "token_shape": [side, side],
    }
    return Converted("gpt", gpt, arguments, metadata)


def _table(arguments: Mapping[str, Any], embeddings: int) -> Table:
    num_heads, num_kv_heads = arguments["num_heads"], arguments["num_kv_heads"]
    vocabulary = arguments["num_codes"] + arguments["num_classes"] + 2

    def embedding(codes: np.ndarray, classes: np.ndarray) -> np.ndarray:  # the null class is our begin token
        return _to_rows(np.concatenate([codes, classes]), vocabulary)

    def qkv(weights: np.ndarray) -> np.ndarray:
        head_dim = weights.shape[1] // num_heads
        query, keys, values = np.split(weights, np.cumsum([num_heads * head_dim, num_kv_heads * head_dim]))
        return joined_kernel(halves_from_pairs(query, head_dim), halves_from_pairs(keys, head_dim), values)

    table = {
        "token_embedding": (embedding, ("tok_embeddings.weight", "cls_embedding.embedding_table.weight")),
        "norm.scale": (unchanged, ("norm.weight",)),
        "head": (functools.partial(_to_rows, count=vocabulary), ("output.weight",)),
    }
    for i in range(arguments["num_layers"]):
        table |= {
            f"blocks.{i}.attention.qkv.kernel": (qkv, (f"layers.{i}.attention.wqkv.weight",)),
            f"blocks.{i}.attention.out.kernel": (linear_kernel, (f"layers.{i}.attention.wo.weight",)),
            f"blocks.{i}.mlp.gate_and_up.kernel": (
                joined_kernel,
                (f"layers.{i}.feed_forward.w1.weight", f"layers.{i}.feed_forward.w3.weight"),
            ),
            f"blocks.{i}.mlp.out.kernel": (linear_kernel, (f"layers.{i}.feed_forward.w2.weight",)),
            f"blocks.{i}.norm1.scale": (unchanged, (f"layers.{i}.attention_norm.weight",)),
            f"blocks.{i}.norm2.scale": (unchanged, (f"layers.{i}.ffn_norm.weight",)),
        }
    return table


def _to_rows(table: np.ndarray, count: int) -> np.ndarray:
    """A table with rows of zeros behind its own."""
    return np.pad(table, ((0, count - len(table)), (0, 0)))


def halves_from_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders ``[heads * head_dim, in]`` so that channels of a head that are turned together, neighbours there, are half a head
    apart."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
