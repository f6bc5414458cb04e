"""visual-gpt's folders. Golden files: tiny models with random weights, and what the original computed from them. The one that
searches by cosine is also what the networks are tested against (tests/models)."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.pretrained.visual_gpt import read_visual_gpt

GOLDEN = Path(__file__).parents[1] / "golden"
PROJECTED, COSINE = GOLDEN / "visual_gpt_projected", GOLDEN / "visual_gpt_cosine"


@pytest.fixture(scope="module")
def converted():
    return list(read_visual_gpt([PROJECTED]))


@pytest.fixture
def copy(tmp_path):
    """A folder like the projected golden one, for a test to change."""
    shutil.copytree(PROJECTED, tmp_path / "model")
    return tmp_path / "model"


def change_settings(folder: Path, **changes):
    """Sets fields of ``config.json``; "section.name" with two underscores for the dot."""
    config = json.loads((folder / "config.json").read_text())
    for field, value in changes.items():
        *section, name = field.split("__")
        (config[section[0]] if section else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change):
    tensors = torch.load(folder / "model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "model.bin")


def test_a_projected_search_finds_the_same_codes(converted):
    expected = np.load(PROJECTED / "expected.npz")
    graph, state = nnx.split(converted[0].model)

    def both(state, images, token_ids):
        tokenizer = nnx.merge(graph, state)
        return tokenizer.encode(images), tokenizer(images).reconstruction

    token_ids, reconstruction = jit(both)(state, expected["image"], expected["token_ids"])
    np.testing.assert_array_equal(token_ids, expected["token_ids"])
    # The forward pass too: the file's counter of steps is at 0, but what is converted is trained, so no warm start is left.
    np.testing.assert_allclose(reconstruction, expected["reconstruction"], atol=1e-4)
    assert converted[0].metadata["value_range"] == [0.0, 1.0]


def test_logits_equal_visual_gpt(converted):
    expected, gpt = np.load(PROJECTED / "expected.npz"), converted[1].model
    conditions = gpt.condition_ids(jnp.asarray(expected["label"]), 3)
    inputs = np.concatenate([conditions[:, None], expected["token_ids"].reshape(3, 64)[:, :-1]], axis=1)
    graph, state = nnx.split(gpt)
    logits = jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, inputs)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    assert converted[1].metadata["class_names"][:2] == ["n02085936-maltese_dog", "n02096294-australian_terrier"]
    assert converted[1].metadata["token_shape"] == [8, 8]


def test_the_quantizer_goes_on_where_it_was():
    quantizer = next(read_visual_gpt([COSINE / "tokenizer"])).model.quantizer
    assert (int(quantizer.steps[...]), quantizer.pretrain_steps, quantizer.cos_dist) == (5, 5, True)
    np.testing.assert_array_equal(quantizer.countdown[...], np.full(64, 20))


def test_an_untied_output_projection_and_other_inner_width(copy):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1.0
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128)  # masks of older versions of transformers
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        for name, axis in (("c_fc.weight", 1), ("c_fc.bias", 0), ("c_proj.weight", 0)):
            whole = tensors[f"transformer.h.0.mlp.{name}"]
            tensors[f"transformer.h.0.mlp.{name}"] = whole.narrow(axis, 0, 100).clone()

    change_tensors(copy / "gpt", untie)
    gpt = list(read_visual_gpt([copy]))[1]
    assert (gpt.arguments["tie_weights"], gpt.arguments["mlp_width"]) == (False, 100)
    np.testing.assert_array_equal(gpt.model.head[...], np.asarray(gpt.model.token_embedding[...]) + 1.0)


def test_without_a_projection_or_a_factorization(copy):
    """A ``proj_dim`` of the codes' width makes no matrices there; latents of the codes' width may have no linear maps."""

    def strip(tensors):
        for name in ("quantizer.z_proj_matrix", "quantizer.c_proj_matrix", "in_proj.weight", "out_proj.weight"):
            del tensors[name]
        tensors["quantizer.codebook"] = torch.ones(48, 16)

    sizes = {"vq_conf__proj_dim": 16, "vq_conf__embedding_dim": 16, "vq_conf__random_proj": True}
    change_settings(copy / "tokenizer", **sizes, qtz_name="vq")
    change_tensors(copy / "tokenizer", strip)
    shutil.rmtree(copy / "gpt")
    (tokenizer,) = read_visual_gpt([copy])
    assert tokenizer.arguments["quantizer_args"]["proj_dim"] is None
    assert tokenizer.model.pre_quant is None


def test_the_grid_follows_the_image_size(copy):
    (copy / "id2label.json").unlink()
    change_settings(copy / "gpt", max_pos_len=256)
    change_tensors(copy / "gpt", lambda t: t.update({"transformer.wpe.weight": torch.ones(256, 48)}))
    tokenizer, gpt = read_visual_gpt([copy], image_size=32)
    assert tokenizer.model.grid == (16, 16)
    assert tokenizer.arguments["architecture_args"]["attn_resolutions"] == [16]
    assert (gpt.model.num_tokens, gpt.metadata["token_shape"]) == (256, [16, 16])
    assert gpt.metadata["class_names"] == [f"class_{i}" for i in range(5)]
    with pytest.raises(
        UserError, match="max_pos_len is 128, but a picture has 256 tokens: give a smaller --image_size"
    ):
        list(read_visual_gpt([PROJECTED], image_size=32))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("tokenizer", {"ae_name": "vqvae"}, "ae_name is 'vqvae', but only 'vqgan' can be read"),
        ("tokenizer", {"qtz_name": "fsq"}, "qtz_name is 'fsq', but only 'vq' can be read"),
        ("tokenizer", {"vq_conf__num_codewords": "many"}, "num_codewords is 'many', but it must be a whole number"),
        ("tokenizer", {"vq_conf__num_codewords": None}, "does not say vq_conf.num_codewords"),
        ("tokenizer", {"vq_conf__levels": [8, 5]}, "options of the quantizer that are not known: levels"),
        ("tokenizer", {"vq_conf__init_method": "zeros"}, "init_method is 'zeros', but must be one of kaiming"),
        ("tokenizer", {"ae_conf__ch_mult": [1, 2.5]}, "must be a list of whole numbers"),
        ("tokenizer", {"ae_conf__ch": 16}, r"encoder.conv_in.weight give \(3, 3, 3, 32\) for our"),
        ("gpt", {"num_attn_heads": 5}, "d_model is 48, which num_heads 5 does not divide"),
        ("gpt", {"condition_vocab": 7}, r"wte.weight give \(55, 48\) for our token_embedding of \(57, 48\)"),
        ("gpt", {"num_transformer_layers": 5000}, "num_transformer_layers is 5000, but there are 1 transformer.h."),
        ("gpt", {"condition_vocab": 0}, "condition_vocab is 0, but it must be a whole number from 1 to"),
        ("tokenizer", {"ae_conf__num_res_blocks": 10**9}, "num_res_blocks is 1000000000, but there are"),
        ("tokenizer", {"ae_conf__num_res_blocks": 2**63}, "num_res_blocks is 9223372036854775808, but it must be"),
        ("tokenizer", {"vq_conf__num_codewords": 10**9}, r"our quantizer.codebook of \(1000000000, 8\)"),
        ("tokenizer", {"vq_conf__num_codewords": -1}, "num_codewords is -1, but it must be"),
        ("tokenizer", {"vq_conf__replace_freq": 2**63}, "replace_freq is 9223372036854775808, but it must be"),
        ("tokenizer", {"vq_conf__pretrain_steps": 2**31}, "pretrain_steps is 2147483648, but it must be"),
    ],
)
def test_what_cannot_be_read_is_one_error(copy, part, changes, message):
    change_settings(copy / part, **changes)
    with pytest.raises(UserError, match=message):
        list(read_visual_gpt([copy]))


def test_files_that_are_not_there_or_something_else(copy, tmp_path):
    def error(*paths) -> str:
        with pytest.raises(UserError) as found:
            list(read_visual_gpt(paths))
        return str(found.value)

    assert "give one folder, not 2" in error(copy, copy)
    assert "is no folder, but a model of visual-gpt is one" in error(copy / "id2label.json")
    assert "has no folder tokenizer, so it is no model of visual-gpt" in error(copy / "gpt")
    (copy / "id2label.json").write_text('{"0": "a"}')
    assert "should name classes 0 to 4, but names 0" in error(copy)
    (copy / "id2label.json").write_text(json.dumps({str(i): "x" for i in range(20000)}))
    assert error(copy).endswith("10012, 10013 and 19980 more")
    (copy / "id2label.json").write_text(json.dumps({str(i): [str(i)] for i in range(5)}))
    assert "id2label.json says 0 is ['0'], but it must be a text" in error(copy)
    right = (copy / "gpt" / "model.bin").read_bytes()
    shutil.copy(copy / "tokenizer" / "model.bin", copy / "gpt" / "model.bin")
    assert "holds no transformer.wte.weight, so it is no generator of visual-gpt" in error(copy)
    (copy / "gpt" / "model.bin").write_bytes(right)
    shutil.copy(copy / "gpt" / "model.bin", copy / "tokenizer" / "model.bin")
    assert "holds no quantizer.codebook, so it is no tokenizer of visual-gpt" in error(copy)
    (copy / "tokenizer" / "config.json").write_text("[1]")
    assert "holds a list, but an object of settings is needed" in error(copy)
    (copy / "tokenizer" / "config.json").write_bytes(b"\xff{")
    assert "cannot be read as JSON" in error(copy)
    (copy / "tokenizer" / "model.bin").unlink()
    assert "has no weights: there is no model.bin, model.pth or model.safetensors in it" in error(copy)
