"""Best of n by a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.training.saved_model import load_model


@dataclass(frozen=True)
class RankedSamples:
    """Attributes: ``images`` ``[M, H, W, 3]`` float32 in 0..1, the kept pictures; ``token_ids`` ``[M, h, w]`` int32;
    ``labels`` ``[M]`` int32; ``scores`` ``[M]`` float32 in 0..1, the classifier's softmax score of the label;
    ``candidate_scores`` ``[M, accept_n]``, those of all candidates; ``chosen`` ``[M]``, which candidate was kept."""

    images: np.ndarray
    token_ids: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    candidate_scores: np.ndarray
    chosen: np.ndarray


class ClassConditionedRejectionSampler:
    """Draws ``accept_n`` candidates for every picture, and keeps the one that the classifier is surest of.

    Args:
      model: draws the candidates.
      classifier: images in the tokenizer's value range to logits over the model's classes.

    Raises:
      UserError: the classifier knows another number of classes.
    """

    def __init__(self, model: CondVisualGPT, classifier: nnx.Module):
        known = nnx.eval_shape(
            lambda c: c(np.zeros((1, model.tokenizer.image_size, model.tokenizer.image_size, 3), np.float32)),
            classifier,
        )
        if known.shape[-1] != len(model.class_names):
            raise UserError(f"the classifier knows {known.shape[-1]} classes, the generator {len(model.class_names)}")
        self.model = model
        self.classifier = classifier

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "ClassConditionedRejectionSampler":
        """Loads generator, tokenizer and classifier from a workdir of `vgpt_jax.main`.

        Raises:
          UserError: one is missing or damaged, or classifier and generator know other classes.
        """
        model = CondVisualGPT.from_pretrained(directory)
        classifier, metadata = load_model(Path(directory) / "classifier" / "model", "classifier")
        if tuple(metadata["class_names"]) != model.class_names:
            raise UserError(
                f"the classifier in {directory} was trained on other classes than the generator: train it again"
            )
        return cls(model, classifier)

    def sample(self, cond: Sequence[str | int], *, num: int = 1, accept_n: int = 10, **options) -> RankedSamples:
        """Draws ``num`` pictures of each class, each the best of ``accept_n`` of its own.

        Args:
          cond: class names or indices.
          num: pictures kept of each class.
          accept_n: candidates for each picture. 1 keeps what comes.
          **options: ``temperature``, ``top_k``, ``top_p``, ``seed`` of `CondVisualGPT.sample`.

        Raises:
          UserError: as `CondVisualGPT.sample`.
        """
        if num < 1 or accept_n < 1:
            raise UserError(f"num is {num} and accept_n {accept_n}, but both must be at least 1")
        drawn = self.model.sample(cond, num=num * accept_n, classifier=self.classifier, **options)
        scores = drawn.scores.reshape(-1, accept_n)
        chosen = np.argmax(scores, axis=1)
        kept = np.arange(len(chosen)) * accept_n + chosen
        return RankedSamples(
            drawn.images[kept], drawn.token_ids[kept], drawn.labels[kept], drawn.scores[kept], scores, chosen
        )
