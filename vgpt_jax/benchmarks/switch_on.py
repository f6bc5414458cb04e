"""What the discriminator does to reconstructions when it begins: ``python -m vgpt_jax.benchmarks.switch_on --out DIR``.

Trains the tokenizer of ``configs/emoji.py`` with the perceptual loss, switches the discriminator on, and prints by how much
the PSNR of the held-out emoji falls at most in the 500 steps after, from its highest since the switch: with the recommended
warm-up and ramp, and with a discriminator that is heard from its first step as in taming-transformers. Writes a table and a
plot.
"""

import argparse
import sys
from pathlib import Path

from vgpt_jax.benchmarks.emoji_runs import emoji_config, markdown_table, steps_of
from vgpt_jax.errors import check_range, exit_on_user_error
from vgpt_jax.visualization.grid import save_png
from vgpt_jax.visualization.plots import plot_curves

COMMON = {
    "perceptual.name": "efficientnet",
    "perceptual.weight": 0.1,
    "adversarial.discriminator": "patchgan",
    "adversarial.weight": 0.8,
    "adversarial.optimizer.learning_rate": 1e-3,
    "adversarial.optimizer.b1": 0.5,
    "patchgan.ndf": 32,
    "patchgan.num_layers": 2,
    "tokenizer_training.reconstruction": "l1",
    "tokenizer_training.optimizer.schedule": "constant",
}
SETTINGS = {
    "heard at once": COMMON | {"adversarial.warmup_steps": 0, "adversarial.ramp_steps": 0},
    "recommended": COMMON | {
        "adversarial.warmup_steps": 100,
        "adversarial.ramp_steps": 200,
        "adversarial.weight": 0.2,
        "adversarial.lecam_weight": 0.01,
        "patchgan.norm": "group",
        "tokenizer_training.ema_decay": 0.99,
    },
}  # fmt: skip
WATCHED = 500  # steps after the discriminator has begun
EVALUATE_EVERY = 50


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vgpt_jax.benchmarks.switch_on", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the table, the plot and the pictures")
    parser.add_argument("--start", type=int, default=1000, help="step at which the discriminator begins (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    check_range("--start", arguments.start, least=300)
    rows, quality, distance = [], {}, {}
    for name, overrides in SETTINGS.items():
        schedule = {"tokenizer_training.num_steps": arguments.start + WATCHED, "adversarial.start": arguments.start}
        config = emoji_config(overrides | schedule | {"seed": arguments.seed})
        quality[name], distance[name], weight = [], [], 0.0
        for run in steps_of(name, config):
            weight = run.metrics.get("adversarial_weight", weight)
            if run.step >= arguments.start // 2 and run.step % EVALUATE_EVERY == 0:
                found = run.stage.evaluate(run.state)
                quality[name].append((run.step, found.scalars["psnr"]))
                distance[name].append((run.step, found.scalars["feature_distance"]))
        save_png(found.pictures["reconstructions"], arguments.out / f"{name.replace(' ', '_')}.png")
        since = [psnr for step, psnr in quality[name] if step >= arguments.start]
        before, least = since[0], min(since[1:])
        fell = max(max(since[: i + 1]) - psnr for i, psnr in enumerate(since))
        rows.append(
            {
                "discriminator": name,
                "PSNR before, dB": f"{before:.2f}",
                f"least in {WATCHED} steps": f"{least:.2f}",
                "greatest fall, dB": f"{fell:.2f}",
                "PSNR at the end": f"{quality[name][-1][1]:.2f}",
                "feature distance before": f"{dict(distance[name])[arguments.start]:.3f}",
                "at the end": f"{distance[name][-1][1]:.3f}",
            }
        )
        print(
            f"{name}: PSNR fell by at most {fell:.2f} dB; {before:.2f} dB before; adversarial weight {weight:.3f}",
            flush=True,
        )
    (arguments.out / "table.md").write_text(markdown_table(rows) + "\n")
    plot_curves({"held-out PSNR, dB": quality, "held-out feature distance": distance}, arguments.out / "plot.png")
    print(f"\n{markdown_table(rows)}\n\nwritten: {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
