"""From a class to its GIF beside the same in PyTorch: ``python -m vgpt_jax.benchmarks.end_to_end``.

Draws candidates of a class (GPT-2 of 85M, 256 tokens, top-k 100), decodes them (VQ-GAN, 128 px), scores them (the convolutional
classifier), keeps the best and writes the GIF of its decoding, patch after patch, 256 frames: once with our sampler, once with
Hugging Face's ``generate``, PyTorch networks and imageio, with the same random weights and number of threads. The two take turns.
Compilation is not in the times: it is done once for each shape.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from vgpt_jax.data.transforms import to_uint8
from vgpt_jax.errors import exit_on_user_error
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.models.classifier import ConvClassifier
from vgpt_jax.models.gpt import GPT, SIZES
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.progress import progress
from vgpt_jax.sample import animation, layout
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT, Samples
from vgpt_jax.sampling.rerank import ClassConditionedRejectionSampler
from vgpt_jax.visualization.gif import save_gif

QUANTIZER = {"num_codewords": 4096, "embedding_dim": 12}
NUM_CLASSES = 120
WIDTHS = (32, 64, 128, 256)
TOP_K = 100
LABEL = 3


def vqgan(arguments: argparse.Namespace) -> dict:
    """The tokenizer's arguments but the quantizer's: a grid of 16x16."""
    levels = (1, 1, 2, 4)[: (arguments.image_size // 16).bit_length()]
    architecture = {"z_channels": 256, "ch": arguments.ch, "ch_mult": levels, "num_res_blocks": 2}
    return {"image_size": arguments.image_size, "architecture_args": architecture | {"attn_resolutions": (16,)}}


class Ours:
    """Our sampler with random weights; a call draws a picture, writes its GIF and returns the seconds of both parts."""

    def __init__(self, arguments: argparse.Namespace, path: Path):
        plain = QUANTIZER | {"pretrain_steps": 0, "penalty_weight": 0.0, "init_method": "kaiming"}
        tokenizer = Tokenizer(**vqgan(arguments), architecture="vqgan", quantizer_args=plain, rngs=nnx.Rngs(0))
        gpt = GPT(
            num_codes=tokenizer.num_codes,
            num_classes=NUM_CLASSES,
            num_tokens=tokenizer.num_tokens,
            **SIZES[arguments.size],
            rngs=nnx.Rngs(1),
        )
        classifier = ConvClassifier(num_classes=NUM_CLASSES, widths=WIDTHS, rngs=nnx.Rngs(2))
        names = [str(i) for i in range(NUM_CLASSES)]
        model = CondVisualGPT(tokenizer, gpt, class_names=names, value_range=(0.0, 1.0))
        self.sampler = ClassConditionedRejectionSampler(model, classifier)
        self.candidates, self.path = arguments.candidates, path

    def __call__(self, seed: int = 0) -> tuple[float, float]:
        begun = time.perf_counter()
        samples = self.sampler.sample([LABEL], accept_n=self.candidates, top_k=TOP_K, seed=seed)
        drawn = time.perf_counter()
        self.write(samples)
        return drawn - begun, time.perf_counter() - drawn

    def write(self, samples: Samples) -> None:
        num_tokens = self.sampler.model.gpt.num_tokens
        frames = animation(self.sampler.model, samples, "patches", 0, max_frames=num_tokens)
        save_gif(frames, self.path, palette_from=layout(to_uint8(samples.images, (0, 1))), num_frames=num_tokens)


class Theirs:
    """The PyTorch peer of `Ours`, with its weights."""

    def __init__(self, ours: Ours, arguments: argparse.Namespace, path: Path):
        import torch

        from vgpt_jax.benchmarks import torch_gpt, torch_networks, torch_pipeline
        from vgpt_jax.benchmarks.torch_tokenizer import copy_parameters

        torch.set_num_threads(arguments.threads)
        model = ours.sampler.model
        self.pipeline, self.sample, self.torch = torch_pipeline, torch_gpt.sample, torch
        self.gpt = torch_gpt.gpt2_like(model.gpt)
        self.tokenizer = torch_networks.Tokenizer(**vqgan(arguments), quantizer_args=QUANTIZER)
        self.classifier = torch_pipeline.Classifier(num_classes=NUM_CLASSES, widths=WIDTHS)
        copy_parameters(model.tokenizer, self.tokenizer)
        copy_parameters(ours.sampler.classifier, self.classifier)
        for network in (self.tokenizer, self.classifier):
            network.eval().to(memory_format=torch.channels_last)
        self.candidates, self.path, self.grid = arguments.candidates, path, model.tokenizer.grid
        self.condition, self.num_codes = model.gpt.num_codes + LABEL, model.gpt.num_codes

    def __call__(self, seed: int = 0) -> tuple[float, float]:
        self.torch.manual_seed(seed)
        begun = time.perf_counter()
        conditions = np.full(self.candidates, self.condition, np.int32)
        ids = self.sample(self.gpt, conditions, self.grid[0] * self.grid[1], TOP_K)
        ids = np.minimum(ids, self.num_codes - 1).reshape(-1, *self.grid)  # with random weights it writes classes too
        images, scores = self.decode_and_score(ids)
        best = to_uint8(images[np.argmax(scores)], (0, 1))
        drawn = time.perf_counter()
        self.pipeline.write_gif(best, self.grid, self.path)
        return drawn - begun, time.perf_counter() - drawn

    def decode_and_score(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images ``[B, H, W, 3]`` in 0..1 and scores ``[B]``."""
        ids = self.torch.from_numpy(token_ids).long()
        images, scores = self.pipeline.decode_and_score(self.tokenizer, self.classifier, ids, LABEL)
        return images.permute(0, 2, 3, 1).numpy(), scores.numpy()


def check(ours: Ours, theirs: Theirs) -> tuple[float, float]:
    """The greatest differences of the picture and of the score that both make of the same tokens."""
    samples = ours.sampler.sample([LABEL], accept_n=2, top_k=TOP_K)
    images, scores = theirs.decode_and_score(samples.token_ids)
    return float(np.abs(images - samples.images).max()), float(np.abs(scores - samples.scores).max())


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vgpt_jax.benchmarks.end_to_end", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--candidates", type=int, default=10, help="of which the best is kept (default 10)")
    parser.add_argument("--size", default="B", choices=SIZES, help="of the generator (default B)")
    parser.add_argument("--image_size", type=int, default=128, choices=(32, 64, 128), help="pixels (default 128)")
    parser.add_argument("--ch", type=int, default=64, help="channels of the decoder's widest level (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's; ours uses the process' cores (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both (default 3)")
    arguments = parser.parse_args(argv)
    if not accelerator_is_installed():
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.gif" for name in ("ours", "theirs")]
        ours = Ours(arguments, paths[0])
        theirs = Theirs(ours, arguments, paths[1])
        of_images, of_scores = check(ours, theirs)
        print(f"device: {jax.devices()[0].device_kind}")
        print(f"of the same tokens: images differ by {of_images:.1e}, scores by {of_scores:.1e}")
        ours(), theirs()
        seconds = np.array([[ours(seed), theirs(seed)] for seed in progress(range(1, arguments.rounds + 1), "timing")])
        sizes = [path.stat().st_size / 1000 for path in paths]
    medians = np.median(seconds, axis=0)  # [ours, theirs] x [drawing, GIF]
    for name, (drawing, gif), size in zip(("vgpt_jax", "PyTorch"), medians, sizes, strict=True):
        print(
            f"{name}: {drawing + gif:.2f} s; {arguments.candidates} candidates drawn, decoded and scored in {drawing:.2f} s, "
            f"GIF in {gif:.2f} s ({gif / (drawing + gif):.1%} of the whole, {size:.0f} kB)"
        )
    print(f"ratio, PyTorch over vgpt_jax: {medians[1].sum() / medians[0].sum():.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
