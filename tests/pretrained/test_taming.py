"""taming's checkpoints. Golden files: a tiny Net2Net transformer with random weights, and what the original computed from it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from flax import nnx

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.pretrained.taming import read_taming

GOLDEN = Path(__file__).parents[1] / "golden" / "taming"


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(GOLDEN / "expected.npz"))


@pytest.fixture(scope="module")
def converted():
    return list(read_taming([GOLDEN / "net2net.ckpt"]))


@pytest.fixture
def copied(tmp_path):
    """A function that writes the checkpoint and its settings as another function changes them, and gives the path."""

    def write(change_tensors=None, change_settings=None):
        settings, path = yaml.safe_load((GOLDEN / "net2net.yaml").read_text()), tmp_path / "model.ckpt"
        if change_tensors is None:
            path.symlink_to(GOLDEN / "net2net.ckpt")
        else:
            checkpoint = torch.load(GOLDEN / "net2net.ckpt", weights_only=True)
            change_tensors(checkpoint["state_dict"])
            path.unlink(missing_ok=True)
            torch.save(checkpoint, path)
        if change_settings is not None:
            change_settings(settings["model"])
        path.with_suffix(".yaml").write_text(yaml.safe_dump(settings))
        return path

    return write


def to_vqgan_alone(tensors):
    """What is left of a transformer's checkpoint is the file that its first stage came from, with a loss."""
    for name in list(tensors):
        if name.startswith("first_stage_model."):
            tensors[name.removeprefix("first_stage_model.")] = tensors[name]
        del tensors[name]
    tensors["loss.discriminator.main.0.weight"] = torch.ones(8, 3, 4, 4)


def to_settings_alone(model):
    first_stage = model["params"]["first_stage_config"]
    model.update(first_stage)


def test_token_ids_and_reconstruction_equal_taming(converted, expected):
    graph, state = nnx.split(converted[0].model)

    def both(state, images, token_ids):
        tokenizer = nnx.merge(graph, state)
        return tokenizer.encode(images), tokenizer.decode(token_ids)

    token_ids, reconstruction = jit(both)(state, expected["image"], expected["token_ids"])
    np.testing.assert_array_equal(token_ids, expected["token_ids"])
    np.testing.assert_allclose(reconstruction, expected["reconstruction"], atol=1e-4)  # sums of a dozen layers
    assert converted[0].metadata["value_range"] == [-1.0, 1.0]


def test_logits_equal_taming(converted, expected):
    gpt = converted[1].model
    conditions = gpt.condition_ids(jnp.asarray(expected["label"]), 2)
    inputs = np.concatenate([conditions[:, None], expected["token_ids"].reshape(2, 64)[:, :-1]], axis=1)
    graph, state = nnx.split(gpt)
    logits = jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, inputs)
    np.testing.assert_allclose(logits[..., :64], expected["logits"], atol=1e-5)
    np.testing.assert_array_equal(logits[..., 64:], np.zeros((2, 64, 12)))  # what is no code has no counterpart there
    assert converted[1].metadata["class_names"] == [f"class_{i}" for i in range(10)]
    assert not gpt.class_dropout  # it was never trained without a class


def test_a_vqgan_without_a_transformer_is_the_same(copied, converted):
    (alone,) = read_taming([copied(to_vqgan_alone, to_settings_alone)])
    assert alone.arguments == converted[0].arguments
    states = (nnx.to_pure_dict(nnx.state(c.model)) for c in (alone, converted[0]))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_another_image_size_keeps_attention_at_its_level(converted, copied):
    def one_level_more(model):  # no level has 512; taming does not mind either
        model["params"]["first_stage_config"]["params"]["ddconfig"]["attn_resolutions"].append(512)

    first, second = read_taming([copied(None, one_level_more)], image_size=8)
    assert first.model.grid == (4, 4)
    assert first.arguments["architecture_args"]["attn_resolutions"] == [4]
    assert second.arguments["num_tokens"] == 16
    with pytest.raises(UserError, match="70 positions, but pictures of 256 tokens: give a smaller --image_size"):
        list(read_taming([GOLDEN / "net2net.ckpt"], image_size=32))


def test_classes_and_a_vocabulary_of_other_sizes(copied):
    def change(model):
        params = model["params"]
        params["transformer_config"]["params"]["vocab_size"] = 80
        params["cond_stage_config"]["params"]["n_classes"] = 70

    def grow(tensors):
        for name in ("transformer.tok_emb.weight", "transformer.head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.full((16, 32), 7.0)])
        tensors["cond_stage_model.note"] = torch.ones(1)

    _, gpt = read_taming([copied(grow, change)])
    table, theirs = np.asarray(gpt.model.token_embedding[...]), torch.load(GOLDEN / "net2net.ckpt", weights_only=True)
    rows = theirs["state_dict"]["transformer.tok_emb.weight"].numpy()
    np.testing.assert_array_equal(table[:64], rows)
    np.testing.assert_array_equal(table[64:128], rows)  # the classes' rows are copies
    np.testing.assert_array_equal(table[128:], [[7.0] * 32] * 6 + [[0.0] * 32] * 2)
    assert not np.asarray(gpt.model.head[...])[64:].any()


def test_settings_are_found_where_taming_leaves_them(copied, tmp_path):
    path = copied(to_vqgan_alone, to_settings_alone)
    run = tmp_path / "run"
    for folder in ("checkpoints", "configs"):
        (run / folder).mkdir(parents=True)
    moved = path.rename(run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="no settings for .*last.ckpt: put its .yaml file beside it, as last.yaml"):
        list(read_taming([moved]))
    settings = path.with_suffix(".yaml").rename(run / "configs" / "2020-11-09T13-31-51-project.yaml")
    assert [c.kind for c in read_taming([moved])] == ["tokenizer"]
    given = settings.rename(tmp_path / "given.yaml")
    assert [c.kind for c in read_taming([given, run / "checkpoints"])] == ["tokenizer"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target", "taming.models.vqgan.GumbelVQ", "is of a taming.models.vqgan.GumbelVQ, but what can be read is"),
        (
            "params.permuter_config",
            {"target": "taming.modules.transformer.permuter.ZCurve"},
            "permuter_config .*ZCurve",
        ),
        ("params.cond_stage_config", {"target": "taming.modules.util.CoordStage"}, "cond_stage_config .*CoordStage"),
        ("params.cond_stage_config", "__is_first_stage__", "cond_stage_config __is_first_stage__"),
        ("params.first_stage_config.target", "taming.models.vqgan.EMAVQ", "first stage taming.models.vqgan.EMAVQ"),
        (
            "params.transformer_config.target",
            "taming.modules.transformer.mingpt.CodeGPT",
            "transformer_config .*CodeGPT",
        ),
        ("params.transformer_config.params.n_unmasked", 3, "n_unmasked"),
        ("params.transformer_config.params.n_head", "four", "n_head is 'four', but it must be a whole number"),
        ("params.transformer_config.params.vocab_size", 63, "64 codes and 10 classes are not in a vocabulary of 63"),
        ("params.unconditional", True, "unconditional"),
        ("params.first_stage_config.params.ddconfig.double_z", True, "double_z is True, but only False can be read"),
        ("params.first_stage_config.params.ddconfig.ch_mult", None, "does not say params.ddconfig.ch_mult"),
        ("params.first_stage_config.params.remap", "ids.txt", "remap"),
        ("params", None, "does not say params"),
        ("params.first_stage_config.params", None, "does not say params"),
        ("params.first_stage_config.params", [1], r"says params is \[1\], but it must be a section"),
        ("params.transformer_config.params", 3, "params.transformer_config.params is 3, but it must be a section"),
        ("params.transformer_config", [["x"] * 9] * 9, r"a transformer_config \[\['x', 'x'.*\.\.\.\], but only"),
        ("params.cond_stage_config.params.n_classes", 0, "n_classes is 0, but it must be a whole number from 1 to"),
        ("params.transformer_config.params.n_layer", 10**9, "n_layer is 1000000000, but there are 2 blocks."),
        (
            "params.first_stage_config.params.ddconfig.num_res_blocks",
            10**9,
            "num_res_blocks is 1000000000, but there are",
        ),
        ("params.first_stage_config.params.n_embed", 10**9, r"our quantizer.codebook of \(1000000000, 16\)"),
    ],
)
def test_what_cannot_be_read_is_one_error(copied, field, value, message):
    def change(model):
        *path, last = field.split(".")
        for part in path:
            model = model[part]
        model[last] = value

    with pytest.raises(UserError, match=message):
        list(read_taming([copied(None, change)]))


def test_all_that_does_not_fit_is_listed(copied):
    def change(tensors):
        del tensors["first_stage_model.encoder.mid.block_1.conv1.bias"]
        tensors["first_stage_model.encoder.extra"] = torch.ones(1)
        tensors["first_stage_model.quantize.embedding.weight"] = torch.ones(65, 16)

    with pytest.raises(UserError) as found:
        list(read_taming([copied(change)]))
    assert str(found.value).partition(" does not fit: ")[2].split("; ") == [
        "encoder.extra has no place in ours",
        "encoder.mid.block_1.conv1.bias is missing",
        "quantize.embedding.weight give (65, 16) for our quantizer.codebook of (64, 16)",
    ]
    with pytest.raises(UserError, match="does not fit: decoy has no place in ours"):
        list(read_taming([copied(lambda tensors: tensors.update(decoy=torch.ones(1)))]))


def test_settings_of_another_file_are_noticed(copied, tmp_path):
    with pytest.raises(UserError, match="holds no quantize.* tensors, so it is no taming.models.vqgan.VQModel"):
        list(read_taming([copied(None, to_settings_alone)]))
    for content, message in (("a: [", "cannot be read as YAML"), ("text", "holds no settings")):
        (tmp_path / "model.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            list(read_taming([tmp_path / "model.ckpt"]))
    with pytest.raises(UserError, match="there is no file or folder .*absent.ckpt"):
        list(read_taming([tmp_path / "absent.ckpt"]))
    with pytest.raises(UserError, match="give one checkpoint with its settings, not 2 with 0"):
        list(read_taming(["a.ckpt", "b.ckpt"]))
