"""Checkpoints of taming-transformers (Esser et al. 2021, arXiv 2012.09841): a VQ-GAN, or a class-conditional transformer with
the VQ-GAN whose tokens it writes. Each is a Lightning checkpoint with a YAML file of settings.

What these checkpoints have no counterpart for is zero in ours: the embeddings of the begin token and of hidden tokens, and all
rows of the output projection but those of the codes. A class is a token of the same vocabulary there; its row is copied.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.converted import (
    Converted,
    below,
    check_count,
    numbered_class_names,
    open_state_dict,
    read_yaml,
    setting,
    shown,
    source_of,
)
from vgpt_jax.pretrained.stored_tensor import StoredTensor
from vgpt_jax.pretrained.strict import Table, conv_kernel, joined_kernel, linear_kernel, load_strictly, unchanged

VQGAN, NET2NET = "taming.models.vqgan.VQModel", "taming.models.cond_transformer.Net2NetTransformer"
MINGPT, LABELS = "taming.modules.transformer.mingpt.GPT", "taming.modules.util.Labelator"
IDENTITY = "taming.modules.transformer.permuter.Identity"
VALUE_RANGE = [-1.0, 1.0]

PARTS = {  # of our paths, and how they are called there
    "blocks": "block",
    "attentions": "attn",
    "middle": "mid",
    "block1": "block_1",
    "block2": "block_2",
    "attention": "attn_1",
    "shortcut": "nin_shortcut",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
    "pre_quant": "quant_conv",
    "post_quant": "post_quant_conv",
}


def read_taming(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """The tokenizer of a checkpoint, then its generator if it has one.

    Args:
      paths: one ``.ckpt`` file, or a folder with one; its settings, a file that ends in ``.yaml``, may be given with it.
        Otherwise they are beside it: the file of the same name, or the only one, or as taming's own training leaves them in
        ``../configs/*project*.yaml``.
      image_size: in pixels. None: ``resolution`` of the settings.

    Raises:
      UserError: a file is missing, of a model of another class, damaged, or does not fit its settings.
    """
    settings = [Path(path) for path in paths if Path(path).suffix == ".yaml"]
    checkpoints = [Path(path) for path in paths if Path(path) not in settings]
    if len(checkpoints) != 1 or len(settings) > 1:
        raise UserError(f"taming: give one checkpoint with its settings, not {len(checkpoints)} with {len(settings)}")
    path = _checkpoint_file(checkpoints[0])
    config_file = settings[0] if settings else _settings_file(path)
    config = setting(read_yaml(config_file), "model", dict, config_file)
    target = setting(config, "target", str, config_file)
    if target not in (VQGAN, NET2NET):
        raise UserError(f"{config_file} is of a {target}, but what can be read is {VQGAN} and {NET2NET}")
    first_stage, prefix = config, ""
    if target == NET2NET:
        _check_transformer(config, config_file)
        first_stage, prefix = setting(config, "params.first_stage_config", dict, config_file), "first_stage_model."
    tensors = open_state_dict(path)
    if not any(name.startswith(f"{prefix}quantize.") for name in tensors):
        raise UserError(f"{path} holds no {prefix}quantize.* tensors, so it is no {target} as {config_file} says")
    arguments = _tokenizer_arguments(first_stage, config_file, image_size)
    metadata = {"source": source_of("taming", [path, config_file])}
    of_tokenizer = below(tensors, prefix) if prefix else tensors
    tokenizer = load_vqgan(arguments, of_tokenizer, PARTS, taming_level, str(path), _ignored(of_tokenizer))
    grid = tokenizer.grid
    yield Converted("tokenizer", tokenizer, arguments, metadata | {"value_range": VALUE_RANGE})
    del tokenizer, of_tokenizer
    if target == NET2NET:
        other = [name for name in tensors if not name.startswith(("first_stage_model.", "transformer.", "cond_stage_"))]
        if other:
            raise UserError(f"{path} does not fit: " + "; ".join(f"{name} has no place in ours" for name in other))
        of_gpt, num_codes = below(tensors, "transformer."), arguments["quantizer_args"]["num_codewords"]
        del tensors
        yield _read_transformer(config, config_file, of_gpt, num_codes, grid, path, metadata)


def _checkpoint_file(path: Path) -> Path:
    """``path`` itself if it is no folder, else the one checkpoint in it."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}")
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.ckpt"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path} should hold one .ckpt file, but there is {names}: give the file itself")
    return found[0]


def _settings_file(path: Path) -> Path:
    beside = sorted(path.parent.glob("*.yaml"))
    of_run = sorted((path.parent.parent / "configs").glob("*project*.yaml"))
    for found in ([file for file in beside if file.stem == path.stem], beside, of_run):
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"there are no settings for {path}: put its .yaml file beside it, as {path.with_suffix('.yaml').name}"
    )


# The VQ-GAN


def vqgan_arguments(
    settings: Mapping[str, Any], section: str, file: Path, image_size: int | None
) -> tuple[int, dict[str, Any]]:
    """Image size and arguments of encoder and decoder from settings in taming's names.

    Args:
      settings: that have them.
      section: of the settings, with dots.
      file: that they are from, for messages.
      image_size: instead of ``resolution``. The levels that have attention stay the same.
    """

    def get(field: str, kind: type, *default) -> Any:
        return setting(settings, f"{section}.{field}", kind, file, *default)

    for field, needed in (("in_channels", 3), ("out_ch", 3), ("double_z", False), ("resamp_with_conv", True)):
        if get(field, type(needed), needed) != needed:
            raise UserError(
                f"{file} says {section}.{field} is {get(field, type(needed))}, but only {needed} can be read"
            )
    ch_mult, resolution, attended = get("ch_mult", list), get("resolution", int), get("attn_resolutions", list, [])
    size = image_size or resolution
    levels = [i for i in range(len(ch_mult)) if resolution // 2**i in attended]
    return size, {
        "z_channels": get("z_channels", int),
        "ch": get("ch", int),
        "ch_mult": ch_mult,
        "num_res_blocks": get("num_res_blocks", int),
        "attn_resolutions": [size // 2**i for i in levels],
        "dropout": float(get("dropout", float, 0.0)),
    }


def taming_level(network: str, level: int, num_levels: int) -> str:
    """What is before the blocks of a level; the decoder's are counted from the highest resolution there."""
    return f"down.{level}" if network == "encoder" else f"up.{num_levels - 1 - level}"


def load_vqgan(
    arguments: Mapping[str, Any],
    tensors: dict[str, StoredTensor],
    parts: Mapping[str, str],
    level_name: Callable[[str, int, int], str],
    source: str,
    ignored: Sequence[str],
    quantizer: Table | None = None,
) -> Tokenizer:
    """A tokenizer with the weights of a VQ-GAN in the names of taming, or of its descendants.

    Args:
      arguments: of `Tokenizer`.
      tensors: by the names there; used up.
      parts: of our paths, and how they are called there.
      level_name: ``(network, level, number of levels)`` to what is before the blocks of that level.
      source, ignored: as for `load_strictly`.
      quantizer: the table of the quantizer's variables. None: of one with a codebook and no options.
    """

    architecture = arguments["architecture_args"]
    num_levels = len(architecture["ch_mult"])
    blocks = f"encoder.{level_name('encoder', 0, num_levels)}.{parts['blocks']}."
    check_count("num_res_blocks", architecture["num_res_blocks"], blocks, tensors, source)
    abstract = nnx.eval_shape(lambda: Tokenizer(**arguments, rngs=nnx.Rngs(0)))
    table = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        if path[0] == "quantizer":
            continue
        *names, leaf = map(str, path)
        if names[1:2] == ["levels"]:
            names[1:3] = [level_name(path[0], path[2], num_levels)]
        change = "downsample" if path[0] == "encoder" else "upsample"
        names = [parts.get(name, change if name == "resample" else name) for name in names]
        convert = unchanged if leaf != "kernel" else conv_kernel if len(variable.shape) == 4 else linear_kernel
        table[".".join(map(str, path))] = convert, (".".join([*names, "bias" if leaf == "bias" else "weight"]),)
    if quantizer is None:
        options = arguments["quantizer_args"]
        quantizer = finished_quantizer(options) | {"quantizer.codebook": (unchanged, ("quantize.embedding.weight",))}
    return load_strictly(abstract, tensors, table | quantizer, source, ignored)


def finished_quantizer(options: Mapping[str, Any]) -> Table:
    """The variables of a `VectorQuantize` that is trained: its warm start is over, its codes are initialised and in use."""
    done = max(options.get("pretrain_steps", 0), 1)
    countdown = np.broadcast_to(np.int32(options.get("replace_freq", 0)), options["num_codewords"])
    return {
        "quantizer.steps": (lambda: np.array(done, np.int32), ()),
        "quantizer.countdown": (lambda: countdown, ()),
    }


def _tokenizer_arguments(config: Mapping[str, Any], file: Path, image_size: int | None) -> dict[str, Any]:
    target = setting(config, "target", str, file)
    if target != VQGAN:
        raise UserError(f"{file} has a first stage {target}, but only {VQGAN} can be read")
    if setting(config, "params", dict, file).get("remap") is not None:
        raise UserError(f"{file} says params.remap, a change of the token ids that cannot be read")
    size, architecture = vqgan_arguments(config, "params.ddconfig", file, image_size)
    return {
        "image_size": size,
        "architecture_args": architecture,
        "quantizer_args": {
            "num_codewords": setting(config, "params.n_embed", int, file),
            "embedding_dim": setting(config, "params.embed_dim", int, file),
            "penalty_weight": 0.0,
            "pretrain_steps": 0,
            "init_method": "kaiming",
            "commitment_weight": 1.0,  # as it was trained: there, a quarter is on the codebook's loss
            "codebook_weight": 0.25,
        },
        "factorization_bias": True,
    }


def _ignored(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Losses, among them their networks; the colours that segmentations are drawn in."""
    return [name for name in tensors if name.startswith("loss.") or name == "colorize"]


# The transformer


def _check_transformer(config: Mapping[str, Any], file: Path) -> None:
    """Raises `UserError` for what a class-conditional transformer over the tokens in raster order has not."""
    params = setting(config, "params", dict, file)
    for field, needed in (
        ("transformer_config", MINGPT),
        ("cond_stage_config", LABELS),
        ("permuter_config", IDENTITY),
    ):
        section = params.get(field)
        target = section.get("target") if isinstance(section, dict) else section
        if target != needed and not (section is None and field == "permuter_config"):
            target = target if isinstance(target, str) else shown(target)
            raise UserError(f"{file} has a {field} {target}, but only {needed} can be read")
    if params.get("unconditional"):
        raise UserError(f"{file} says unconditional, but only class-conditional transformers can be read")
    if setting(config, "params.transformer_config.params", dict, file).get("n_unmasked"):
        raise UserError(f"{file} says n_unmasked, but only causal transformers can be read")


def _read_transformer(
    config: Mapping[str, Any],
    file: Path,
    tensors: dict[str, StoredTensor],
    num_codes: int,
    grid: Sequence[int],
    path: Path,
    metadata: dict[str, Any],
) -> Converted:
    num_classes = setting(config, "params.cond_stage_config.params.n_classes", int, file, least=1)

    def get(field: str, kind: type, *default) -> Any:
        return setting(config, f"params.transformer_config.params.{field}", kind, file, *default)

    vocabulary, num_tokens, block_size = get("vocab_size", int), grid[0] * grid[1], get("block_size", int)
    if vocabulary < max(num_codes, num_classes):
        raise UserError(f"{file}: {num_codes} codes and {num_classes} classes are not in a vocabulary of {vocabulary}")
    if block_size < num_tokens:
        raise UserError(
            f"{file}: the transformer has {block_size} positions, but pictures of {num_tokens} tokens: give a smaller "
            "--image_size"
        )
    arguments = {
        "num_codes": num_codes,
        "num_classes": num_classes,
        "num_tokens": num_tokens,
        "grid": list(grid),
        "d_model": get("n_embd", int, 256),
        "num_layers": get("n_layer", int, 12),
        "num_heads": get("n_head", int, 8),
        "mlp": "gelu_exact",
        "num_positions": block_size,
        "embedding_dropout": float(get("embd_pdrop", float, 0.0)),
        "residual_dropout": float(get("resid_pdrop", float, 0.0)),
        "attention_dropout": float(get("attn_pdrop", float, 0.0)),
        "tie_weights": False,
    }

    def create() -> GPT:
        return GPT(**arguments, rngs=nnx.Rngs(0))

    check_count("n_layer", arguments["num_layers"], "blocks.", tensors, f"{path} (transformer.*)")
    masks = [name for name in tensors if name.endswith(".attn.mask")]
    table = _transformer_table(arguments, vocabulary)
    gpt = load_strictly(create, tensors, table, f"{path} (transformer.*)", masks)
    of_gpt = {"class_names": numbered_class_names(num_classes), "token_shape": list(grid)}
    return Converted("gpt", gpt, arguments, metadata | of_gpt)


def _transformer_table(arguments: Mapping[str, Any], vocabulary: int) -> Table:
    num_codes, num_classes = arguments["num_codes"], arguments["num_classes"]

    def whole(table: np.ndarray) -> np.ndarray:
        if len(table) != vocabulary:
            raise ValueError(f"{len(table)} rows, not {vocabulary}")
        return table

    def embedding(table: np.ndarray) -> np.ndarray:
        codes = whole(table)[:num_codes]
        return np.concatenate([codes, table[:num_classes], np.zeros((2, *table.shape[1:]), table.dtype)])

    def head(table: np.ndarray) -> np.ndarray:
        return np.pad(whole(table)[:num_codes], ((0, num_classes + 2), (0, 0)))

    table = {
        "token_embedding": (embedding, ("tok_emb.weight",)),
        "position_embedding": (lambda table: table[0], ("pos_emb",)),
        "norm.scale": (unchanged, ("ln_f.weight",)),
        "norm.bias": (unchanged, ("ln_f.bias",)),
        "head": (head, ("head.weight",)),
    }
    for i in range(arguments["num_layers"]):
        ours, theirs = f"blocks.{i}", f"blocks.{i}"
        for name, there in (("attention.out", "attn.proj"), ("mlp.fc", "mlp.0"), ("mlp.out", "mlp.2")):
            table[f"{ours}.{name}.kernel"] = linear_kernel, (f"{theirs}.{there}.weight",)
            table[f"{ours}.{name}.bias"] = unchanged, (f"{theirs}.{there}.bias",)
        for name, there in (("norm1", "ln1"), ("norm2", "ln2")):
            table[f"{ours}.{name}.scale"] = unchanged, (f"{theirs}.{there}.weight",)
            table[f"{ours}.{name}.bias"] = unchanged, (f"{theirs}.{there}.bias",)
        maps = [f"{theirs}.attn.{name}" for name in ("query", "key", "value")]
        table[f"{ours}.attention.qkv.kernel"] = joined_kernel, tuple(f"{name}.weight" for name in maps)
        table[f"{ours}.attention.qkv.bias"] = lambda *biases: np.concatenate(biases), tuple(f"{n}.bias" for n in maps)
    return table
