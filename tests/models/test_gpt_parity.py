"""The whole transformer against its PyTorch peers: Hugging Face's GPT-2, Llama and Qwen3, visual-gpt, and LlamaGen."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.losses import cross_entropy
from vgpt_jax.models.gpt import BLOCKS, GPT
from vgpt_jax.pretrained.torch_file import read_torch_file
from vgpt_jax.sampling.generate import Options, generate

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"num_codes": 20, "num_classes": 3, "num_tokens": 9, "d_model": 32, "num_layers": 2, "num_heads": 4}

logits_of = nnx.jit(lambda gpt, ids: gpt(ids))
greedy = nnx.jit(
    lambda gpt, conditions, uniforms, guidance: generate(gpt, conditions, uniforms, Options(top_k=1, guidance=guidance))
)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """Condition (the begin token, then a class) and codes, ``[2, 9]``."""
    codes = np.random.default_rng(0).integers(0, SIZES["num_codes"], (2, SIZES["num_tokens"] - 1))
    return np.concatenate([[[23], [20]], codes], axis=1).astype(np.int32)


def arrays(state_dict: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in state_dict.items()}


def fill(variable, value: np.ndarray) -> None:
    """Assigning to a variable would broadcast."""
    assert variable[...].shape == value.shape
    variable[...] = jnp.asarray(value)


def copy_gpt2(there: dict[str, np.ndarray], gpt: GPT) -> None:
    """Copies the weights of a ``GPT2LMHeadModel``, every tensor of both."""
    fill(gpt.token_embedding, there.pop("transformer.wte.weight"))
    fill(gpt.position_embedding, there.pop("transformer.wpe.weight"))
    for i, block in enumerate(gpt.blocks):
        for ours, theirs in (
            (block.attention.qkv, "attn.c_attn"),
            (block.attention.out, "attn.c_proj"),
            (block.mlp.fc, "mlp.c_fc"),
            (block.mlp.out, "mlp.c_proj"),
        ):
            fill(ours.kernel, there.pop(f"transformer.h.{i}.{theirs}.weight"))  # Conv1D keeps them (in, out)
            fill(ours.bias, there.pop(f"transformer.h.{i}.{theirs}.bias"))
        for ours, theirs in ((block.norm1, "ln_1"), (block.norm2, "ln_2")):
            fill(ours.scale, there.pop(f"transformer.h.{i}.{theirs}.weight"))
            fill(ours.bias, there.pop(f"transformer.h.{i}.{theirs}.bias"))
    fill(gpt.norm.scale, there.pop("transformer.ln_f.weight"))
    fill(gpt.norm.bias, there.pop("transformer.ln_f.bias"))
    head = there.pop("lm_head.weight")
    if gpt.head is not None:
        fill(gpt.head, head)
    assert not there


def copy_llama(there: dict[str, np.ndarray], gpt: GPT) -> None:
    """Copies the weights of a ``LlamaForCausalLM`` or a ``Qwen3ForCausalLM``, every tensor of both."""
    fill(gpt.token_embedding, there.pop("model.embed_tokens.weight"))
    for i, block in enumerate(gpt.blocks):
        take = lambda *names, i=i: np.concatenate([there.pop(f"model.layers.{i}.{name}.weight") for name in names])  # noqa: E731
        fill(block.attention.qkv.kernel, take("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").T)
        fill(block.attention.out.kernel, take("self_attn.o_proj").T)
        fill(block.mlp.gate_and_up.kernel, take("mlp.gate_proj", "mlp.up_proj").T)
        fill(block.mlp.out.kernel, take("mlp.down_proj").T)
        fill(block.norm1.scale, take("input_layernorm"))
        fill(block.norm2.scale, take("post_attention_layernorm"))
        if block.attention.query_norm is not None:
            fill(block.attention.query_norm.scale, take("self_attn.q_norm"))
            fill(block.attention.key_norm.scale, take("self_attn.k_norm"))
    fill(gpt.norm.scale, there.pop("model.norm.weight"))
    fill(gpt.head, there.pop("lm_head.weight"))
    assert not there


def halves_from_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders ``[D, in]`` so that channels of a head that are turned together, neighbours there, are half a head apart."""
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def copy_llamagen(there: dict[str, np.ndarray], gpt: GPT) -> None:
    """Copies the weights of LlamaGen's class-conditional transformer, every tensor of both; it has no padding id."""
    num_heads, width = gpt.num_kv_heads, gpt.token_embedding[...].shape[1]
    tables = [there.pop("tok_embeddings.weight"), there.pop("cls_embedding.embedding_table.weight")]
    fill(gpt.token_embedding, np.concatenate([*tables, np.zeros((1, width), np.float32)]))
    for i, block in enumerate(gpt.blocks):
        take = lambda name, i=i: there.pop(f"layers.{i}.{name}.weight")  # noqa: E731
        query, keys, values = np.split(take("attention.wqkv"), 3)
        qkv = [halves_from_pairs(query, num_heads), halves_from_pairs(keys, num_heads), values]
        fill(block.attention.qkv.kernel, np.concatenate(qkv).T)
        fill(block.attention.out.kernel, take("attention.wo").T)
        fill(block.mlp.gate_and_up.kernel, np.concatenate([take("feed_forward.w1"), take("feed_forward.w3")]).T)
        fill(block.mlp.out.kernel, take("feed_forward.w2").T)
        fill(block.norm1.scale, take("attention_norm"))
        fill(block.norm2.scale, take("ffn_norm"))
    fill(gpt.norm.scale, there.pop("norm.weight"))
    head = there.pop("output.weight")
    fill(gpt.head, np.concatenate([head, np.zeros((gpt.vocab_size - len(head), width), np.float32)]))
    assert not there


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)  # one that does not fit torch would break the import of models
        yield pytest.importorskip("transformers")


def peer_logits(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()


@pytest.mark.parametrize("tie_weights", [True, False])
def test_logits_equal_hugging_face_gpt2(tie_weights, ids, transformers):
    import torch

    torch.manual_seed(0)
    ours = GPT(**SIZES, num_positions=16, tie_weights=tie_weights, rngs=nnx.Rngs(0))
    config = transformers.GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=tie_weights,
        initializer_range=0.2,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    copy_gpt2(arrays(theirs.state_dict()), ours)
    np.testing.assert_allclose(logits_of(ours, ids), peer_logits(theirs, ids), atol=1e-5)


@pytest.mark.parametrize(("family", "num_kv_heads"), [("Llama", 4), ("Llama", 2), ("Llama", 1), ("Qwen3", 2)])
def test_logits_equal_hugging_face_llama_and_qwen3(family, num_kv_heads, ids, transformers):
    import torch

    torch.manual_seed(0)
    blocks = BLOCKS["llama"] | {"positions": "rotary", "norm_epsilon": 1e-3, "mlp_width": 48}
    qk_norm = family == "Qwen3"  # its attention is Llama's with an RMSNorm over each head before the rotation
    ours = GPT(**SIZES, **blocks, num_kv_heads=num_kv_heads, qk_norm=qk_norm, tie_weights=False, rngs=nnx.Rngs(0))
    config = getattr(transformers, f"{family}Config")(
        vocab_size=ours.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=8,
        rms_norm_eps=1e-3,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():  # the norms' are ones
        parameter.data += 0.1 * torch.randn(parameter.shape)
    copy_llama(arrays({name: value.detach() for name, value in theirs.state_dict().items()}), ours)
    np.testing.assert_allclose(logits_of(ours, ids), peer_logits(theirs, ids), atol=1e-5)


def test_logits_losses_and_greedy_sample_equal_visual_gpt():
    """Golden files: a tiny checkpoint of the original with random weights, and what the original computed from it."""
    expected = np.load(GOLDEN / "visual_gpt_cosine" / "expected.npz")
    config = json.loads((GOLDEN / "visual_gpt_cosine" / "gpt" / "config.json").read_text())
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
    copy_gpt2(read_torch_file(GOLDEN / "visual_gpt_cosine" / "gpt" / "model.bin"), ours)
    token_ids = expected["token_ids"].reshape(3, 64)

    def logits_and_loss(labels):
        inputs = jnp.concatenate([ours.condition_ids(labels, 3)[:, None], token_ids[:, :-1]], axis=1)
        logits = logits_of(ours, inputs)
        return logits, jnp.mean(cross_entropy(logits, token_ids))

    logits, loss = logits_and_loss(jnp.asarray(expected["label"]))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)
    np.testing.assert_allclose(logits_and_loss(None)[1], expected["unconditional_loss"], atol=1e-5)

    conditions = ours.condition_ids(jnp.asarray(expected["greedy_label"]), 1)
    written = greedy(ours, conditions, jnp.zeros((1, 64)), None)
    np.testing.assert_array_equal(written.reshape(1, 8, 8), expected["greedy_token_ids"])


@pytest.fixture(scope="module")
def llamagen() -> GPT:
    config = json.loads((GOLDEN / "llamagen" / "config.json").read_text())["gpt"]
    weights = dict(read_torch_file(GOLDEN / "llamagen" / "c2i.pt")["model"])
    side = int(config["block_size"] ** 0.5)
    gpt = GPT(
        num_codes=len(weights["tok_embeddings.weight"]),
        num_classes=config["num_classes"],
        num_tokens=config["block_size"],
        grid=(side, side),
        d_model=weights["norm.weight"].shape[0],
        num_layers=sum(name.endswith("wqkv.weight") for name in weights),
        num_heads=config["n_head"],
        norm_epsilon=config["norm_eps"],
        rotary_base=config["rope_base"],
        tie_weights=False,
        **BLOCKS["llama"] | {"positions": "rotary_llamagen"},
        rngs=nnx.Rngs(0),
    )
    copy_llamagen(weights, gpt)
    return gpt


@pytest.fixture(scope="module")
def of_llamagen() -> dict[str, np.ndarray]:
    """What LlamaGen computed from the same weights: ``label`` ``[2]``, ``token_ids``, ``logits`` and two greedy samples."""
    return dict(np.load(GOLDEN / "llamagen" / "expected.npz"))


def test_logits_equal_llamagen(llamagen, of_llamagen):
    conditions = llamagen.condition_ids(jnp.asarray(of_llamagen["label"]), 2)
    inputs = jnp.concatenate([conditions[:, None], of_llamagen["token_ids"].reshape(2, 64)[:, :-1]], axis=1)
    logits = logits_of(llamagen, inputs)[..., : llamagen.num_codes]
    np.testing.assert_allclose(logits, of_llamagen["logits"], atol=1e-5)


@pytest.mark.parametrize(("guidance", "name"), [(None, "greedy_token_ids"), (2.0, "greedy_token_ids_cfg2")])
def test_greedy_samples_equal_llamagen(llamagen, of_llamagen, guidance, name):
    conditions = llamagen.condition_ids(jnp.asarray(of_llamagen["label"]), 2)
    np.testing.assert_array_equal(greedy(llamagen, conditions, jnp.zeros((2, 64)), guidance), of_llamagen[name])


def test_the_null_class_of_llamagen_is_the_begin_token(llamagen, of_llamagen):
    """Guidance of 0 leaves the unconditional model, which sees no class."""
    labels = jnp.asarray(of_llamagen["label"])
    written = greedy(llamagen, llamagen.condition_ids(labels, 2), jnp.zeros((2, 64)), 0.0)
    unconditional = greedy(llamagen, llamagen.condition_ids(None, 2), jnp.zeros((2, 64)), None)
    np.testing.assert_array_equal(written, unconditional)
    assert not np.array_equal(written, of_llamagen["greedy_token_ids"])
