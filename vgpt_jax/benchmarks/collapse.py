"""Codebook collapse from a bad start, and what prevents it: ``python -m vgpt_jax.benchmarks.collapse --out DIR``.

The tokenizer of ``configs/emoji.py`` begins with codes far from every latent (`far_codes`) and is trained for a few hundred
steps, once with a plain codebook and once with the recommended settings. Prints the share of the codes that the held-out
emoji use, and writes a plot of it over the steps.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp

from vgpt_jax.benchmarks.emoji_runs import emoji_config, markdown_table, steps_of
from vgpt_jax.benchmarks.quantizers import PLAIN, RECOMMENDED
from vgpt_jax.errors import exit_on_user_error
from vgpt_jax.training.tokenizer_step import TokenizerState
from vgpt_jax.visualization.plots import plot_curves

SETTINGS = {
    "plain": PLAIN,
    "with replacement": PLAIN | {"vector_quantize.replace_freq": 20},
    "EMA, with replacement": PLAIN | {"vector_quantize.replace_freq": 20, "vector_quantize.learning": "ema"},
    "recommended": RECOMMENDED,  # k-means at step 200 ends the bad start, if replacement has not
}
EVALUATE_EVERY = 25


def far_codes(state: TokenizerState) -> TokenizerState:
    """The state with its codes moved away from the origin, around which the latents begin, by 10 in every dimension."""
    for variables in (state.params, state.buffers):
        quantizer = variables.get("quantizer", {})
        for name in ("codebook", "ema_sums"):  # of one latent each, at first
            if name in quantizer:
                quantizer[name][...] = quantizer[name][...] + jnp.float32(10.0)
    return state


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vgpt_jax.benchmarks.collapse", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and the plot")
    parser.add_argument("--steps", type=int, default=300, help="of each training (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rows, use, quality = [], {}, {}
    for name, overrides in SETTINGS.items():
        config = emoji_config({"seed": arguments.seed, "tokenizer_training.num_steps": arguments.steps} | overrides)
        use[name], quality[name] = [], []
        for run in steps_of(name, config, start=far_codes):
            if run.step % EVALUATE_EVERY == 0 or run.step == arguments.steps:
                found = run.stage.evaluate(run.state).scalars
                if "code_use" in found:  # not during a warm start
                    use[name].append((run.step, found["code_use"]))
                quality[name].append((run.step, found["psnr"]))
        row = {"codebook": name, "codes in use": f"{found['code_use']:.1%}", "perplexity": f"{found['perplexity']:.0f}"}
        rows.append(row | {"PSNR, dB": f"{found['psnr']:.2f}"})
        print(f"{name}: {found['code_use']:.1%} of the codes in use after {arguments.steps} steps", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(markdown_table(rows) + "\n")
    plot_curves({"share of the codes in use": use, "PSNR, dB": quality}, arguments.out / "plot.png")
    print(f"\n{markdown_table(rows)}\n\nwritten: {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
