"""Every quantizer on the same small tokenizer, under one budget: ``python -m vgpt_jax.benchmarks.quantizers --out DIR``.

Trains the VQ-VAE of ``configs/emoji.py`` with each variant for the same number of steps, from the same seed, on the same
batches, and writes ``DIR/table.md``, ``DIR/results.json`` and ``DIR/plot.png``. What is in ``results.json`` already, from the
same settings, is not run again, so a benchmark that is interrupted goes on where it was.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from vgpt_jax.benchmarks.emoji_runs import emoji_config, markdown_table, steps_of, typical
from vgpt_jax.errors import UserError, choose, exit_on_user_error
from vgpt_jax.files import written_whole
from vgpt_jax.training.from_config import abstract_tokenizer

PLAIN = {  # the codebook of the VQ-VAE paper: He's initialisation, gradient, nothing against collapse
    "vector_quantize.init_method": "kaiming",
    "vector_quantize.pretrain_steps": 0,
    "vector_quantize.replace_freq": 0,
    "vector_quantize.commitment_weight": 0.25,
    "vector_quantize.codebook_weight": 1.0,
    "vector_quantize.learning": "gradient",
}
BY_GRADIENT = {  # what keeps a codebook in use that learns by gradient
    "vector_quantize.init_method": "latent_random",
    "vector_quantize.pretrain_steps": 200,
    "vector_quantize.replace_freq": 50,
    "vector_quantize.commitment_weight": 0.05,
    "vector_quantize.codebook_weight": 0.2,
    "vector_quantize.learning": "gradient",
}
RECOMMENDED: dict = {}  # as configs/emoji.py has it: EMA, k-means after a warm start, LRU replacement


def vq(**options) -> dict:
    """The plain codebook and one thing more."""
    return PLAIN | {f"vector_quantize.{name}": value for name, value in options.items()}


def other(name: str, **options) -> dict:
    """A quantizer with a section of its own; a composed one is made of codebooks that learn by gradient and stay in use."""
    return BY_GRADIENT | {"tokenizer.quantizer": name} | {f"{name}.{key}": value for key, value in options.items()}


VARIANTS = {  # 512 codes each, or as near as the technique comes, but where tokens are several a position
    "plain": vq(),
    "cosine search": vq(cos_dist=True),
    "l2-normalised": vq(l2_norm=True),
    "random projection": vq(proj_dim=4, random_proj=True),
    "warm start, codes from latents": vq(init_method="latent_random", pretrain_steps=200),
    "k-means initialisation": vq(init_method="kmeans", pretrain_steps=200),
    "fixed codes": vq(init_method="fixed"),
    "LRU replacement": vq(replace_freq=50),
    "uniformity penalty": vq(penalty_weight=0.25),
    "entropy loss": vq(entropy_weight=0.1, entropy_temperature=1.0),
    "orthogonality loss": vq(orthogonality_weight=1.0),
    "EMA": vq(learning="ema"),
    "alternating optimisation": vq(learning="alternating"),
    "synchronized commitment": vq(sync_nu=0.2),
    "learned affine": vq(affine="learned"),
    "affine by statistics": vq(affine="statistics"),
    "rotation trick": vq(estimator="rotation"),
    "warm start, replacement": BY_GRADIENT,
    "the same, rotation trick": BY_GRADIENT | {"vector_quantize.estimator": "rotation"},
    "the same, affine by statistics": BY_GRADIENT | {"vector_quantize.affine": "statistics"},
    "recommended: EMA, k-means, replacement": RECOMMENDED,
    "SimVQ": other("simvq", num_codewords=512, embedding_dim=8),
    "IBQ": other("ibq", num_codewords=512, embedding_dim=8),
    "DiVeQ": other("diveq", num_codewords=512, embedding_dim=8, replace_freq=50),
    "FSQ": other("fsq", levels=(8, 8, 8)),
    "LFQ": other("lfq", num_bits=9, inverse_temperature=10.0),
    "BSQ": other("bsq", num_bits=9),
    "multi-head, 2": other("grouped_quantize", num_groups=2, shared_codebook=True),
    "grouped, 2": other("grouped_quantize", num_groups=2, shared_codebook=False),
    "residual, 2": other("residual_quantize", num_quantizers=2),
    "residual, 2, shared codes": other("residual_quantize", num_quantizers=2, shared_codebook=True),
    "residual, 4, quantizer dropout": other("residual_quantize", num_quantizers=4, quantizer_dropout=0.5),
    "multi-scale, 1 to 12": other("multi_scale_quantize", scales=(1, 2, 3, 4, 6, 8, 12)),
}


def run(name: str, num_steps: int, seed: int) -> dict[str, float]:
    """Trains a variant and measures it on the held-out emoji."""
    schedule = {"seed": seed, "tokenizer_training.num_steps": num_steps}
    config = emoji_config({"vector_quantize.num_codewords": 512} | VARIANTS[name] | schedule)
    tokenizer = abstract_tokenizer(config)
    seconds = []
    for last in steps_of(name, config):
        seconds.append(last.seconds)
    held_out = last.stage.evaluate(last.state).scalars
    return {
        "psnr": held_out["psnr"],
        "feature_distance": held_out["feature_distance"],
        "code_use": held_out["code_use"],
        "perplexity": held_out["perplexity"],
        "num_codes": tokenizer.num_codes,
        "num_tokens": tokenizer.num_tokens,
        "step_ms": typical(seconds),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown, in the order of `VARIANTS`."""
    return markdown_table(
        [
            {
                "quantizer": name,
                "codes": f"{r['num_codes']:.0f}",
                "tokens": f"{r['num_tokens']:.0f}",
                "PSNR, dB": f"{r['psnr']:.2f}",
                "feature distance": f"{r['feature_distance']:.3f}",
                "codes in use": f"{r['code_use']:.1%}",
                "perplexity": f"{r['perplexity']:.0f}",
                "step, ms": f"{r['step_ms']:.0f}",
            }
            for name, r in sorted(results.items(), key=lambda item: list(VARIANTS).index(item[0]))
        ]
    )


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """Bars: PSNR, codes in use and step time of each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in VARIANTS if name in results][::-1]
    bars = {"PSNR, dB": "psnr", "share of codes in use": "code_use", "perplexity": "perplexity", "step, ms": "step_ms"}
    figure, axes = plt.subplots(1, len(bars), figsize=(13, 1.2 + 0.25 * len(names)), sharey=True, layout="constrained")
    colours = [
        "tab:orange" if results[name]["num_tokens"] != results[names[-1]]["num_tokens"] else "tab:blue"
        for name in names
    ]
    for axis, (title, key) in zip(axes, bars.items(), strict=True):
        values = [results[name][key] for name in names]
        axis.barh(names, values, color=colours)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        if key == "psnr":
            axis.set_xlim(left=math.floor(min(values)) - 1)
    figure.suptitle("orange: another number of tokens a picture", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vgpt_jax.benchmarks.quantizers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table, the plot and the results")
    parser.add_argument("--steps", type=int, default=1500, help="of each training (default 1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="NAME", help="variants; default: all")
    arguments = parser.parse_args(argv)
    for name in arguments.only:
        choose("--only", name, VARIANTS)
    if arguments.steps < 250:
        raise UserError(f"--steps is {arguments.steps}, but must be at least 250: the warm starts take 200")

    arguments.out.mkdir(parents=True, exist_ok=True)
    store = arguments.out / "results.json"
    settings = {"steps": arguments.steps, "seed": arguments.seed}
    saved = json.loads(store.read_text()) if store.is_file() else {"settings": settings, "results": {}}
    if saved["settings"] != settings:
        raise UserError(f"{store} holds results of {saved['settings']}: give another --out, or delete it")
    results = saved["results"]
    for number, name in enumerate(arguments.only, 1):
        if name not in results:
            results[name] = run(name, arguments.steps, arguments.seed)
            with written_whole(store) as unfinished:
                unfinished.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
        found = results[name]
        print(
            f"{number}/{len(arguments.only)} {name}: {found['psnr']:.2f} dB, {found['code_use']:.1%} of the codes, "
            f"{found['step_ms']:.0f} ms a step",
            flush=True,
        )
    (arguments.out / "table.md").write_text(table(results) + "\n")
    plot(results, arguments.out / "plot.png")
    print(f"\n{table(results)}\n\nwritten: {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
