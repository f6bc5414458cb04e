"""What a user asks of the sampler, checked; and how a request becomes batches of shapes that are compiled once."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose, close_names
from vgpt_jax.models.gpt import GPT
from vgpt_jax.sampling.generate import Options
from vgpt_jax.sampling.guidance import guidance_scales
from vgpt_jax.sampling.parallel import group_sizes

BATCHES = (1, 2, 4, 10, 16, 32, 64)
"""Pictures that are drawn in one program. A request is split into the greatest, and its rest padded to the next."""

MAX_BATCH = BATCHES[-1]

ORDERS = ("raster", "random")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
      temperature: above 0; below 1 plays safe, above 1 takes risks.
      top_k: only the k most probable codes are drawn; 0: all.
      top_p: only the nucleus of that mass is drawn; 1: all.
      min_p: only codes at least so many times as probable as the most probable; 0: all.
      guidance: scale of classifier-free guidance; 1: none. Above 1 a picture is more of its class, and pictures are more alike.
      guidance_schedule: how it goes over the tokens, a name in ``GUIDANCE_SCHEDULES``.
      guidance_power: of the schedule.
      order: "raster", or "random", of its own for each picture, for generators of random order.
      num_steps: steps in which a generator of random order writes a picture, several tokens each, in random order; 0: a token a
        step.
      seed: 0 to 2**32 - 1. Same seed, same pictures; the i-th does not depend on how many follow.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0
    guidance_schedule: str = "constant"
    guidance_power: float = 1.0
    order: str = "raster"
    num_steps: int = 0
    seed: int = 0

    @classmethod
    def of(cls, **options: Any) -> "Drawing":
        """The drawing of options by name.

        Raises:
          UserError: there is no such option.
        """
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise UserError(f"there is no sampling option {name!r}: {close_names(name, names)}")
        return cls(**options)

    def check(self, gpt: GPT) -> None:
        """Sees whether a generator can draw so.

        Raises:
          UserError: an option out of its range, or one that this generator cannot follow.
        """
        if not self.temperature > 0:
            raise UserError(
                f"temperature is {self.temperature}, but must be above 0 (for the most probable token use top_k 1)"
            )
        if not 0 <= self.top_k <= gpt.num_codes:
            raise UserError(
                f"top_k is {self.top_k}, but must be between 1 and the {gpt.num_codes} codes of the tokenizer, or 0 for all"
            )
        check_range("top_p", self.top_p, above=0, most=1)
        check_range("min_p", self.min_p, least=0, most=1)
        check_range("seed", self.seed, least=0, most=2**32 - 1)
        choose("order", self.order, dict.fromkeys(ORDERS))
        if self.scales(gpt) is not None and not gpt.class_dropout:
            raise UserError(
                f"guidance is {self.guidance}, but the generator never saw a picture without its class: train it with "
                "gpt.class_dropout 0.1, or leave guidance at 1"
            )
        if (self.order == "random" or self.num_steps) and not gpt.random_order:
            asked = f"num_steps is {self.num_steps}" if self.num_steps else "order is random"
            raise UserError(f"{asked}, but the generator writes in raster order only: train one with gpt.random_order")
        if self.num_steps:
            group_sizes(gpt.num_tokens, self.num_steps)

    def scales(self, gpt: GPT) -> np.ndarray | None:
        """The guidance at each token, None without."""
        return guidance_scales(gpt.num_tokens, self.guidance, self.guidance_schedule, self.guidance_power)

    def options(self, gpt: GPT) -> Options:
        """For `sampling.generate`. What is off is None, and costs nothing."""
        return Options(
            temperature=self.temperature,
            top_p=self.top_p if self.top_p < 1 else None,
            min_p=self.min_p or None,
            guidance=self.scales(gpt),
            top_k=self.top_k,
        )


def bucket(count: int, devices: int = 1) -> int:
    """The batch that ``count`` pictures are padded to: the next of ``BATCHES`` that the devices can share."""
    fitting = next(size for size in BATCHES if size >= min(count, MAX_BATCH))
    return -(-fitting // devices) * devices


def picture_keys(seed: Array, indices: Array) -> Array:
    """The PRNG key of each picture: of the seed and its own number ``[B]`` alone, not of what is drawn beside it."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def uniforms_of(keys: Array, num_tokens: int) -> Array:
    """The randomness of pictures: ``[B]`` keys to ``[B, num_tokens]`` float32 in ``[0, 1)``."""
    return jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)
