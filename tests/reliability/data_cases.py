"""Spoilt files that a user brings: pictures, archives, checkpoints of others, records; and what is remembered of them."""

import importlib.util
import shutil
import tarfile
from pathlib import Path

import numpy as np
from damage import CONTENTS, choice, files_in, spoil, spoil_json, write_hostile_picture
from house import SHORT, Case, House, sample_arguments, write_config, write_tar

TESTS = Path(__file__).resolve().parents[1]
CHECKPOINTS = {  # those of others that the readers are tested with: format, files, and what is given to the command
    "llamagen": ("golden/llamagen", ("vq_ds.pt", "c2i.pt", "config.json"), ("c2i.pt", "vq_ds.pt")),
    "taming": ("golden/taming", ("net2net.ckpt", "net2net.yaml"), ("net2net.ckpt", "net2net.yaml")),
    "visual_gpt": ("golden/visual_gpt_projected", ("tokenizer", "gpt", "id2label.json"), (".",)),
}


def _train_on(house: House, folder: Path, data: Path, what: str, rng: np.random.Generator) -> Case:
    """Trains the classifier for two steps on a folder of pictures or archives."""
    skip = bool(rng.random() < 0.5)
    fields = house.tiny | SHORT | {"data.name": "image_folder", "data.folder": str(data), "data.held_out_percent": 30}
    fields |= {"data.on_corrupt": "skip" if skip else "error", "stages": ("classifier",)}
    arguments = [write_config(folder, fields), f"--workdir={folder / 'run'}"]
    return Case(f"{what}, {fields['data.on_corrupt']}", "main", arguments, ("run", "cache"))


def picture_folder(house: House, folder: Path, rng: np.random.Generator) -> Case:
    data = shutil.copytree(house.folder / "pictures", folder / "pictures")
    stem = choice(rng, ("new", "new", "\u2603", "a\nb", "\udcff", "x" * 240, ".hidden", "-rf", "a b{}%s"))
    suffix = choice(rng, (".png", ".jpg", ".webp", ".JPEG", ".gif"))
    where = data / choice(rng, (".", "reds", "reds", "reds", "reds/deep", "greens", "\u2603 a\nb", "\udcff"))
    where.mkdir(exist_ok=True)
    if "re" not in where.name:
        (where / "whole.png").write_bytes(CONTENTS["png"]())
    path = where / f"{stem}{suffix}"
    case = _train_on(house, folder, data, f"{write_hostile_picture(rng, path)} in {where.name!r}", rng)
    if rng.random() < 0.1:
        shutil.rmtree(data / "reds")
        (data / "reds").symlink_to(choice(rng, ("reds", "..", ".", "/dev/null")))
        case.what = f"the folder reds is a link to {(data / 'reds').readlink()}"
    return case


def archive(house: House, folder: Path, rng: np.random.Generator) -> Case:
    path = folder / "archives" / choice(rng, ("folders.tar", "folders.zip", "labels.tar", "labels.tar"))
    path.parent.mkdir()
    shutil.copy(house.folder / "archives" / path.name, path)
    if path.name != "labels.tar" or rng.random() < 0.3:
        what = spoil(rng, path)
    else:
        with tarfile.open(path) as whole:
            contents = {m.name: whole.extractfile(m).read() for m in whole}
        victim = choice(rng, [name for name in contents if name.endswith(".cls")])
        label = choice(
            rng,
            (
                "999999999999",
                "9" * 4000,
                "-1",
                "nan",
                "",
                "\u2603",
                "[" * 10**5,
                "1.5",
                "true",
                "1\n2",
                '{"label": [1]}',
            ),
        )
        suffix = choice(rng, (".cls", ".json", ".txt"))
        del contents[victim]
        contents |= {Path(victim).stem + suffix: label.encode()}
        write_tar(path, contents)
        what = f"label {label!r:.30} in {suffix}"
        if rng.random() < 0.3:
            name = choice(rng, ("classes.txt", "class_names.json"))
            (path.parent / name).write_bytes(
                choice(rng, (b"", b"\xff\xfe\0", b"a", b"[1, 2", b"[" * 10**5, b"{}", b"7"))
            )
            what += f" and a strange {name}"
    return _train_on(house, folder, path if rng.random() < 0.5 else path.parent, what, rng)


def remembered_scan(house: House, folder: Path, rng: np.random.Generator) -> Case:
    """What the cache folder remembers, spoilt: the rendered emoji, and what was found in pictures and archives."""
    which = choice(rng, ("emoji", "pictures", "archives"))
    if which == "emoji":
        fields = house.tiny | SHORT | {"stages": ("classifier",)}
        path = next((folder / "cache").glob("emoji-*.npy"))
        case = Case(
            f"{spoil(rng, path)} of the cache", "main", [write_config(folder, fields), f"--workdir={folder / 'run'}"]
        )
        case.may_change = ("run", "cache")
        return case
    data = shutil.copytree(house.folder / which, folder / which)
    data = data / "folders.tar" if which == "archives" else data
    case = _train_on(house, folder, data, "", rng)
    from vgpt_jax.data.image_folder import load_image_folder
    from vgpt_jax.data.shards import find_shards, load_shards

    options = {"held_out_percent": 30, "cache_dir": str(folder / "cache")}
    if which == "archives":
        load_shards(find_shards(str(data)), **options)
    else:
        load_image_folder(str(data), **options)
    path = next((folder / "cache").glob("*scan-*.json"))
    whole = path.read_bytes()
    case.what = f"{spoil(rng, path)} of the cache"
    case.result = lambda: "" if path.is_dir() or path.read_bytes() == whole else "what is remembered was not mended"
    return case


def foreign_checkpoint(house: House, folder: Path, rng: np.random.Generator) -> Case:
    name = choice(rng, CHECKPOINTS)
    room, files, given = CHECKPOINTS[name]
    source = folder / "checkpoint"
    source.mkdir()
    for file in files:
        (shutil.copytree if (TESTS / room / file).is_dir() else shutil.copy)(TESTS / room / file, source / file)
    path = choice(rng, files_in(source))
    what = (spoil_json if path.suffix == ".json" and rng.random() < 0.6 else spoil)(rng, path) + f" of {name}"
    arguments = ["--format", name, *(str(source / g) for g in given), "--out", str(folder / "out")]
    return Case(what, "convert", arguments, ("out",))


def record(house: House, folder: Path, rng: np.random.Generator) -> Case:
    path = folder / "x.json"
    shutil.copy(house.drawn / "x.json", path)
    what = (spoil if rng.random() < 0.3 else spoil_json)(rng, path) + " of the record"
    more = ("--pick", choice(rng, ("0", "1", "-1", "7"))) if rng.random() < 0.4 else ()
    return Case(what, "sample", sample_arguments(house.run, folder / "out", "--again", str(path), *more), ("out",))


def completion(house: House, folder: Path, rng: np.random.Generator) -> Case:
    paths = [folder / "picture.png", folder / "mask.png"]
    for path in paths:
        path.write_bytes(CONTENTS["png"]())
    victim = choice(rng, paths)
    victim.unlink()
    what = write_hostile_picture(rng, victim)
    part = str(paths[1]) if victim == paths[1] else choice(rng, ("top", "left"))
    more = ("--cls_name", "flags", "--accept_n", "1", "--complete", str(paths[0]), "--keep", part)
    return Case(what, "sample", sample_arguments(house.run, folder / "out", *more), ("out",))


def prepared(house: House, folder: Path, rng: np.random.Generator) -> Case:
    """Archives of a data set that tensorflow-datasets is to prepare."""
    source = house.folder / "dogs"
    if not source.exists():
        made = importlib.util.spec_from_file_location("miniature_dogs", TESTS / "data" / "miniature_dogs.py")
        module = importlib.util.module_from_spec(made)
        made.loader.exec_module(module)
        module.make_miniature_dogs(source)
    shutil.copytree(source, folder / "dogs")
    what = f"{spoil(rng, choice(rng, files_in(folder / 'dogs')))} of the archives"
    arguments = ["--name", "stanford_dogs", "--data_dir", str(folder / "data"), "--manual_dir", str(folder / "dogs")]
    # What is unpacked beside an archive that is refused goes on for a moment, in threads of tensorflow-datasets.
    return Case(what, "prepare", arguments, ("data",), leaves="data/stanford_dogs.extracted")
