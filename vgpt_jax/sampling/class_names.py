"""Finding the class that a user means, and the labels of a classifier that mean a class."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from vgpt_jax.errors import UserError, close_names
from vgpt_jax.imagenet import imagenet_class_names

WORDNET_ID = re.compile(r"(n\d{8})(?:[-_ ]+|$)")


def shown_name(name: str) -> str:
    """The name without the WordNet id that ImageNet's and Stanford Dogs' classes carry in front: ``n02085936-maltese_dog``. Of an
    id alone, as folders of ImageNet are called, its class's name."""
    found = WORDNET_ID.match(name)
    return name[found.end() :] or _imagenet_names().get(found[1], name) if found else name


@functools.cache
def _imagenet_names() -> dict[str, str]:
    return dict(name.split("-", 1) for name in imagenet_class_names())


def slug(name: str) -> str:
    """`shown_name` in lower case, "and" for "&", one underscore for every run of what is no letter and no digit in any script."""
    return re.sub(r"[\W_]+", "_", shown_name(name).casefold().replace("&", " and ")).strip("_")


def find_class(name: str, class_names: Sequence[str]) -> int:
    """The index of the class called ``name``: exactly, or as the only one that begins with it, or contains it.

    An exact name wins. Otherwise case, spaces, punctuation and WordNet ids do not count.

    Raises:
      UserError: no class or several fit; the message names the close ones.
    """
    if name in class_names:
        return list(class_names).index(name)
    slugs = [slug(c) for c in class_names]
    wanted = slug(name)
    for fits in (str.__eq__, str.startswith, str.__contains__):
        found = [i for i, s in enumerate(slugs) if wanted and fits(s, wanted)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"class name {name!r} fits {len(found)} classes: {', '.join(class_names[i] for i in found[:10])}"
            )
    raise UserError(f"there is no class {name!r}: {close_names(wanted, slugs)}")


def matching_labels(class_names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Which of a classifier's labels mean each class.

    Those with its WordNet id, where both have one. Else those of the same name; else those that begin with it, "poodle" having
    three; else the longest that it begins with. All as `slug` spells them, and whole words.

    Args:
      class_names: C of them.
      labels: L of them.

    Returns:
      ``[C, L]`` bool; a row without any is of a class that the classifier does not know.
    """
    ids, slugs = [_wordnet_id(label) for label in labels], [slug(label) for label in labels]
    matches = np.zeros((len(class_names), len(labels)), bool)
    for row, name in zip(matches, class_names, strict=True):
        wordnet_id, wanted = _wordnet_id(name), slug(name)
        if wordnet_id and wordnet_id in ids:
            row[:] = [other == wordnet_id for other in ids]
            continue
        row[:] = [s == wanted for s in slugs]
        if not row.any():
            row[:] = [s.startswith(f"{wanted}_") for s in slugs]
        if not row.any():
            beginnings = [s for s in slugs if s and wanted.startswith(f"{s}_")]
            row[:] = [s == max(beginnings, key=len, default=None) for s in slugs]
    return matches


def class_key(name: str) -> str:
    """The same for two names of one class: its WordNet id, or else its `slug`."""
    return _wordnet_id(name) or slug(name)


def _wordnet_id(name: str) -> str:
    found = WORDNET_ID.match(name)
    return found[1] if found else ""
