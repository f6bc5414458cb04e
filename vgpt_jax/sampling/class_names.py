"""Finding the class that a user means."""

import re
from collections.abc import Sequence

from vgpt_jax.errors import UserError, close_names


def slug(name: str) -> str:
    """Lower case, "and" for "&", one underscore for every run of what is neither letter nor digit in any script."""
    return re.sub(r"[\W_]+", "_", name.casefold().replace("&", " and ")).strip("_")


def find_class(name: str, class_names: Sequence[str]) -> int:
    """The index of the class called ``name``: exactly, or as the only one that begins with it, or contains it.

    An exact name wins. Otherwise case, spaces and punctuation do not count.

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
