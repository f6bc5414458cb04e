"""The house that malformed inputs are made in: everything there is whole, and what commands make of it is known.

A case has a folder of its own with copies of what it needs, one thing of which is spoilt.
"""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from damage import encoded, picture

STAGES = ("tokenizer", "generator", "classifier")
SHORT = {  # what makes any stage a matter of two steps
    f"{stage}_training.{name}": value
    for stage in STAGES
    for name, value in {"num_steps": 2, "batch_size": 4, "optimizer.warmup_steps": 1}.items()
} | {
    "vector_quantize.pretrain_steps": 1,
    "logging.log_every": 1,
    "logging.eval_every": 2,
    "logging.checkpoint_every": 2,
}


@dataclass
class Case:
    """A command and what it is given.

    Attributes:
      what: was done, in words.
      module, arguments: of vgpt_jax, and its command line.
      may_change: what of the case's folder a command that succeeds may write to, by the beginning of the path in it.
      leaves: beginning of the paths of what a command that refuses may leave behind, as the next one clears it away.
      moves: whether a command that refuses may move files that were there, which must be whole elsewhere.
      result: called after a success: what is wrong with what was written, or "".
      named: one of these must be in what is said of a refusal.
    """

    what: str
    module: str
    arguments: list[str]
    may_change: tuple[str, ...] = ()
    leaves: str = "cache/"
    moves: bool = False
    result: Callable[[], str] = field(default=lambda: "")
    named: tuple[str, ...] = ()


class House:
    """What cases are made from.

    Args:
      folder: the house.
      run: finished workdir of the suite's tiny config.
      cache: with its rendered emoji.
      tiny: fields of ``configs/emoji.py`` that the run was trained with.
    """

    def __init__(self, folder: Path, run: Path, cache: Path, tiny: dict):
        self.folder, self.run, self.cache, self.tiny = folder, run, cache, tiny
        for name in ("pictures", "archives"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        pictures = {
            f"{c}/{i}.{e}": (e, 10 * ord(c[0]) + i) for c in ("blues", "reds") for i in range(8) for e in ("png",)
        }
        pictures |= {"blues/a.jpg": ("jpeg", 1), "reds/b.webp": ("webp", 2)}
        contents = {name: encoded(picture(seed), kind.upper()) for name, (kind, seed) in pictures.items()}
        for name, content in contents.items():
            (folder / "pictures" / name).parent.mkdir(exist_ok=True)
            (folder / "pictures" / name).write_bytes(content)
        labelled = {
            f"{i:04d}.{kind}": x
            for i, x in enumerate(contents.values())
            for kind, x in (("png", x), ("cls", b"%d" % (i % 3)))
        }
        write_tar(folder / "archives" / "folders.tar", contents)
        write_tar(folder / "archives" / "labels.tar", labelled)
        with zipfile.ZipFile(folder / "archives" / "folders.zip", "w") as archive:
            for i, (name, content) in enumerate(contents.items()):
                archive.writestr(name, content, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
        self.drawn, self.measured = folder / "drawn", folder / "measured"

    def commands(self) -> dict[str, list[str]]:
        """What must run once, for what whole models draw and measure to be known."""
        shutil.copytree(self.run, self.measured, dirs_exist_ok=True)
        return {"sample": sample_arguments(self.run, self.drawn), "evaluate": evaluate_arguments(self.measured)}

    def copy_run(self, folder: Path) -> Path:
        return shutil.copytree(self.run, folder / "run")

    def tokens_differ(self, drawn: Path) -> str:
        mine, whole = (json.loads((p / "x.json").read_text())["pictures"] for p in (drawn, self.drawn))
        return "" if [p["token_ids"] for p in mine] == [p["token_ids"] for p in whole] else "other pictures than before"

    def figures_differ(self, run: Path) -> str:
        mine, whole = (json.loads((p / "evaluation" / "metrics.json").read_text()) for p in (run, self.measured))
        other = [
            name for name in mine.keys() | whole.keys() if "seconds" not in name and mine.get(name) != whole.get(name)
        ]
        return f"other figures than before: {', '.join(sorted(other))}" if other else ""

    def weights_differ(self, run: Path, stage: str) -> str:
        mine, whole = (json.loads((p / stage / "model" / "metadata.json").read_text()) for p in (run, self.run))
        return "" if mine["fingerprint"] == whole["fingerprint"] else f"the {stage} has other weights than before"


def write_config(folder: Path, fields: dict, lines: tuple[str, ...] = ()) -> str:
    """Writes a config of these fields, and some lines of Python behind them; returns the flag that names it."""
    (folder / "config.py").write_text(
        "from configs import emoji\n\n\ndef get_config():\n    config = emoji.get_config()\n"
        f"    config.update_from_flattened_dict({fields!r})\n"
        + "".join(f"    {line}\n" for line in (*lines, "return config"))
    )
    return f"--config={folder / 'config.py'}"


def write_tar(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def sample_arguments(run: Path, out: Path, *more: str) -> list[str]:
    return [
        "--from_pretrained",
        str(run),
        "--save_path",
        str(out / "x.gif"),
        *(more or ("--cls_name", "flags", "symbols", "--accept_n", "2")),
    ]


def evaluate_arguments(run: Path) -> list[str]:
    return ["--workdir", str(run), "--num", "1", "--accept_n", "2"]


def draw(house: House, folder: Path, run: Path, what: str, same: bool, named: tuple[str, ...] = ()) -> Case:
    """Draws with a spoilt run; where it can, what is drawn must be the ``same``."""
    result = (lambda: house.tokens_differ(folder / "out")) if same else (lambda: "")
    return Case(what, "sample", sample_arguments(run, folder / "out"), ("out",), result=result, named=named)


def measure(house: House, run: Path, what: str, same: bool, named: tuple[str, ...] = ()) -> Case:
    result = (lambda: house.figures_differ(run)) if same else (lambda: "")
    return Case(what, "evaluate", evaluate_arguments(run), ("run/evaluation",), result=result, named=named)


def resume(house: House, folder: Path, run: Path, stage: str, what: str, named: tuple[str, ...] = ()) -> Case:
    """Trains a stage whose model is taken out to its end again: its weights must be those that it had."""
    shutil.rmtree(run / stage / "model")
    arguments = [write_config(folder, house.tiny), f"--workdir={run}"]
    changed = (f"run/{stage}", "run/token_cache", "run/config.json", "run/lock")
    return Case(what, "main", arguments, changed, result=lambda: house.weights_differ(run, stage), named=named)
