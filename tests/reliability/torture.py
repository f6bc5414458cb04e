"""Disturbs a training at random moments until it is done, over and over; each time the end must be, bit for bit, what an
undisturbed run gives.

    python tests/reliability/torture.py --disturbances 30 --seed 0

It is killed (SIGKILL), told to stop (SIGTERM), killed and robbed of a piece of its newest checkpoint, and left without room on
its disk, a small tmpfs (for which one has to be allowed to mount). `test_torture.py` does some of it in the suite.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
STAGES = ("tokenizer", "generator", "classifier")
KINDS = ("kill", "terminate", "damage", "full_disk")
LONGEST = 240
"""Seconds after which a run that was disturbed must have ended."""

FIELDS = {  # every stage in seconds, with all that a checkpoint has to hold
    **{f"{stage}_training.num_steps": 120 for stage in STAGES},
    "logging.log_every": 1,
    "logging.eval_every": 60,
    "adversarial.discriminator": "patchgan",  # begins before step 47, is heard after it
    "adversarial.start": 30,
    "adversarial.warmup_steps": 40,
    "adversarial.ramp_steps": 20,
    "adversarial.lecam_weight": 0.01,
    "vector_quantize.learning": "ema",
    "vector_quantize.init_method": "kmeans",
    "patchgan.num_layers": 1,
    "patchgan.ndf": 8,
    "patchgan.spectral_norm": True,
    "tokenizer_training.ema_decay": 0.9,
}


@dataclass(frozen=True)
class Disturbance:
    """What is done to a run, and when.

    Attributes:
      kind: one of ``KINDS``.
      line: after the first line that begins so; "": after any.
      lines: after so many such lines.
      seconds: and then after so many seconds.
    """

    kind: str
    line: str = ""
    lines: int = 1
    seconds: float = 0.0


def command(overrides: dict) -> list[str]:
    """The command line of the small training, without its workdir."""
    fields = overrides | FIELDS
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "vgpt_jax.main", "--config=configs/emoji.py", *flags]


def run(
    arguments: list[str],
    workdir: Path,
    disturbance: Disturbance | None = None,
    seed: int = 0,
    environment: dict = ENVIRONMENT,
) -> tuple[str, list[str]]:
    """Runs the command, disturbed or not: how it ended ("done", "killed", "told", "refused") and what it printed.

    ``environment`` is added to this process's.

    Raises:
      AssertionError: it ended as it should not.
    """
    process = subprocess.Popen(
        [*arguments, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed: list[str] = []
    moment = threading.Event()

    def read() -> None:
        left = disturbance.lines if disturbance else 0
        for line in process.stdout:
            printed.append(line)
            if disturbance and left and line.startswith(disturbance.line):
                left -= 1
                if not left:
                    moment.set()
        moment.set()

    reader = threading.Thread(target=read)
    reader.start()
    filler = None
    try:
        if disturbance:
            if disturbance.lines:
                moment.wait(LONGEST)
            time.sleep(disturbance.seconds)
            filler = disturb(process, disturbance.kind, workdir)
        process.wait(LONGEST)
        reader.join()
    finally:
        process.kill()
        if filler is not None:
            filler.unlink(missing_ok=True)
    ends = {0: "done", 2: "refused", 75: "told", -signal.SIGKILL: "killed", -signal.SIGTERM: "killed"}
    ended, text = ends.get(process.returncode), "".join(printed[-20:])
    kind = disturbance.kind if disturbance else ""
    # SIGTERM kills where Python has not yet begun to listen to it.
    expected = {
        "": ("done",),
        "kill": ("killed",),
        "damage": ("killed",),
        "terminate": ("told", "killed"),
        "full_disk": ("refused",),
    }
    assert ended == "done" or ended in expected[kind], f"{kind}: status {process.returncode}\n{text}"
    if ended == "refused":
        assert printed[-1].startswith("error: "), text
    if kind == "damage" and ended == "killed":
        damage_newest_checkpoint(workdir, random.Random(seed))
    return ended, printed


def disturb(process: subprocess.Popen, kind: str, workdir: Path) -> Path | None:
    """Disturbs a run, if it has not ended; what it leaves is to be deleted when it has."""
    if kind == "full_disk":
        workdir.mkdir(exist_ok=True)
        filler = workdir.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size) == size:
                        pass
        return filler
    process.send_signal(signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
    return None


def damage_newest_checkpoint(workdir: Path, rng: random.Random) -> str:
    """Cuts, flips a bit of, or deletes a random file of the newest checkpoint of the stage under way: which, or ""."""
    steps = [
        path
        for path in workdir.glob("*/checkpoints/*")
        if path.name.isdigit() and not (path.parents[1] / "model").exists()
    ]
    if not steps:
        return ""
    newest = max(steps, key=lambda path: (path.parents[1].stat().st_mtime, int(path.name)))
    file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(file.read_bytes())
    how = rng.choice(("cut", "flipped", "deleted"))
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"{file.relative_to(workdir)} {how}"


def outcome(workdir: Path) -> dict[str, str]:
    """What has to be the same of two runs: of each stage the fingerprint of its weights, and its metrics."""
    found = {}
    for stage in STAGES:
        metadata = json.loads((workdir / stage / "model" / "metadata.json").read_text())
        found[f"{stage} weights"] = metadata["fingerprint"]
        found[f"{stage} metrics"] = (workdir / stage / "metrics.jsonl").read_text()
    return found


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """Makes ``folder`` a disk of its own of that size; False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def random_disturbance(rng: random.Random, kinds: Sequence[str]) -> Disturbance:
    """By the clock, while it starts, compiles or writes its token cache; or after some steps of whatever stage it is in."""
    kind = rng.choice(kinds)
    if rng.random() < 0.3:
        return Disturbance(kind, lines=0, seconds=rng.uniform(0.5, 20))
    return Disturbance(kind, lines=rng.randint(2, 60), seconds=rng.uniform(0, 0.3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturbances", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, help="folder for the workdirs (default: a temporary one, deleted at the end)"
    )
    asked = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import TINY

    base, rng = asked.keep or Path(tempfile.mkdtemp(prefix="torture")), random.Random(asked.seed)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(base / "compiled"))
    os.environ.setdefault("VGPT_JAX_CACHE", str(base / "cache"))
    arguments, counts, ends, runs, begun = command(TINY), Counter(), Counter(), 0, time.monotonic()
    with small_disk(base / "disk", 256) as is_small:
        kinds = KINDS if is_small else KINDS[:-1]
        if not is_small:
            print("no tmpfs can be mounted: the disk will not be full")
        run(arguments, base / "undisturbed")
        expected = outcome(base / "undisturbed")
        print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
        while sum(counts.values()) < asked.disturbances:
            workdir = base / "disk" / f"run{runs}"
            while True:
                enough = sum(counts.values()) >= asked.disturbances
                disturbance = None if enough else random_disturbance(rng, kinds)
                ended, printed = run(arguments, workdir, disturbance, seed=rng.randrange(2**32))
                last = next((line for line in reversed(printed) if "  step " in line), "before the first step")[
                    :30
                ].strip()
                if ended == "done":
                    break
                counts[disturbance.kind] += 1
                ends[ended] += 1
                print(f"{sum(counts.values()):3d}  {disturbance.kind:10s} {ended:8s} {last}", flush=True)
            found = outcome(workdir)
            wrong = [name for name in expected if found[name] != expected[name]]
            if wrong:
                sys.exit(f"run {runs} differs from the undisturbed one in {', '.join(wrong)}: {workdir}")
            print(f"run {runs}: all weights and metrics are those of the undisturbed run, to the bit", flush=True)
            shutil.rmtree(workdir)
            runs += 1
    kinds_shown = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    ends_shown = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    seconds = time.monotonic() - begun
    total = f"{sum(counts.values())} disturbances ({kinds_shown}; {ends_shown}) of {runs} runs in {seconds:.0f} s"
    print(f"{total}: none showed")
    if asked.keep is None:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
