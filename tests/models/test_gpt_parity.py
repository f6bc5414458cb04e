"""The whole transformer against its PyTorch peers: Hugging Face's GPT-2, Llama and Qwen3, visual-gpt, and LlamaGen."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.losses import cross_entropy
from vgpt_jax.models.gpt import BLOCKS, GPT
from vgpt_jax.models.transformer import GELU, ExactGELU
from vgpt_jax.pretrained.llamagen import read_llamagen
from vgpt_jax.pretrained.strict import load_strictly
from vgpt_jax.pretrained.visual_gpt import gpt2_table, read_visual_gpt
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


def test_exact_gelu_equals_pytorch():
    import torch

    mlp = ExactGELU(4, 6, 0.5, True, jnp.float32, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(0, 3, (2, 5, 4)).astype(np.float32)
    fc, out = ((torch.from_numpy(np.array(layer.kernel[...])) * 20, layer) for layer in (mlp.fc, mlp.out))
    mlp.fc.kernel[...] = fc[0].numpy()  # so that tanh would be a thousandth off
    expected = torch.nn.functional.gelu(torch.from_numpy(x) @ fc[0]) @ (out[0] / 20)
    y = nnx.jit(lambda mlp, x: mlp(x))(mlp, x)
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-5)
    assert np.abs(GELU.__call__(mlp, x) - y).max() > 1e-4


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
    config = transformers.GPT2Config(
        vocab_size=25,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=tie_weights,
        initializer_range=0.2,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    table, unused = gpt2_table(2, tied=tie_weights), ["lm_head.weight"] if tie_weights else []
    create = lambda: GPT(**SIZES, num_positions=16, tie_weights=tie_weights, rngs=nnx.Rngs(0))  # noqa: E731
    ours = load_strictly(create, arrays(theirs.state_dict()), table, "GPT-2", unused)
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
    ours = list(read_visual_gpt([GOLDEN / "visual_gpt_cosine"]))[1].model
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
    (converted,) = read_llamagen([GOLDEN / "llamagen" / "c2i.pt"])
    return converted.model


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
