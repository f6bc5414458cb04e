"""Best of n, by a classifier or by any score."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.completion import Completion
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT, Samples
from vgpt_jax.sampling.program import ClassifierScore, Score
from vgpt_jax.sampling.request import Drawing
from vgpt_jax.training.saved_model import load_model


class ClassConditionedRejectionSampler:
    """Draws ``accept_n`` candidates for every picture, and keeps the one with the highest score.

    Args:
      model: draws the candidates.
      classifier: a module from images in the tokenizer's value range to logits over the model's classes, whose softmax score of
        the class counts; or a function `sampling.program.Score`, from images ``[B, H, W, 3]`` in 0..1 and labels ``[B]`` to
        scores ``[B]``, that JAX can trace (`jax.pure_callback` lets it call anything else).

    Raises:
      UserError: the classifier knows another number of classes.
    """

    def __init__(self, model: CondVisualGPT, classifier: nnx.Module | Score):
        self.model, self.classifier, self.score = model, classifier, classifier
        if isinstance(classifier, nnx.Module):
            size = model.tokenizer.image_size
            known = nnx.eval_shape(lambda c: c(np.zeros((1, size, size, 3), np.float32)), classifier)
            if known.shape[-1] != len(model.class_names):
                raise UserError(
                    f"the classifier knows {known.shape[-1]} classes, the generator {len(model.class_names)}"
                )
            self.score = ClassifierScore(classifier, model.value_range)

    @classmethod
    def from_pretrained(cls, directory: str | Path, mesh: Mesh | None = None) -> "ClassConditionedRejectionSampler":
        """Loads generator, tokenizer and classifier from a workdir of `vgpt_jax.main`.

        Raises:
          UserError: one is missing or damaged, or classifier and generator know other classes.
        """
        model = CondVisualGPT.from_pretrained(directory, mesh)
        classifier, metadata = load_model(Path(directory) / "classifier" / "model", "classifier")
        if tuple(metadata["class_names"]) != model.class_names:
            raise UserError(
                f"the classifier in {directory} was trained on other classes than the generator: train it again"
            )
        return cls(model, classifier)

    def sample(self, cond: Sequence[str | int] | None, *, num: int = 1, accept_n: int = 10, **options: Any) -> Samples:
        """Draws ``num`` pictures of each class, each the best of ``accept_n`` of its own.

        Args:
          cond: class names or indices; None: ``num`` pictures without a class, where a function scores.
          num: pictures kept of each class.
          accept_n: candidates for each picture. 1 keeps what comes.
          **options: ``completion``, and the options of `Drawing`.

        Raises:
          UserError: as `CondVisualGPT.sample`; or there is no class for the classifier to score.
        """
        return Samples.joined(list(self.stream(cond, num=num, accept_n=accept_n, **options)))

    def stream(
        self,
        cond: Sequence[str | int] | None,
        *,
        num: int = 1,
        accept_n: int = 10,
        completion: Completion | None = None,
        **options: Any,
    ) -> Iterator[Samples]:
        """`sample` in batches, for requests that do not fit into memory. Errors come at the call."""
        if cond is None and isinstance(self.classifier, nnx.Module):
            raise UserError("cond is None, but the classifier scores how much a picture is of its class: name one")
        return self.model.draw(
            self.model.labels(cond, num),
            Drawing.of(**options),
            accept_n=accept_n,
            score=self.score,
            completion=completion,
        )
