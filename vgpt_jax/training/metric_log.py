"""Where metrics go: ``metrics.jsonl`` (one line a step that is logged), TensorBoard, and Weights & Biases if asked for."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from vgpt_jax.errors import UserError
from vgpt_jax.files import written_whole

JSONL = "metrics.jsonl"


class MetricLog:
    """Writes metrics of one stage.

    Args:
      directory: of the stage.
      start_step: steps done; lines of later steps, which a killed run left behind, are dropped.
      wandb_project: "": none.
      config: what Weights & Biases is told of the run.

    Attributes:
      tensorboard: clu's writer; what differs between equal runs, as speed does, goes there alone.

    Raises:
      UserError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, directory: Path, start_step: int, wandb_project: str = "", config: Mapping | None = None):
        from clu import metric_writers  # imports tensorflow: seconds

        self._path = Path(directory) / JSONL
        kept = [line for line in read_metrics(directory) if line["step"] <= start_step]
        with written_whole(self._path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self.tensorboard = metric_writers.AsyncWriter(
            metric_writers.SummaryWriter(str(Path(directory) / "tensorboard"))
        )
        self._wandb = None
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "logging.wandb_project is set, but wandb is not installed: pip install 'vgpt-jax[wandb]'"
                ) from None
            identity = Path(directory) / "wandb_id"  # a run that is resumed goes on in the same curves
            if not identity.is_file():
                identity.write_text(secrets.token_hex(4))
            self._wandb = wandb.init(
                project=wandb_project,
                id=identity.read_text(),
                resume="allow",
                name=Path(directory).name,
                dir=str(directory),
                config=dict(config or {}),
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step everywhere."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        self.tensorboard.write_scalars(step, dict(scalars))
        if self._wandb:
            self._wandb.log(dict(scalars), step=step)

    def write_pictures(self, step: int, pictures: Mapping) -> None:
        """Writes pictures ``[H, W, 3]`` uint8 by name to TensorBoard."""
        if pictures:
            self.tensorboard.write_images(step, {name: picture[None] for name, picture in pictures.items()})

    def close(self) -> None:
        self._file.close()
        self.tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(directory: Path) -> list[dict]:
    """The lines of a stage's ``metrics.jsonl`` as dicts; a last line that was cut off is left out."""
    path = Path(directory) / JSONL
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> (step, value) pairs, from ``metrics.jsonl``."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(directory):
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, []).append((line["step"], value))
    return found
