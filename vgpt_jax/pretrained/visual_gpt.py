"""Models of visual-gpt: a folder with ``id2label.json``, ``tokenizer/`` and ``gpt/``, in each ``config.json`` and the weights.

Differs from visual-gpt: fixed random projections, which are two matrices there and one here, come over as two learned ones; the
ids are the same, and without ``penalty_weight`` no loss moves them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError, listed
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.converted import (
    Converted,
    check_count,
    numbered_class_names,
    open_state_dict,
    read_json,
    setting,
    source_of,
)
from vgpt_jax.pretrained.stored_tensor import StoredTensor
from vgpt_jax.pretrained.strict import Table, load_strictly, unchanged
from vgpt_jax.pretrained.taming import PARTS, finished_quantizer, load_vqgan, taming_level, vqgan_arguments

WEIGHTS = ("model.bin", "model.pth", "model.safetensors")
VALUE_RANGE = [0.0, 1.0]
OPTIONS = {  # of its quantizer, and what they are where the settings do not say
    "cos_dist": False,
    "proj_dim": None,
    "replace_freq": 0,
    "penalty_weight": 0.0,
    "pretrain_steps": 0,
    "init_method": "kaiming",
}
LOSS_WEIGHTS = {"commitment_weight": 2.0, "codebook_weight": 1.0}  # of its published training; no file has them
OTHER_OPTIONS = ("num_codewords", "embedding_dim", "z_dim", "random_proj")
BOOKKEEPING = ("initialized", "done_steps", "is_freezed", "_counts")
OUR_PARTS = PARTS | {"pre_quant": "in_proj", "post_quant": "out_proj"}


def read_visual_gpt(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """The tokenizer of a folder, then its generator if it has one.

    Args:
      paths: one folder, which has the folder ``tokenizer``; or the folder of a tokenizer itself.
      image_size: in pixels, which settles the token grid. None: ``resolution`` of the tokenizer's settings. The published
        model's says 128, though it was sampled at 256.

    Raises:
      UserError: a file is missing, damaged, of another architecture, or does not fit its settings.
    """
    if len(paths) != 1:
        raise UserError(f"visual_gpt: give one folder, not {len(paths)}")
    folder = Path(paths[0])
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder, but a model of visual-gpt is one: with tokenizer/, gpt/, id2label.json"
        )
    alone = (folder / "config.json").is_file() and "ae_name" in read_json(folder / "config.json")
    of_tokenizer = folder if alone else folder / "tokenizer"
    if not of_tokenizer.is_dir():
        raise UserError(f"{folder} has no folder tokenizer, so it is no model of visual-gpt")
    arguments, tokenizer, source = _read_tokenizer(of_tokenizer, image_size)
    grid, num_codes = tokenizer.grid, tokenizer.num_codes
    yield Converted("tokenizer", tokenizer, arguments, {"source": source, "value_range": VALUE_RANGE})
    del tokenizer
    if not alone and (folder / "gpt").is_dir():
        yield _read_gpt(folder / "gpt", folder / "id2label.json", num_codes, grid)


def _weights_file(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no weights: there is no {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]} in it")
    return found[0]


def _read_tokenizer(folder: Path, image_size: int | None) -> tuple[dict[str, Any], Tokenizer, dict[str, Any]]:
    file, weights = folder / "config.json", _weights_file(folder)
    config = read_json(file)
    for field, needed in (("ae_name", "vqgan"), ("qtz_name", "vq")):
        found = setting(config, field, str, file, needed if field == "qtz_name" else None)
        if found != needed:
            raise UserError(f"{file} says {field} is {found!r}, but only {needed!r} can be read")
    size, architecture = vqgan_arguments(config, "ae_conf", file, image_size)
    options, tensors = _quantizer_options(config, file), open_state_dict(weights)
    if "quantizer.codebook" not in tensors:
        raise UserError(f"{weights} holds no quantizer.codebook, so it is no tokenizer of visual-gpt")
    same_width = architecture["z_channels"] == options["embedding_dim"]
    arguments = {
        "image_size": size,
        "architecture_args": architecture,
        "quantizer_args": options,
        "code_factorization": not same_width or "in_proj.weight" in tensors,
    }
    ignored = [f"quantizer.{name}" for name in BOOKKEEPING]
    table = _quantizer_table(options, tensors)
    tokenizer = load_vqgan(arguments, tensors, OUR_PARTS, taming_level, str(weights), ignored, table)
    return arguments, tokenizer, source_of("visual_gpt", [weights, file])


def _quantizer_options(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The arguments of `VectorQuantize`."""
    section = setting(config, "vq_conf", dict, file)
    unknown = sorted(set(section) - set(OPTIONS) - set(OTHER_OPTIONS))
    if unknown:
        raise UserError(f"{file} has options of the quantizer that are not known: {listed(unknown)}")
    options = {name: setting(config, f"vq_conf.{name}", int, file) for name in ("num_codewords", "embedding_dim")}
    for name, default in OPTIONS.items():
        kind = int if name == "proj_dim" else float if name == "penalty_weight" else type(default)
        options[name] = setting(config, f"vq_conf.{name}", kind, file, default)
    if options["proj_dim"] == options["embedding_dim"]:
        options["proj_dim"] = None  # there is no matrix then
    return options | LOSS_WEIGHTS


def _quantizer_table(options: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Table:
    table = finished_quantizer(options) | {"quantizer.codebook": (unchanged, ("quantizer.codebook",))}
    if options["proj_dim"] is not None:
        table["quantizer.z_proj"] = unchanged, ("quantizer.z_proj_matrix",)
        table["quantizer.code_proj"] = unchanged, ("quantizer.c_proj_matrix",)
    if options["replace_freq"] and "quantizer._counts" in tensors:
        table["quantizer.countdown"] = lambda counts: np.maximum(counts, 1).astype(np.int32), ("quantizer._counts",)
    return table


def _read_gpt(folder: Path, labels_file: Path, num_codes: int, grid: Sequence[int]) -> Converted:
    file, weights = folder / "config.json", _weights_file(folder)
    config, tensors, embedding = read_json(file), open_state_dict(weights), "transformer.wte.weight"
    if embedding not in tensors:
        raise UserError(f"{weights} holds no {embedding}, so it is no generator of visual-gpt")
    num_classes, num_tokens = setting(config, "condition_vocab", int, file, least=1), grid[0] * grid[1]
    num_positions = setting(config, "max_pos_len", int, file)
    if num_positions < num_tokens:
        raise UserError(
            f"{file} says max_pos_len is {num_positions}, but a picture has {num_tokens} tokens: give a smaller --image_size"
        )
    head = "lm_head.weight"
    tied = head not in tensors or _are_equal(tensors[embedding], tensors[head])
    inner = tensors.get("transformer.h.0.mlp.c_fc.weight")
    arguments = {
        "num_codes": num_codes,
        "num_classes": num_classes,
        "num_tokens": num_tokens,
        "grid": list(grid),
        "d_model": setting(config, "d_model", int, file),
        "num_layers": setting(config, "num_transformer_layers", int, file),
        "num_heads": setting(config, "num_attn_heads", int, file),
        "mlp_width": inner.shape[1] if inner is not None and len(inner.shape) == 2 else 0,
        "num_positions": num_positions,
        "tie_weights": tied,
    }

    def create() -> GPT:
        return GPT(**arguments, rngs=nnx.Rngs(0))

    check_count("num_transformer_layers", arguments["num_layers"], "transformer.h.", tensors, str(weights))
    masks = [name for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias"))]
    table = gpt2_table(arguments["num_layers"], tied)
    gpt = load_strictly(create, tensors, table, str(weights), [*masks, head] if tied else masks)
    files = [weights, file] + [labels_file] * labels_file.is_file()
    metadata = {
        "source": source_of("visual_gpt", files),
        "class_names": _class_names(labels_file, num_classes),
        "token_shape": list(grid),
    }
    return Converted("gpt", gpt, arguments, metadata)


def _are_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Of two tensors; those with more values than are stored, which cannot be weights, are not compared."""
    return not (a.repeats or b.repeats) and np.array_equal(np.asarray(a), np.asarray(b))


def gpt2_table(num_layers: int, tied: bool) -> Table:
    """The table of Hugging Face's ``GPT2LMHeadModel``, whose linear maps are ``[in, out]``."""
    table = {
        "token_embedding": (unchanged, ("transformer.wte.weight",)),
        "position_embedding": (unchanged, ("transformer.wpe.weight",)),
        "norm.scale": (unchanged, ("transformer.ln_f.weight",)),
        "norm.bias": (unchanged, ("transformer.ln_f.bias",)),
    }
    if not tied:
        table["head"] = unchanged, ("lm_head.weight",)
    maps = {
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.fc": "mlp.c_fc",
        "mlp.out": "mlp.c_proj",
    }
    for i in range(num_layers):
        for leaf, names in (("kernel", maps), ("scale", {"norm1": "ln_1", "norm2": "ln_2"})):
            for ours, theirs in names.items():
                table[f"blocks.{i}.{ours}.{leaf}"] = unchanged, (f"transformer.h.{i}.{theirs}.weight",)
                table[f"blocks.{i}.{ours}.bias"] = unchanged, (f"transformer.h.{i}.{theirs}.bias",)
    return table


def _class_names(file: Path, num_classes: int) -> list[str]:
    """The labels of ``id2label.json``, or numbers where it is not there."""
    if not file.is_file():
        return numbered_class_names(num_classes)
    labels = read_json(file)
    wanted = [str(i) for i in range(num_classes)]
    if sorted(labels) != sorted(wanted):
        raise UserError(f"{file} should name classes 0 to {num_classes - 1}, but names {listed(sorted(labels))}")
    return [setting(labels, i, str, file) for i in wanted]
