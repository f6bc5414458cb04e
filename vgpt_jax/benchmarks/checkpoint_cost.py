"""What a checkpoint costs training: ``python -m vgpt_jax.benchmarks.checkpoint_cost``.

Takes steps of the stages of ``configs/emoji.py`` on random batches, as the loop does, and saves after every so many, more often
than any run would. Printed for each stage: how long `CheckpointStore.save` holds up the thread that trains, beside the time of a
step; and by how much longer the steps take while the checkpoint is written behind them, on processors that both share.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs import emoji
from vgpt_jax.benchmarks.emoji_runs import markdown_table
from vgpt_jax.command_line import CommandParser
from vgpt_jax.errors import check_range, exit_on_user_error
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.progress import progress
from vgpt_jax.training.checkpoint import CheckpointStore
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.training.stage import Program
from vgpt_jax.training.stages import STAGES

NUM_CLASSES = 9


def random_batch(program: Program) -> dict[str, jax.Array]:
    """A batch of the program's shapes: images in 0..1, ids and labels that every vocabulary has."""
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        floats = np.issubdtype(shape.dtype, np.floating)
        values = rng.random(shape.shape) if floats else rng.integers(0, NUM_CLASSES, shape.shape)
        return jax.device_put(values.astype(shape.dtype), shape.sharding)

    return {name: draw(shape) for name, shape in program.batch.items()}


def cost_of_saving(name: str, num_saves: int, every: int, directory: Path) -> dict[str, str]:
    """A row of the table, for one stage."""
    program = STAGES[name].program(emoji.get_config(), make_mesh(), NUM_CLASSES, directory)
    batch, state = random_batch(program), program.create()
    step = program.train_steps[max(program.train_steps)].lower(state, batch, None).compile()
    store = CheckpointStore(directory / name, keep=2)
    store.prepare(state)
    saves: list[float] = []
    rounds: dict[bool, list[float]] = {False: [], True: []}
    for number in progress(range(2 * num_saves + 2), name):
        saving = number % 2 == 1
        begun = time.perf_counter()
        if saving:
            before = time.perf_counter()
            store.save(state, {"position": number})
            saves.append(time.perf_counter() - before)
        for _ in range(every):
            state, metrics = step(state, batch, None)
            jax.device_get(metrics)
        rounds[saving].append(time.perf_counter() - begun)
    store.close()
    plain, beside = (1000 * float(np.median(rounds[saving][1:])) for saving in (False, True))
    held = 1000 * np.array(saves[1:])
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    return {
        "stage": name,
        "state, MB": f"{size:.1f}",
        "step, ms": f"{plain / every:.1f}",
        "save(), ms": f"{np.median(held):.2f}",
        "at most": f"{held.max():.2f}",
        "share of a step": f"{100 * np.median(held) * every / plain:.1f} %",
        f"{every} steps behind which it is written, ms more": f"{beside - plain:.0f}",
    }


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser: argparse.ArgumentParser = CommandParser("benchmarks.checkpoint_cost", __doc__)
    parser.add_argument("--saves", type=int, default=12, help="checkpoints of each stage (default 12)")
    parser.add_argument("--every", type=int, default=10, help="steps from one to the next (default 10)")
    arguments = parser.parse_args(argv)
    check_range("--saves", arguments.saves, least=2)
    check_range("--every", arguments.every, least=1)
    if not accelerator_is_installed():
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        rows = [cost_of_saving(name, arguments.saves, arguments.every, Path(directory)) for name in STAGES]
    print(markdown_table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
