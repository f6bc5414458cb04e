"""LlamaGen's checkpoints. Golden files: a tiny tokenizer and a tiny generator with random weights, and what the original computed
from them; the generator's logits and samples are compared in tests/models/test_gpt_parity.py."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.pretrained.converted import numbered_class_names
from vgpt_jax.pretrained.llamagen import read_llamagen

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen"
TOKENIZER, GPT_FILE = GOLDEN / "vq_ds.pt", GOLDEN / "c2i.pt"


def state_of(converted) -> dict:
    return nnx.to_pure_dict(nnx.state(converted.model))


@pytest.fixture(scope="module")
def tensors():
    return torch.load(GPT_FILE, weights_only=True)["model"]


@pytest.fixture(scope="module")
def gpt():
    (converted,) = read_llamagen([GPT_FILE])
    return converted


def settings(folder: Path, **more) -> None:
    known = json.loads((GOLDEN / "config.json").read_text())["gpt"]
    (folder / "config.json").write_text(json.dumps({name: v for name, v in (known | more).items() if v is not None}))


def test_token_ids_and_reconstruction_equal_llamagen():
    """The file's ``model`` and ``ema`` differ; what was computed is from the second."""
    expected, (tokenizer, gpt) = np.load(GOLDEN / "expected.npz"), read_llamagen([GPT_FILE, TOKENIZER])
    assert (tokenizer.kind, gpt.kind) == ("tokenizer", "gpt")
    graph, state = nnx.split(tokenizer.model)

    def both(state, images, token_ids):
        tokenizer = nnx.merge(graph, state)
        return tokenizer.encode(images), tokenizer.decode(token_ids)

    token_ids = expected["token_ids"].reshape(-1, 8, 8)
    found, reconstruction = jit(both)(state, expected["image"], token_ids)
    np.testing.assert_array_equal(found, token_ids)
    np.testing.assert_allclose(reconstruction, expected["reconstruction"], atol=1e-4)  # sums of a dozen layers
    assert tokenizer.model.image_size == 16  # of the generator's 8x8 tokens, as no file says it
    assert tokenizer.metadata["value_range"] == [-1.0, 1.0]


def test_names_that_wrap_and_buffers_do_not_matter(gpt, tensors, tmp_path):
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    wrapped |= {f"module._orig_mod.{name}": torch.ones(2, 2) for name in ("freqs_cis", "causal_mask")}
    wrapped["module._orig_mod.layers.0.attention.kv_cache.k_cache"] = torch.ones(1)
    torch.save({"ema": wrapped, "model": {}, "steps": 3}, tmp_path / "0300000.pt")
    settings(tmp_path)
    (other,) = read_llamagen([tmp_path])
    assert other.arguments == gpt.arguments
    jax.tree.map(np.testing.assert_array_equal, state_of(other), state_of(gpt))


def test_safetensors_and_bfloat16(gpt, tensors, tmp_path):
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "c2i.safetensors")
    settings(tmp_path)
    (other,) = read_llamagen([tmp_path])
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), state_of(gpt))
    jax.tree.map(np.testing.assert_array_equal, state_of(other), rounded)


def test_shared_keys_and_values_equal_repeated_ones(tensors, tmp_path):
    shared, repeated = dict(tensors), dict(tensors)
    for i in range(2):
        query, keys, values = tensors[f"layers.{i}.attention.wqkv.weight"].split(64)
        keys, values = (x[:32].reshape(2, 16, 64) for x in (keys, values))
        for there, parts in (
            (shared, (keys, values)),
            (repeated, (x.repeat_interleave(2, dim=0) for x in (keys, values))),
        ):
            there[f"layers.{i}.attention.wqkv.weight"] = torch.cat([query, *(x.reshape(-1, 64) for x in parts)])
    ids = np.random.default_rng(0).integers(0, 64, (2, 12))
    logits, heads = [], []
    for name, there in (("shared", shared), ("repeated", repeated)):
        (tmp_path / name).mkdir()
        torch.save(there, tmp_path / name / "c2i.pt")
        settings(tmp_path / name)
        (converted,) = read_llamagen([tmp_path / name])
        graph, state = nnx.split(converted.model)
        logits.append(jit(lambda state, ids, graph=graph: nnx.merge(graph, state)(ids))(state, ids))
        heads.append(converted.arguments["num_kv_heads"])
    assert heads == [2, 4]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_rows_that_have_no_counterpart_are_zero(gpt, tensors):
    table, head = (np.asarray(x[...]) for x in (gpt.model.token_embedding, gpt.model.head))
    np.testing.assert_array_equal(table[64:75], tensors["cls_embedding.embedding_table.weight"].numpy())
    assert not table[75].any()
    assert not head[64:].any()
    assert gpt.model.begin_id == 74  # the null class
    assert (gpt.arguments["class_dropout"], gpt.arguments["embedding_dropout"]) == (0.1, 0.1)


def test_without_a_null_class_there_is_no_guidance(tensors, tmp_path):
    torch.save(tensors, tmp_path / "c2i.pt")
    settings(tmp_path, num_classes=11)
    (converted,) = read_llamagen([tmp_path])
    assert converted.arguments["class_dropout"] == 0.0
    assert not np.asarray(converted.model.token_embedding[...])[75:].any()


@pytest.mark.parametrize(
    ("name", "config", "image_size", "side"),
    [
        ("c2i_B_384.pt", {"block_size": None}, None, 24),
        ("c2i_B_256_ema.pt", {"block_size": None}, 512, 16),
        ("c2i_2560.pt", {"block_size": None}, 64, 4),
        ("c2i.pt", {"block_size": None}, None, 16),
        ("c2i_B_384.pt", {}, None, 8),
    ],
)
def test_the_grid_is_found(tmp_path, name, config, image_size, side):
    (tmp_path / name).symlink_to(GPT_FILE)
    settings(tmp_path, **config)
    (converted,) = read_llamagen([tmp_path / name], image_size=image_size)
    assert converted.arguments["grid"] == [side, side]


def test_the_tokenizers_downsampling_counts(tmp_path):
    for file in (TOKENIZER, GPT_FILE):
        (tmp_path / file.name).symlink_to(file)
    settings(tmp_path, block_size=None)
    tokenizer, gpt = read_llamagen([tmp_path], image_size=24)
    assert (tokenizer.model.grid, gpt.arguments["grid"]) == ((12, 12), [12, 12])
    (alone,) = read_llamagen([TOKENIZER])
    assert alone.model.image_size == 256
    assert alone.arguments["architecture_args"]["attn_resolutions"] == [128]


def test_heads_that_nothing_tells_are_those_of_the_published_sizes(tensors, tmp_path):
    """Head width 64, but for LlamaGen-3B; the golden model is of no published size."""
    torch.save(tensors, tmp_path / "c2i.pt")
    settings(tmp_path, n_head=None)
    (converted,) = read_llamagen([tmp_path])
    assert converted.arguments["num_heads"] == 1
    narrow = {"tok_embeddings.weight": torch.ones(8, 12), "cls_embedding.embedding_table.weight": torch.ones(3, 12)}
    wide = {name: torch.ones(len(t), 1).expand(-1, 3200) for name, t in narrow.items()}  # 3.7 MB, were it stored
    wide |= {f"layers.{i}.attention.wqkv.weight": torch.ones(1).expand(9600, 3200) for i in range(24)}
    wide["layers.0.feed_forward.w1.weight"] = torch.ones(1).expand(8704, 3200)
    torch.save(narrow, tmp_path / "c2i.pt")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="how many heads its width of 12 is divided into: put a config.json beside it"):
        list(read_llamagen([tmp_path / "c2i.pt"]))
    torch.save(wide, tmp_path / "c2i.pt")
    with pytest.raises(UserError, match="norm.weight is missing"):  # but heads of 100 channels are no problem
        list(read_llamagen([tmp_path / "c2i.pt"]))


def test_a_thousand_classes_are_those_of_imagenet():
    names = numbered_class_names(1000)
    assert (names[0], names[153], names[999]) == ("n01440764-tench", "n02085936-maltese_dog", "n15075141-toilet_tissue")


def test_what_cannot_be_read_is_one_error(tensors, tmp_path):
    def error(thing, **more) -> str:
        torch.save(thing, tmp_path / "c2i.pt")
        settings(tmp_path, **more)
        with pytest.raises(UserError) as found:
            list(read_llamagen([tmp_path]))
        assert "\n" not in str(found.value)
        return str(found.value)

    assert "conditioned on text" in error({"cls_embedding.cap_proj.fc1.weight": torch.ones(1)})
    assert "neither a tokenizer nor a generator of LlamaGen" in error({"a.weight": torch.ones(1)})
    assert "holds no tensors by name, but a list" in error([torch.ones(1)])
    assert "its 'epoch' is a int, not a tensor" in error({"epoch": 3})
    assert "has 11 embeddings of classes" in error(tensors, num_classes=12)
    assert "block_size is 60, which is no square grid" in error(tensors, block_size=60)
    flat = tensors | {"tok_embeddings.weight": torch.ones(64)}
    assert "tok_embeddings.weight has shape (64,), but needs 2 dimensions" in error(flat)
    scalar = {name: torch.tensor(1.0) if name == "output.weight" else t for name, t in tensors.items()}
    assert "output.weight () cannot become our head of (76, 64)" in error(scalar)
    assert "block_size is -1, but it must be a whole number from 1 to" in error(tensors, block_size=-1)
    assert "257x257 tokens are more than can be read" in error(tensors, block_size=257**2)
    assert "rope_base is inf, but it must be a finite number" in error(tensors, rope_base=float("inf"))
    assert "norm_eps is nan, but it must be a finite number" in error(tensors, norm_eps=float("nan"))
    assert "num_classes is 0, but it must be" in error(tensors, num_classes=0)
    alone = tensors | {"cls_embedding.embedding_table.weight": torch.ones(1, 64)}
    assert "has 1 embedding of classes, which is that of no class" in error(alone, num_classes=None)
    empty = tensors | {"tok_embeddings.weight": torch.ones(64, 0)}
    assert "tok_embeddings.weight has shape (64, 0), but needs 2 dimensions, none of them 0" in error(empty)
    repeated = tensors | {"output.weight": torch.ones(1).expand(10**12, 64)}
    assert error(repeated).endswith(
        "does not fit: output.weight (1000000000000, 64) has more values than are stored of it"
    )
    numbers = tensors | {f"layers.{i}.x": torch.ones(1) for i in (999999999, "9" * 5000)}
    assert "layers.999999999.x has no place in ours; layers.9999" in error(numbers)
    assert "n_head is 5, which does not divide the width 64" in error(tensors, n_head=5)
    misshapen = {name: t for name, t in tensors.items() if name != "norm.weight"}
    misshapen |= {"extra": torch.ones(1), "layers.1.attention.wo.weight": torch.ones(64)}
    assert error(misshapen).partition(" does not fit: ")[2].split("; ") == [
        "extra has no place in ours",
        "norm.weight is missing",
        "layers.1.attention.wo.weight give (64,) for our blocks.1.attention.out.kernel of (64, 64)",
    ]


def test_files_that_are_not_there_or_twice(tmp_path):
    with pytest.raises(UserError, match="there is no file .*absent.pt"):
        list(read_llamagen([tmp_path / "absent.pt"]))
    with pytest.raises(UserError, match="has no file that ends in .pt, .pth, .bin, .safetensors"):
        list(read_llamagen([tmp_path]))
    shutil.copy(GPT_FILE, tmp_path / "other.pt")
    with pytest.raises(UserError, match="both hold a gpt: give one"):
        list(read_llamagen([GPT_FILE, tmp_path / "other.pt"]))


def test_a_tokenizer_that_lacks_what_its_sizes_are_read_from(tmp_path):
    there = torch.load(TOKENIZER, weights_only=True)["model"]
    first = there.pop("encoder.conv_in.weight")
    torch.save(there, tmp_path / "vq.pt")
    with pytest.raises(UserError, match="encoder.conv_in.weight is missing"):
        list(read_llamagen([tmp_path / "vq.pt"]))
    torch.save(there | {"encoder.conv_in.weight": first[:0]}, tmp_path / "vq.pt")
    with pytest.raises(UserError, match="encoder.conv_in.weight has shape .0, 3, 3, 3., but needs 4 dimensions, none"):
        list(read_llamagen([tmp_path / "vq.pt"]))
    (tmp_path / "config.json").write_text('{"vq": {"codebook_l2_norm": false}}')
    with pytest.raises(UserError, match="codebook_l2_norm is False, but only tokenizers that normalise can be read"):
        list(read_llamagen([tmp_path / "vq.pt"]))
