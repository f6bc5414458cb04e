"""Preparing a data set of tensorflow-datasets, from the network or from archives that are here already."""

import errno
import fcntl
import os
import shutil
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vgpt_jax.data.tfds_source import check_features, check_format, first_line, import_tfds, is_prepared, make_builder
from vgpt_jax.errors import UserError
from vgpt_jax.progress import clock, on_terminal

BY_HAND = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
"""Archives of data sets that nothing but the user can bring, and that the builder would go on without."""

PACKAGES = {"cv2": "opencv-python-headless"}
"""Where the index has a module under another name."""

QUIET_TENSORFLOW = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
"""The builders import tensorflow, which would greet every user with five lines of its own."""

MOST_LISTED = 8
SECONDS_BETWEEN_LINES = 10.0
SECONDS_TO_ANSWER = 20.0


def prepare(name: str, *, data_dir: str = "", manual_dir: str = "") -> Path:
    """Prepares a data set as array_record files, whole or not at all. Does nothing where that is done.

    Several processes may ask for it at once: one prepares it, the others wait.

    Args:
      name: as tensorflow-datasets has it.
      data_dir: where it is put, in a folder of its name. "": ``$TFDS_DATA_DIR``, or else ``~/tensorflow_datasets``.
      manual_dir: a folder with archives under their published names, which are then not downloaded. Archives that are not those
        published, by their checksum, are used all the same, with a warning. "": ``DATA_DIR/downloads/manual``.

    Returns:
      The folder of the prepared version.

    Raises:
      UserError: an unknown name, no pictures with labels, a ``manual_dir`` that is no folder, archives that are not here and
        cannot be downloaded, a package that is not installed, a folder that cannot be written, or a set that was prepared in
        another format.
    """
    for variable, value in QUIET_TENSORFLOW.items():
        os.environ.setdefault(variable, value)
    tfds = import_tfds()
    builder = make_builder(name, data_dir)
    check_features(name, builder.info.features)
    root = Path(os.fspath(builder.data_dir_root)).expanduser()
    archives = Path(manual_dir).expanduser() if manual_dir else root / "downloads" / "manual"
    if manual_dir and not archives.is_dir():
        raise UserError(f"data.manual_dir {manual_dir!r} is not a folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f".{builder.name}.lock"):
            if is_prepared(builder):
                return Path(check_format(name, builder))
            missing = [file for file in BY_HAND.get(builder.name, ()) if not (archives / file).is_file()]
            if missing:
                raise UserError(_needed(builder, archives, missing))
            print(f"preparing {name} in {builder.data_dir}", flush=True)
            _mend_downloads(builder, archives)
            # Emptied: what was unpacked before from archives of the same names would be taken for what is in these.
            extracted = root / f"{builder.name}.extracted"
            shutil.rmtree(extracted, ignore_errors=True)
            for unfinished in Path(os.fspath(builder.data_path)).parent.glob("incomplete.*"):
                shutil.rmtree(unfinished)
            try:
                with _shown(root, builder.name):
                    builder.download_and_prepare(
                        download_dir=os.fspath(root / "downloads"),
                        file_format="array_record",
                        download_config=tfds.download.DownloadConfig(
                            manual_dir=os.fspath(archives), extract_dir=os.fspath(extracted), try_download_gcs=False
                        ),
                    )
            finally:
                shutil.rmtree(extracted, ignore_errors=True)
    except UserError:
        raise
    except ImportError as error:
        package = _package_of(error)
        raise UserError(f"preparing {name} needs the package {package}: pip install {package}") from error
    except Exception as error:  # network, archives, disk and builder have kinds of their own
        if _is_of_the_network(error):
            raise UserError(f"{_needed(builder, archives)} ({first_line(error)[:200]})") from error
        if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) or _is_of_the_disk(error):
            raise UserError(f"{root} cannot be written ({error}): give another data.data_dir") from error
        raise UserError(f"{name} could not be prepared in {root} from {archives}: {first_line(error)}") from error
    return Path(os.fspath(builder.data_dir))


def _needed(builder, archives: Path, files: list[str] | None = None) -> str:
    """What the user has to put where: the files that are missing, by URL and name."""
    what = f"{builder.name} is neither prepared in {builder.data_dir_root} nor can it be downloaded"
    flag = f"in {archives}, or in a folder that --manual_dir (or data.manual_dir) names"
    if files is None:
        urls = {}
        for url, info in (builder.url_infos or {}).items():
            if info.filename and not (archives / info.filename).exists():
                urls.setdefault(info.filename, url)
        files = [f"{name} ({url})" for name, url in urls.items()]
    listed = ", ".join(files[:MOST_LISTED]) + (
        f" and {len(files) - MOST_LISTED} more" if len(files) > MOST_LISTED else ""
    )
    if listed:
        return f"{what}: put {listed} {flag}"
    instructions = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "its builder says not what it needs").split())
    return f"{what}: put its archives {flag}. {instructions}"


def _is_of_the_disk(error: Exception) -> bool:
    """Whether there is too little room, by the system or by the builder's own estimate."""
    return isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or "disk space" in str(error)
    )


def _package_of(error: ImportError) -> str:
    """What to install for an import that failed; the builder's own error, raised from it, has no name."""
    while error.name is None and isinstance(error.__cause__ or error.__context__, ImportError):
        error = error.__cause__ or error.__context__
    return PACKAGES.get(error.name, error.name or first_line(error))


def _is_of_the_network(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is a failed download, or a missing archive of the user's."""
    import requests
    from tensorflow_datasets.core.download.util import DownloadError

    kinds = (requests.exceptions.RequestException, ConnectionError, DownloadError)
    while error is not None:
        if isinstance(error, kinds) or isinstance(error, AssertionError) and "manual" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _mend_downloads(builder, archives: Path) -> None:
    """Changes two things in how a builder comes by its archives that it has no switch for.

    The user's own, whose checksum is not the one recorded, pass with a warning; what is downloaded is checked as before. And a
    host that does not answer is an error at once, where the builder would try for minutes.
    """
    import requests
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    make_manager = builder._make_download_manager
    answered, warned_of = set(), set()

    def make(**options):
        manager = make_manager(**options)
        check, download = manager._register_or_validate_checksums, manager._download

        def check_or_warn(*, url, url_info, path) -> None:
            try:
                check(url=url, url_info=url_info, path=path)
            except NonMatchingChecksumError:
                if Path(os.fspath(path)).parent != archives:
                    raise
                if path in warned_of:
                    return
                warned_of.add(path)
                print(
                    f"warning: {path} is not the archive that was published ({url}), and is used as it is",
                    file=sys.stderr,
                )

        def download_if_there(resource):
            host = urllib.parse.urlsplit(resource.url)
            if host.scheme in ("http", "https") and host.netloc not in answered:
                try:
                    requests.head(resource.url, timeout=SECONDS_TO_ANSWER)
                except requests.exceptions.RequestException as error:
                    raise ConnectionError(f"{host.netloc} does not answer") from error
                answered.add(host.netloc)
            return download(resource)

        manager._register_or_validate_checksums, manager._download = check_or_warn, download_if_there
        return manager

    builder._make_download_manager = make


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process is in this block for the same file; not on a file system that has no locks."""
    with lock.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _shown(root: Path, name: str) -> Iterator[None]:
    """Progress: the builder's own bars on a terminal; elsewhere a line now and then of how much there is on the disk."""
    if on_terminal():
        yield
        return
    tfds = import_tfds()
    tfds.disable_progress_bar()
    begun, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(SECONDS_BETWEEN_LINES):
            folders = (root / "downloads", root / f"{name}.extracted", root / name)
            size = sum(_size(p) for folder in folders for p in folder.rglob("*"))
            print(
                f"preparing {name}: {size / 1e6:.0f} MB, {clock(time.monotonic() - begun)}", file=sys.stderr, flush=True
            )

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    print(f"preparing {name}: done in {clock(time.monotonic() - begun)}", file=sys.stderr, flush=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # renamed or removed in the meantime
        return 0
