"""The quantizers that give one token a position, by name: what the composed ones are made of."""

from vgpt_jax.quantizers.bsq import BSQ
from vgpt_jax.quantizers.diveq import DiVeQ
from vgpt_jax.quantizers.fsq import FSQ
from vgpt_jax.quantizers.ibq import IBQ
from vgpt_jax.quantizers.lfq import LFQ
from vgpt_jax.quantizers.simvq import SimVQ
from vgpt_jax.quantizers.vector_quantize import VectorQuantize

SINGLE_QUANTIZERS = {
    "vector_quantize": VectorQuantize,
    "simvq": SimVQ,
    "ibq": IBQ,
    "diveq": DiVeQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "bsq": BSQ,
}
