"""Fetches a file over HTTP, once: resumable, checked, there whole or not at all."""

import hashlib
import http.client
import math
import sys
import urllib.error
import urllib.request
from pathlib import Path

from vgpt_jax.errors import UserError
from vgpt_jax.progress import progress

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte


def fetch(url: str, path: Path, sha256: str | None, size: int | None = None) -> Path:
    """``path``, fetched from ``url`` unless it is there.

    What a broken connection leaves is kept beside it as ``NAME.partial``, and the next call goes on from there. Processes
    that fetch the same file at once do not disturb each other: each writes the same bytes to the same places.

    Args:
      url: of the file.
      path: where it belongs; folders on the way are made.
      sha256: 64 hexadecimal digits, of the whole file. None where nobody has published them: then only the length is checked,
        nothing tells a file that was changed at its source from the one that was meant, and the digits of what came are
        printed.
      size: of the whole file, in bytes; None: as the server says.

    Raises:
      UserError: there is no network, the connection broke, the folder cannot be written to, or the file that came or was
        there is another. The message says where to put which file.
    """
    remedy = f"run this again to go on, or get {url} by other means and put it at {path}"
    if path.is_file():
        if how := _difference(path, sha256, size):
            raise UserError(f"{path} is not the file that {url} is (by its {how}): delete it")
        return path
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        stated = _continue(url, partial)
        if how := _difference(partial, sha256, stated if size is None else size):
            partial.unlink()
            raise UserError(f"what came from {url} is not the file that was expected (by its {how}): {remedy}")
        if sha256 is None:
            print(
                f"{path.name}: SHA-256 {sha256_of(partial)}, not checked: none is published",
                file=sys.stderr,
                flush=True,
            )
        partial.replace(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if path.is_file():  # another process was done first and has moved it
            return fetch(url, path, sha256, size)
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{path.name} could not be fetched ({reason}): {remedy}") from error
    return path


def sha256_of(path: Path) -> str:
    """64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(path: Path, sha256: str | None, size: int | None) -> str:
    """By what the file is another than it should be; "" where it is not, as far as can be told."""
    if sha256 is not None:  # it tells more than the length does
        return "SHA-256" if sha256_of(path) != sha256 else ""
    return "length" if size is not None and path.stat().st_size != size else ""


def _continue(url: str, partial: Path) -> int | None:
    """Brings ``partial`` to its full length.

    Returns:
      The length of the whole file, in bytes, if the server says it.

    Raises:
      OSError: it did not get there.
    """
    start = partial.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # nothing is left, or it is no part of this file, as its hash or its length will tell
            stated = (error.headers["Content-Range"] or "").removeprefix("bytes */")
            return int(stated) if stated.isdigit() else None
        raise
    with response, partial.open("r+b") as file:
        if response.headers.get_content_type() == "text/html":
            raise ConnectionError("the server answers with a web page in place of the file")
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            file.seek(start)
        left = response.length
        if left is None:
            raise ConnectionError("the server does not say how long the file is")
        whole = file.tell() + left
        for _ in progress(range(math.ceil(left / CHUNK)), f"fetching {partial.name.removesuffix('.partial')} (MiB)"):
            chunk = response.read(min(CHUNK, left))
            file.write(chunk)
            left -= len(chunk)
        if left:
            raise ConnectionError("the connection broke")
        file.truncate()
    return whole
