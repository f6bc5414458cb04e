"""The transformer against Hugging Face's GPT-2, its cache, and causality."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.losses import cross_entropy
from vgpt_jax.models.gpt import GPT
from vgpt_jax.sampling.generate import generate

GOLDEN = Path(__file__).parents[1] / "golden" / "visual_gpt_cosine"

SIZES = {"num_codes": 20, "num_classes": 3, "num_tokens": 9, "d_model": 32, "num_layers": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return GPT(**SIZES, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["num_codes"], (2, SIZES["num_tokens"])).astype(np.int32)


def copy_hugging_face_weights(state_dict: dict, gpt: GPT) -> None:
    """Copies the weights of a ``GPT2LMHeadModel`` into ``gpt``, every tensor of both."""
    there = {name: jnp.asarray(value.detach().numpy()) for name, value in state_dict.items()}
    gpt.token_embedding[...] = there.pop("transformer.wte.weight")
    gpt.position_embedding[...] = there.pop("transformer.wpe.weight")
    for i, block in enumerate(gpt.blocks):
        for ours, theirs in (
            (block.attention.qkv, "attn.c_attn"),
            (block.attention.out, "attn.c_proj"),
            (block.mlp.fc, "mlp.c_fc"),
            (block.mlp.out, "mlp.c_proj"),
        ):
            ours.kernel[...] = there.pop(f"transformer.h.{i}.{theirs}.weight")  # Conv1D keeps them (in, out)
            ours.bias[...] = there.pop(f"transformer.h.{i}.{theirs}.bias")
        for ours, theirs in ((block.norm1, "ln_1"), (block.norm2, "ln_2")):
            ours.scale[...] = there.pop(f"transformer.h.{i}.{theirs}.weight")
            ours.bias[...] = there.pop(f"transformer.h.{i}.{theirs}.bias")
    gpt.norm.scale[...] = there.pop("transformer.ln_f.weight")
    gpt.norm.bias[...] = there.pop("transformer.ln_f.bias")
    head = there.pop("lm_head.weight")
    if gpt.head is not None:
        gpt.head[...] = head
    assert not there


@pytest.mark.parametrize("tie_weights", [True, False])
def test_logits_equal_hugging_face_gpt2(tie_weights, ids):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = GPT(**SIZES, num_positions=16, tie_weights=tie_weights, rngs=nnx.Rngs(0))
    config = transformers.GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=16,
        n_embd=32,
        n_layer=3,
        n_head=4,
        tie_word_embeddings=tie_weights,
        initializer_range=0.2,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    copy_hugging_face_weights(theirs.state_dict(), ours)
    inputs = np.concatenate([np.array([[ours.begin_id], [20]]), ids[:, :-1]], axis=1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(inputs)).logits.numpy()
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(ours, inputs), expected, atol=1e-4)


def test_logits_losses_and_greedy_sample_equal_visual_gpt():
    """Golden files: a tiny checkpoint of the original with random weights, and what the original computed from it."""
    torch = pytest.importorskip("torch")
    expected = np.load(GOLDEN / "expected.npz")
    config = json.loads((GOLDEN / "gpt" / "config.json").read_text())
    ours = GPT(
        num_codes=64,
        num_classes=config["condition_vocab"],
        num_tokens=64,
        d_model=config["d_model"],
        num_layers=config["num_transformer_layers"],
        num_heads=config["num_attn_heads"],
        num_positions=config["max_pos_len"],
        rngs=nnx.Rngs(0),
    )
    copy_hugging_face_weights(torch.load(GOLDEN / "gpt" / "model.bin", weights_only=True), ours)
    token_ids = expected["token_ids"].reshape(3, 64)

    def logits_and_loss(labels):
        inputs = jnp.concatenate([ours.condition_ids(labels, 3)[:, None], token_ids[:, :-1]], axis=1)
        logits = ours(inputs)
        return logits, jnp.mean(cross_entropy(logits, token_ids))

    logits, loss = logits_and_loss(jnp.asarray(expected["label"]))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-4)
    np.testing.assert_allclose(logits_and_loss(None)[1], expected["unconditional_loss"], atol=1e-4)

    conditions = ours.condition_ids(jnp.asarray(expected["greedy_label"]), 1)
    greedy = nnx.jit(lambda gpt, c: generate(gpt, c, jnp.zeros((1, 64)), 1.0, None, top_k=1))(ours, conditions)
    np.testing.assert_array_equal(greedy.reshape(1, 8, 8), expected["greedy_token_ids"])


def test_vocabulary_is_codes_then_classes_then_begin_then_padding(gpt):
    assert gpt.vocab_size == 20 + 3 + 2
    np.testing.assert_array_equal(gpt.condition_ids(jnp.array([0, 2]), 2), [20, 22])
    np.testing.assert_array_equal(gpt.condition_ids(None, 2), [23, 23])


@pytest.mark.parametrize("prefix", [1, 4])
def test_cached_logits_equal_uncached(gpt, ids, prefix):
    expected = gpt(ids)[..., : gpt.num_codes]
    logits, cache = gpt.step(ids[:, :prefix], 0, gpt.init_cache(2))
    np.testing.assert_allclose(logits, expected[:, prefix - 1], atol=1e-5)
    step = nnx.jit(lambda m, token, position, cache: m.step(token, position, cache))
    for position in range(prefix, gpt.num_tokens):
        logits, cache = step(gpt, ids[:, position : position + 1], position, cache)
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-5)


def test_no_logit_depends_on_a_later_position(gpt):
    def logits(embeddings, position):
        x = embeddings
        for block in gpt.blocks:
            x = block(x, None)
        return jnp.sum(jnp.abs(gpt.logits(x, gpt.vocab_size)[0, position]))

    embeddings = jax.random.normal(jax.random.key(0), (1, SIZES["num_tokens"], 32))
    for position in range(SIZES["num_tokens"]):
        reach = np.abs(jax.grad(logits)(embeddings, position))[0].sum(axis=-1)
        assert (reach[: position + 1] > 0).all()
        np.testing.assert_array_equal(reach[position + 1 :], 0.0)


def test_dropout_only_with_a_key(ids):
    gpt = GPT(**SIZES, embedding_dropout=0.5, residual_dropout=0.5, attention_dropout=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(gpt(ids), gpt(ids))
    one, other = gpt(ids, jax.random.key(0)), gpt(ids, jax.random.key(1))
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(one, gpt(ids, jax.random.key(0)))


@pytest.mark.parametrize("name", ["embedding_dropout", "residual_dropout", "attention_dropout"])
def test_every_dropout_does_something(ids, name):
    off = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
    gpt = GPT(**SIZES, **(off | {name: 0.5}), rngs=nnx.Rngs(0))
    assert not np.allclose(gpt(ids), gpt(ids, jax.random.key(0)))


def test_bfloat16_stays_near_float32(gpt, ids):
    low = GPT(**SIZES, dtype="bfloat16", rngs=nnx.Rngs(0))
    logits = low(ids)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, gpt(ids), atol=0.02)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"num_heads": 5}, "num_heads"), ({"num_positions": 4}, "num_positions"), ({"dtype": "float8"}, "dtype")],
)
def test_sizes_that_do_not_fit_are_refused(changed, named):
    with pytest.raises(UserError, match=named):
        GPT(**(SIZES | changed), rngs=nnx.Rngs(0))
