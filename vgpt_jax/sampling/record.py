"""The record of what was drawn, as JSON: enough to make any picture of it again."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vgpt_jax.errors import UserError
from vgpt_jax.files import written_whole
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT, Samples
from vgpt_jax.sampling.request import Drawing


@dataclass(frozen=True)
class Record:
    """What a request asked for and what came.

    Attributes:
      settings: from the command line: the model, the number of candidates, what was completed.
      drawing: how.
      pictures: one for each, with ``class``, ``label``, ``index`` (its number among all candidates), ``score``, ``chosen``
        (which of its candidates it was), ``candidate_scores`` and ``token_ids``.
    """

    settings: dict[str, Any]
    drawing: Drawing
    pictures: list[dict[str, Any]]

    def add(self, model: CondVisualGPT, samples: Samples) -> None:
        """Appends pictures."""
        for i, label in enumerate(samples.labels):
            picture = {
                "class": model.class_names[label] if label >= 0 else None,
                "label": int(label),
                "index": int(samples.indices[i]),
            }
            if samples.scores is not None:
                picture |= {
                    "score": float(samples.scores[i]),
                    "chosen": int(samples.chosen[i]),
                    "candidate_scores": samples.candidate_scores[i].tolist(),
                }
            self.pictures.append(picture | {"token_ids": samples.token_ids[i].tolist()})

    def write(self, path: Path) -> None:
        """Writes the record, whole or not at all."""
        text = json.dumps({"settings": self.settings, "drawing": asdict(self.drawing), "pictures": self.pictures})
        with written_whole(path) as partial:
            partial.write_text(text + "\n")


def read_record(path: Path) -> Record:
    """Reads what `Record.write` wrote.

    Raises:
      UserError: it is not there, or is no such record.
    """
    try:
        found = json.loads(path.read_text())
        settings, drawing, pictures = found["settings"], Drawing.of(**found["drawing"]), list(found["pictures"])
        drawing = replace(
            drawing, **{field.name: field.type(getattr(drawing, field.name)) for field in fields(drawing)}
        )
        settings.update({name: settings[name] for name in ("complete", "keep")})
        for picture in pictures:
            picture.update(label=int(picture["label"]), index=int(picture["index"]), token_ids=picture["token_ids"])
    except OSError as error:
        raise UserError(f"there is no record {path} ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"there is no {error} in it" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no record of vgpt_jax.sample ({reason})") from error
    return Record(settings, drawing, pictures)
