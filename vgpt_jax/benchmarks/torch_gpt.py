"""The PyTorch peer of the generator: Hugging Face's GPT-2 with the weights of one of ours, sampling and training.

For the benchmarks beside our generator. Neither PyTorch nor transformers is a dependency of the package: only the benchmarks
and the tests import this.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from vgpt_jax.models.gpt import GPT

TABLES = {"token_embedding": "transformer.wte.weight", "position_embedding": "transformer.wpe.weight"}
TABLES["head"] = "lm_head.weight"
LAYERS = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.out": "mlp.c_proj"}
LAYERS |= {"norm1": "ln_1", "norm2": "ln_2"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def gpt2_like(gpt: GPT, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A ``GPT2LMHeadModel`` with the weights of ``gpt``, whose blocks must be GPT-2's, without dropout.

    Raises:
      AttributeError, KeyError, RuntimeError: one of them has a parameter that the other has not, or one of another shape.
    """
    sys.modules.setdefault("torchvision", None)  # one that does not fit PyTorch would break the import of GPT-2
    from transformers import GPT2Config, GPT2LMHeadModel

    attention = gpt.blocks[0].attention
    config = GPT2Config(
        vocab_size=gpt.vocab_size,
        n_positions=gpt.position_embedding.shape[0],
        n_embd=attention.num_heads * attention.head_dim,
        n_layer=len(gpt.blocks),
        n_head=attention.num_heads,
        n_inner=gpt.blocks[0].mlp.fc.out_features,
        layer_norm_epsilon=gpt.norm.epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=gpt.head is None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=gpt.hidden_id,
    )
    peer = GPT2LMHeadModel(config)
    params = nnx.to_flat_state(nnx.state(gpt, nnx.Param))
    weights = {their_name(path): torch.from_numpy(np.array(param[...])) for path, param in params}
    if gpt.head is None:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    peer.load_state_dict(weights)  # Conv1D keeps its matrices (in, out), as we do
    return peer.eval().to(device, dtype)


def their_name(path: tuple[str | int, ...]) -> str:
    """The name in ``GPT2LMHeadModel`` of our parameter at a path of `nnx.to_flat_state`."""
    if path[0] == "blocks":
        _, index, *layer, leaf = path
        return f"transformer.h.{index}.{LAYERS['.'.join(layer)]}.{LEAVES[leaf]}"
    if path[0] == "norm":
        return f"transformer.ln_f.{LEAVES[path[1]]}"
    return TABLES[path[0]]


@torch.no_grad()
def logits(peer: nn.Module, ids: np.ndarray) -> np.ndarray:
    """``[B, T]`` ids to logits ``[B, T, V]`` float32."""
    return peer(torch.from_numpy(ids).long().to(peer.device)).logits.float().cpu().numpy()


def sample(peer: nn.Module, conditions: np.ndarray, num_tokens: int, top_k: int) -> np.ndarray:
    """Draws ``num_tokens`` ids ``[B, N]`` after each condition ``[B]``, of the whole vocabulary, with the cache."""
    first = torch.from_numpy(conditions).long().to(peer.device)[:, None]
    drawn = peer.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=top_k,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        use_cache=True,
    )
    return drawn[:, 1:].cpu().numpy()


class GPT2Training:
    """AdamW on a ``GPT2LMHeadModel``, with one step of training.

    Args:
      peer: what is trained.
      learning_rate, b1, b2, weight_decay, grad_clip: as in `training.optimizer.make_optimizer`; constant.
    """

    def __init__(
        self,
        peer: nn.Module,
        *,
        learning_rate: float,
        b1: float,
        b2: float,
        weight_decay: float,
        grad_clip: float,
    ):
        self.peer, self.grad_clip = peer.train(), grad_clip
        groups = [
            {"params": list(of_dimensions(peer, 2)), "weight_decay": weight_decay},
            {"params": list(of_dimensions(peer, 1)), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(b1, b2), fused=True)

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """One update; returns the loss before it, the mean cross-entropy in nats of ``targets`` ``[B, N]``.

        Args:
          inputs: ``[B, N]`` int32, the condition and all tokens but the last.
          targets: ``[B, N]`` int32, the tokens.
        """
        inputs, targets = (torch.from_numpy(ids).long().to(self.peer.device) for ids in (inputs, targets))
        self.optimizer.zero_grad()
        predicted = self.peer(inputs, use_cache=False).logits
        loss = F.cross_entropy(predicted.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.peer.parameters(), self.grad_clip)
        self.optimizer.step()
        return loss.item()


def of_dimensions(peer: nn.Module, count: int) -> Iterator[Tensor]:
    """The parameters that are arrays of so many dimensions."""
    return (parameter for parameter in peer.parameters() if parameter.ndim == count)
