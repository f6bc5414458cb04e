"""Binary codes: the bits of an id, the entropies of bits that are drawn independently, and what LFQ and BSQ share."""

import jax
import jax.numpy as jnp
from jax import Array

from vgpt_jax.errors import check_range
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Quantizer, straight_through


class SignQuantizer(Quantizer):
    """Codes ``+-codebook_scale`` in every dimension by the signs of the latents; arguments as `LFQ`'s.

    Args:
      name: of the config's section, for errors.
    """

    def __init__(
        self,
        name: str,
        *,
        num_bits: int,
        codebook_scale: float,
        entropy_weight: float,
        diversity_gamma: float,
        commitment_weight: float,
        inverse_temperature: float,
        entropy_group_bits: int,
    ):
        check_range(f"{name}.num_bits", num_bits, least=1, most=30)
        check_range(f"{name}.codebook_scale", codebook_scale, above=0)
        check_range(f"{name}.entropy_weight", entropy_weight, least=0)
        check_range(f"{name}.diversity_gamma", diversity_gamma, least=0)
        check_range(f"{name}.commitment_weight", commitment_weight, least=0)
        check_range(f"{name}.inverse_temperature", inverse_temperature, above=0)
        check_range(f"{name}.entropy_group_bits", entropy_group_bits, least=1, most=24)

        self.num_codewords = 2**num_bits
        self.embedding_dim = num_bits
        self.codebook_scale = codebook_scale
        self.entropy_weight = entropy_weight
        self.diversity_gamma = diversity_gamma
        self.commitment_weight = commitment_weight
        self.inverse_temperature = inverse_temperature
        self.entropy_group_bits = entropy_group_bits

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the signs of latents ``[..., D]``; a 0 counts as negative."""
        self.check_width(z_e)
        return bits_to_ids(z_e > 0)

    def dequantize(self, token_ids: Array) -> Array:
        """The codes ``[..., D]`` float32 of ids ``[...]`` in ``[0, K)``."""
        scale = jnp.float32(self.codebook_scale)
        return jnp.where(ids_to_bits(token_ids, self.embedding_dim), scale, -scale)

    def output(self, z: Array, logits: Array) -> QuantizerOutput:
        """The output for latents ``[..., D]`` float32 and the log-odds of their bits, of the same shape.

        Its losses are "commitment" (mean squared difference) and "entropy" (nats, may be negative).
        """
        token_ids = self.quantize(z)
        codes = self.dequantize(token_ids)
        losses = {"commitment": jnp.mean((z - codes) ** 2)}
        if self.entropy_weight:
            sample_entropy, codebook_entropy = bit_entropies(logits, self.entropy_group_bits)
            losses["entropy"] = sample_entropy - self.diversity_gamma * codebook_entropy
        return QuantizerOutput(
            z_q=straight_through(z, codes),
            token_ids=token_ids,
            z_e=z,
            losses=losses,
            loss=sum(getattr(self, f"{name}_weight") * value for name, value in losses.items()),
        )


def bits_to_ids(bits: Array) -> Array:
    """Bits ``[..., D]`` bool to ids ``[...]`` int32 in ``[0, 2^D)``; the first bit is the most significant."""
    place_values = 1 << jnp.arange(bits.shape[-1] - 1, -1, -1, dtype=jnp.int32)
    return jnp.sum(bits * place_values, axis=-1, dtype=jnp.int32)


def ids_to_bits(token_ids: Array, num_bits: int) -> Array:
    """Ids ``[...]`` in ``[0, 2^D)`` to their D = ``num_bits`` bits ``[..., D]`` bool, the most significant first."""
    places = jnp.arange(num_bits - 1, -1, -1, dtype=jnp.int32)
    return (token_ids[..., None] >> places) & 1 == 1


def bit_entropies(logits: Array, group_bits: int) -> tuple[Array, Array]:
    """Entropies of binary codes whose bits are independent given a latent: of a latent's code, and of the average code.

    With ``q_m(c) = prod_d sigmoid(+-logits[m, d])``, the soft assignment of latent m to all 2^D codes:

        sample entropy    mean_m H(q_m): a sum over bits, exact whatever the groups
        codebook entropy  sum over groups of H(mean_m q_m restricted to the group's bits)

    Bits are dependent once they are averaged over latents, so the codebook entropy of one group of all bits is that of
    the 2^D codes, and with smaller groups it is an upper bound of it: what groups know of each other is left out. A group
    of g bits costs ``M 2^g`` multiply-adds in one matrix product and ``M 2^(g/2) + 2^g`` numbers of memory; the
    assignments ``[M, 2^g]`` themselves are never made.

    Args:
      logits: ``[..., D]`` float32, log-odds of every bit being 1.
      group_bits: bits of a group, neighbours; the last group has what is left.

    Returns:
      The sample entropy in ``[0, D log 2]`` and the codebook entropy in ``[sample entropy, D log 2]``, nats.
    """
    num_bits = logits.shape[-1]
    logits = logits.reshape(-1, num_bits)  # [M, D]
    size = jnp.abs(logits)
    of_bits = jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)  # of |logits|: large ones would cancel
    sample_entropy = jnp.mean(jnp.sum(of_bits, axis=-1))

    codebook_entropy = jnp.zeros((), jnp.float32)
    in_full_groups = num_bits - num_bits % group_bits
    for part, width in ((logits[:, :in_full_groups], group_bits), (logits[:, in_full_groups:], num_bits % group_bits)):
        if part.shape[-1]:
            usage = mean_assignment(part.reshape(logits.shape[0], -1, width))
            codebook_entropy -= jnp.sum(usage * jnp.log(jnp.maximum(usage, 1e-30)))
    return sample_entropy, codebook_entropy


def mean_assignment(logits: Array) -> Array:
    """Probabilities of the codes of G groups of g bits each, ``[G, 2^a, 2^b]`` with a + b = g, of log-odds ``[M, G, g]``.

    They are means over M. As the bits are independent before the mean, a latent's distribution is the product of those of
    its first a and its last b bits, and the mean is a matrix product.
    """
    half = logits.shape[-1] // 2
    first, second = assignments(logits[..., :half]), assignments(logits[..., half:])
    return jnp.einsum("mga,mgb->gab", first, second, precision=jax.lax.Precision.HIGHEST) / logits.shape[0]


def assignments(logits: Array) -> Array:
    """Probabilities ``[..., 2^n]`` of all codes of n independent bits, by id, of log-odds ``[..., n]``."""
    probabilities = jnp.ones((*logits.shape[:-1], 1), jnp.float32)
    for bit in range(logits.shape[-1]):
        one = logits[..., bit, None]
        options = jnp.concatenate([jax.nn.sigmoid(-one), jax.nn.sigmoid(one)], axis=-1)  # [..., 2]
        probabilities = (probabilities[..., :, None] * options[..., None, :]).reshape(*one.shape[:-1], -1)
    return probabilities
