"""A tokenizer and a generator as one thing that draws pictures."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.sampling.class_names import find_class
from vgpt_jax.sampling.generate import MAX_BATCH, bucket, check_sampling_options, generate, sample_uniforms
from vgpt_jax.training.saved_model import load_model


@dataclass(frozen=True)
class Samples:
    """Attributes: ``images`` ``[M, H, W, 3]`` float32 in 0..1; ``token_ids`` ``[M, *token_shape]`` int32; ``labels`` ``[M]``
    int32, -1 where unconditional; ``scores`` ``[M]`` float32, the classifier's softmax score of the label, None without one."""

    images: np.ndarray
    token_ids: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


class CondVisualGPT:
    """A class-conditional generator of pictures.

    Args:
      tokenizer: turns token ids into pixels.
      gpt: writes token ids; must have been trained on this tokenizer's.
      class_names: in the order of the generator's classes.
      value_range: least and greatest value of the tokenizer's images.

    Raises:
      UserError: the two do not fit.
    """

    def __init__(self, tokenizer: Tokenizer, gpt: GPT, *, class_names: Sequence[str], value_range: Sequence[float]):
        for what, of_gpt, other in (
            ("codes", gpt.num_codes, tokenizer.num_codes),
            ("tokens a picture", gpt.num_tokens, tokenizer.num_tokens),
            ("classes", gpt.num_classes, len(class_names)),
        ):
            if of_gpt != other:
                raise UserError(f"the generator was built for {of_gpt} {what}, but is given {other}")
        self.tokenizer = tokenizer
        self.gpt = gpt
        self.class_names = tuple(class_names)
        self.value_range = tuple(value_range)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "CondVisualGPT":
        """Loads what `vgpt_jax.main` left in a workdir: ``DIR/tokenizer/model`` and ``DIR/generator/model``.

        Raises:
          UserError: one is missing or damaged, or the generator was trained on another tokenizer's ids.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"there is no folder {directory}: give the workdir of a finished training")
        tokenizer, of_tokenizer = load_model(directory / "tokenizer" / "model", "tokenizer")
        gpt, of_gpt = load_model(directory / "generator" / "model", "gpt")
        if of_gpt["tokenizer_fingerprint"] != of_tokenizer["fingerprint"]:
            raise UserError(
                f"the generator in {directory} was trained on the ids of tokenizer {of_gpt['tokenizer_fingerprint']}, "
                f"but the tokenizer there is {of_tokenizer['fingerprint']}: train the generator again, or restore its tokenizer"
            )
        return cls(tokenizer, gpt, class_names=of_gpt["class_names"], value_range=of_tokenizer["value_range"])

    def class_ids(self, cond: Sequence[str | int]) -> np.ndarray:
        """Class names (`find_class`) or indices to indices ``[M]`` int32.

        Raises:
          UserError: a name that fits no class or several, an index out of range.
        """
        ids = [find_class(c, self.class_names) if isinstance(c, str) else int(c) for c in cond]
        for index in ids:
            if not 0 <= index < len(self.class_names):
                raise UserError(f"class index {index} is not between 0 and {len(self.class_names) - 1}")
        return np.array(ids, np.int32)

    def sample(
        self,
        cond: Sequence[str | int] | None = None,
        *,
        num: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float | None = None,
        seed: int = 0,
        classifier: nnx.Module | None = None,
    ) -> Samples:
        """Draws ``num`` pictures of each class of ``cond``, those of a class beside each other.

        Args:
          cond: class names or indices; None draws ``num`` pictures without a class, which a generator can that was
            trained with ``unconditional_share`` above 0.
          num: pictures of each.
          temperature: above 0; below 1 plays safe, above 1 takes risks.
          top_k: only the k most probable codes are drawn; 0: all.
          top_p: only the nucleus of that mass is drawn; None: all.
          seed: same seed, same pictures; picture number i of a call does not depend on how many follow it.
          classifier: images ``[B, H, W, 3]`` in the tokenizer's value range to logits over the same classes; its scores
            come with the samples.

        Raises:
          UserError: an option out of its range, a class that is not there.
        """
        check_sampling_options(
            temperature=temperature, top_k=top_k, top_p=top_p, num_codes=self.gpt.num_codes, seed=seed
        )
        if num < 1:
            raise UserError(f"num is {num}, but must be at least 1")
        labels = np.full(num, -1, np.int32) if cond is None else np.repeat(self.class_ids(cond), num)
        if not len(labels):
            raise UserError("no class was given: name at least one, or pass cond=None for pictures without a class")
        graph, state = nnx.split((self.gpt, self.tokenizer, classifier))
        options = {"temperature": temperature, "top_p": top_p if top_p is not None and top_p < 1 else None}
        parts = []
        for start in range(0, len(labels), MAX_BATCH):
            part = labels[start : start + MAX_BATCH]
            padding = (0, bucket(len(part)) - len(part))
            indices = np.pad(start + np.arange(len(part)), padding, mode="edge")
            drawn = _draw(
                graph,
                state,
                np.pad(part, padding, mode="edge"),
                indices,
                np.uint32(seed),
                self.value_range,
                options,
                top_k=top_k,
            )
            parts.append([None if x is None else np.asarray(x)[: len(part)] for x in drawn])
        token_ids, images, scores = (None if p[0] is None else np.concatenate(p) for p in zip(*parts, strict=True))
        return Samples(images, token_ids, labels, scores)


@functools.partial(jax.jit, static_argnames=("graph", "top_k"))
def _draw(graph, state, labels: Array, indices: Array, seed: Array, value_range, options: dict, *, top_k: int):
    """Ids, pixels and scores of a batch in one program: nothing but the result leaves the device."""
    gpt, tokenizer, classifier = nnx.merge(graph, state)
    conditions = jnp.where(labels < 0, gpt.begin_id, gpt.num_codes + labels)
    uniforms = sample_uniforms(seed, indices, gpt.num_tokens)
    token_ids = generate(gpt, conditions, uniforms, options["temperature"], options["top_p"], top_k=top_k)
    token_ids = token_ids.reshape(-1, *tokenizer.token_shape)
    low, high = value_range
    images = jnp.clip(tokenizer.decode(token_ids), low, high)
    scores = None
    if classifier is not None:
        scores = jax.nn.softmax(classifier(images), axis=-1)
        scores = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return token_ids, (images - low) / (high - low), scores
