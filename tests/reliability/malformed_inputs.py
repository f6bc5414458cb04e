"""Hundreds of malformed inputs, each given to the command that reads it: none may hang, crash, or damage what was there.

    python tests/reliability/malformed_inputs.py --seed 0 --count 500

trains the suite's tiny config, then spoils one thing after the other by the seed: configs, command lines, checkpoints, metadata,
token caches, pictures, archives, checkpoints of others, records. Each command must end in time, either with status 0 (it was
harmless, or is recovered from) or with status 2, one line "error: ..." as its last and everything as it was. ``--only 17``
runs case 17 again and shows what it wrote; with ``--keep DIR``, which leaves everything in DIR, on the very same training, as
Orbax draws names for its files.
"""

import argparse
import collections
import hashlib
import os
import queue
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import numpy as np  # noqa: E402
from command_worker import Ended, Worker  # noqa: E402
from config_cases import command_line, config_file  # noqa: E402
from data_cases import (  # noqa: E402
    archive,
    completion,
    foreign_checkpoint,
    picture_folder,
    prepared,
    record,
    remembered_scan,
)
from house import Case, House, write_config  # noqa: E402
from run_cases import model_metadata, model_weights, token_cache, training_checkpoint, workdir_file  # noqa: E402

KINDS = {
    function.__name__: function
    for function in (
        config_file,
        command_line,
        model_weights,
        model_metadata,
        training_checkpoint,
        workdir_file,
        token_cache,
        picture_folder,
        archive,
        remembered_scan,
        foreign_checkpoint,
        record,
        completion,
        prepared,
    )
}
"""What there is of malformed inputs; the number of a case decides which of them it is."""

OUTCOMES = ("refused", "recovered", "harmless", "violation")
UNFINISHED = (".unfinished", ".converting-", "orbax-checkpoint-tmp", ".incomplete", ".partial")
LONGEST_MESSAGE = 1500
TIMEOUT = 240.0
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "PYTHONWARNINGS": "ignore",
    "PYTHONDONTWRITEBYTECODE": "1",  # beside a config, which is Python, lies nothing that was not there
}


@dataclass(frozen=True)
class Verdict:
    """What came of a case: ``outcome`` is one of `OUTCOMES`; ``problems``, what must not be, is empty but for "violation"."""

    number: int
    kind: str
    what: str
    outcome: str
    problems: list[str]
    ended: Ended


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder: the path of everything to its hash, the target of its link, or its type."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root, name)
            if path.is_symlink():
                what = f"link to {path.readlink()}"
            elif path.is_file():
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                what = "folder" if path.is_dir() else "neither file nor folder"
            found[str(path.relative_to(folder))] = what
    return found


def problems_of(case: Case, ended: Ended, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What a command must not have done."""
    if ended.status is None:
        return [f"it did not end in {ended.seconds:.0f} s"]
    found = []
    lines = ended.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.status not in (0, 2):
        found.append(f"it ended with status {ended.status}")
    if "Traceback (most recent call last)" in ended.err:
        found.append(f"a traceback, {lines[-1]:.200}" if ended.status else "a traceback though it went on")
    refused = ended.status != 0
    if ended.status == 2 and (len(errors) != 1 or lines[-1:] != errors):
        found.append(f"{len(errors)} lines of error, and the last line is {lines[-1] if lines else '':.200}")
    if ended.status == 2 and errors and len(errors[-1]) > LONGEST_MESSAGE:
        found.append(f"a message of {len(errors[-1])} characters")
    if ended.status == 2 and case.named and not any(name in ended.err for name in case.named):
        found.append(f"it does not name {' or '.join(case.named)}: {errors[-1] if errors else '':.200}")

    may_change = ("cache", case.leaves) if refused else ("cache", *case.may_change)
    touched = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    touched -= {p for p in touched if p.endswith("lock") or (p not in before and after[p] == "folder")}
    touched = {p for p in touched if not any(p == m or p.startswith(f"{m}/") for m in may_change)}
    if refused and case.moves:
        kept = set(after.values())
        touched = {p for p in touched if p in before and before[p] not in kept}
    for path in sorted(touched)[:5]:
        how = "changed" if path in before and path in after else "removed" if path in before else "left behind"
        found.append(f"{path} was {how}")
    left = [p for p in after.keys() - before.keys() if any(word in p for word in UNFINISHED)]
    left = [p for p in left if not p.startswith(case.leaves)]
    found += [f"{path} is unfinished" for path in sorted(left)[:3]]
    if ended.status == 0 and (wrong := case.result()):
        found.append(wrong)
    return found


def judge(case: Case, ended: Ended, before: dict[str, str], after: dict[str, str]) -> tuple[str, list[str]]:
    problems = problems_of(case, ended, before, after)
    if problems:
        return "violation", problems
    if ended.status == 2:
        return "refused", []
    told = any(word in ended.err for word in ("damaged", "skipped", "cannot be read", "left out", "moved", "could not"))
    written_again = any(
        p in after and p in before and after[p] != before[p] for p in before if p.startswith(("cache", "run/token"))
    )
    return ("recovered" if told or written_again else "harmless"), []


def kind_of(number: int) -> str:
    return list(KINDS)[number % len(KINDS)]


def make_case(house: House, folder: Path, seed: int, number: int) -> Case:
    """Makes a case in a new folder."""
    shutil.copytree(house.cache, folder / "cache")
    return KINDS[kind_of(number)](house, folder, np.random.default_rng([seed, number]))


def run_case(house: House, worker: Worker, folder: Path, seed: int, number: int, timeout: float) -> Verdict:
    """Makes a case in a new folder, runs it, and judges it."""
    case = make_case(house, folder, seed, number)
    before = contents(folder)
    ended = worker.run(f"vgpt_jax.{case.module}", case.arguments, {"VGPT_JAX_CACHE": str(folder / "cache")}, timeout)
    outcome, problems = judge(case, ended, before, contents(folder))
    return Verdict(number, kind_of(number), f"{case.module}: {case.what}", outcome, problems, ended)


def build_house(
    folder: Path, run: Path, cache: Path, tiny: dict, worker: Worker, whole: tuple[str, ...] = ("sample", "evaluate")
) -> House:
    """A house in ``folder``.

    Args:
      folder: new, or of such a house.
      run: workdir of the tiny config; what is not finished of it is trained.
      cache: folder for the rendered emoji, which is there.
      tiny: fields of the tiny config.
      worker: that runs commands.
      whole: those whose result on what is whole is needed.

    Raises:
      RuntimeError: a command fails that is given what is whole.
    """
    if not (run / "classifier" / "model").exists():
        _succeed(worker, "main", [write_config(folder, tiny), f"--workdir={run}"], cache)
    house = House(folder, run, cache, tiny)
    for module, arguments in house.commands().items():
        if module in whole:
            _succeed(worker, module, arguments, cache)
    return house


def _succeed(worker: Worker, module: str, arguments: list[str], cache: Path) -> None:
    ended = worker.run(f"vgpt_jax.{module}", arguments, {"VGPT_JAX_CACHE": str(cache)}, 600.0)
    if ended.status != 0:
        raise RuntimeError(f"{module} {arguments} ended with {ended.status}:\n{ended.err}")


def report(verdicts: list[Verdict], seed: int) -> str:
    """A table of the cases by kind and outcome, and every violation."""
    counts = collections.Counter((v.kind, v.outcome) for v in verdicts)
    rows = [("kind", *OUTCOMES, "longest, s")]
    for kind in [k for k in KINDS if any(v.kind == k for v in verdicts)]:
        longest = max(v.ended.seconds for v in verdicts if v.kind == kind)
        rows.append((kind, *(str(counts[kind, outcome]) for outcome in OUTCOMES), f"{longest:.0f}"))
    rows.append(("all", *(str(sum(v.outcome == o for v in verdicts)) for o in OUTCOMES), ""))
    lines = ["".join(f"{cell:<22}" if i == 0 else f"{cell:>12}" for i, cell in enumerate(row)) for row in rows]
    for v in verdicts:
        if v.problems:
            lines.append(f"--seed {seed} --only {v.number}: {v.kind}, {v.what!r}: {'; '.join(v.problems)}")
    return "\n".join(lines)


def _tiny() -> dict:
    import importlib.util

    spec = importlib.util.spec_from_file_location("suite", Path(__file__).resolve().parents[1] / "conftest.py")
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    return dict(suite.TINY)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500, help="cases; the kinds take turns")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="only the cases of these kinds")
    parser.add_argument("--only", type=int, nargs="+", help="only the cases of these numbers")
    parser.add_argument(
        "--keep", type=Path, help="folder for everything, which stays; a run in it is not trained again"
    )
    parser.add_argument("--workers", type=int, default=1, help="cases at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds until a command hangs")
    arguments = parser.parse_args()
    place = arguments.keep or Path(tempfile.mkdtemp(prefix="malformed-"))
    place = place.absolute()
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(place / "compiled")}
    first = Worker(place / "worker-house", environment)
    for folder in ("house/cache", "cases"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    house = build_house(place / "house", place / "house" / "run", place / "house" / "cache", _tiny(), first)
    first.close()

    numbers = arguments.only or [n for n in range(arguments.count) if kind_of(n) in arguments.kind]
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for number in numbers:
        waiting.put(number)
    verdicts: list[Verdict] = []

    def work(name: str) -> None:
        worker = Worker(place / f"worker-{name}", environment)
        while not waiting.empty():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                break
            folder = place / "cases" / str(number)
            shutil.rmtree(folder, ignore_errors=True)
            verdict = run_case(house, worker, folder, arguments.seed, number, arguments.timeout)
            verdicts.append(verdict)
            print(
                f"{number:4d} {verdict.outcome:<10}{verdict.ended.seconds:6.1f} s  {verdict.kind}: {verdict.what!r}",
                flush=True,
            )
            for problem in verdict.problems:
                print(f"     {problem!r}", flush=True)
            if arguments.only or verdict.problems:
                print(f"--- standard output\n{verdict.ended.out}--- standard error\n{verdict.ended.err}", flush=True)
            if not arguments.keep:
                shutil.rmtree(folder)
        worker.close()

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(work, map(str, range(arguments.workers))))
    print(report(sorted(verdicts, key=lambda v: v.number), arguments.seed))
    if not arguments.keep:
        shutil.rmtree(place)
    return int(any(v.problems for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
