"""``python -m vgpt_jax.convert``: what it writes can be drawn with, and what is wrong leaves nothing behind and is one line."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from vgpt_jax import CondVisualGPT, convert
from vgpt_jax.pretrained.known import KNOWN
from vgpt_jax.pretrained.llamagen import read_llamagen
from vgpt_jax.training.saved_model import KINDS, read_metadata

GOLDEN = Path(__file__).parent / "golden"
LLAMAGEN, TAMING = GOLDEN / "llamagen", GOLDEN / "taming"
TOKENIZER, GENERATOR = str(LLAMAGEN / "vq_ds.pt"), str(LLAMAGEN / "c2i.pt")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """LlamaGen's golden files, converted. Not to be written to."""
    out = tmp_path_factory.mktemp("converted") / "a" / "model"
    convert.main(["--format", "llamagen", GENERATOR, TOKENIZER, "--out", str(out)])
    return out


@pytest.fixture
def error(error_of, tmp_path):
    """Runs the command line with ``--out`` in a fresh folder, and returns the one line that it says; nothing is left there."""

    def run(*arguments) -> str:
        line = error_of(lambda *a: convert.main(list(a)), *map(str, arguments), "--out", str(tmp_path / "x" / "out"))
        assert not (tmp_path / "x").exists()
        return line

    return run


def test_greedy_pictures_with_guidance_equal_llamagen(out):
    expected, model = np.load(LLAMAGEN / "expected.npz"), CondVisualGPT.from_pretrained(out)
    drawn = model.sample(expected["label"].tolist(), top_k=1, guidance=2.0)
    np.testing.assert_array_equal(drawn.token_ids.reshape(2, 64), expected["greedy_token_ids_cfg2"])
    assert model.class_names == tuple(f"class_{i}" for i in range(10))
    assert model.value_range == (-1.0, 1.0)


def test_the_weights_come_back_to_the_bit(out):
    model = CondVisualGPT.from_pretrained(out)
    for converted, loaded in zip(read_llamagen([LLAMAGEN]), (model.tokenizer, model.gpt), strict=True):
        states = (nnx.to_pure_dict(nnx.state(module)) for module in (converted.model, loaded))
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_what_is_written_says_where_it_is_from(out):
    assert sorted(path.name for path in out.iterdir()) == ["generator", "tokenizer"]
    tokenizer = read_metadata(out / "tokenizer" / "model", "tokenizer")
    generator = read_metadata(out / "generator" / "model", "gpt")
    assert tokenizer["source"] == {"format": "llamagen", "files": ["vq_ds.pt"]}
    assert generator["source"] == {"format": "llamagen", "files": ["c2i.pt", "config.json"]}
    assert generator["tokenizer_fingerprint"] == tokenizer["fingerprint"]
    assert generator["token_shape"] == [8, 8]


def test_one_after_the_other_and_the_command_to_draw_with(out, tmp_path, capsys):
    target = tmp_path / "my models"
    convert.main(["--format", "llamagen", TOKENIZER, "--image_size", "16", "--out", str(target)])
    first = capsys.readouterr().out
    assert "writing tokenizer: 321,195 parameters, 16x16 pixels as 8x8 tokens of 64 codes" in first
    assert "draw" not in first
    convert.main(["--format", "llamagen", GENERATOR, "--out", str(target)])
    second = capsys.readouterr().out
    assert (
        "writing generator: 141,120 parameters, 8x8 tokens of 64 codes, 10 classes (class_0, class_1, class_2, ...)"
        in second
    )
    assert f"--from_pretrained '{target}' --cls_name class_0 --classifier none" in second
    for room, kind in (("tokenizer", "tokenizer"), ("generator", "gpt")):
        assert read_metadata(target / room / "model", kind) == read_metadata(out / room / "model", kind)


def test_classes_with_names_of_imagenet_are_ranked_by_what_is_installed(tmp_path, capsys):
    convert.main(["--format", "visual_gpt", str(GOLDEN / "visual_gpt_projected"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.strip().endswith("--cls_name n02085936-maltese_dog")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["generator", "tokenizer"]


def test_what_is_there_is_not_replaced(out, tmp_path, error_of):
    target = tmp_path / "out"
    shutil.copytree(out, target)
    before = sorted(path for path in target.rglob("*"))
    run = lambda *a: convert.main(["--out", str(target), "--format", *a])  # noqa: E731
    assert f"{target}/tokenizer is there already: give another --out, or remove it" in error_of(
        run, "llamagen", TOKENIZER
    )
    assert f"{target}/generator is there already" in error_of(run, "llamagen", GENERATOR)
    assert sorted(path for path in target.rglob("*")) == before


def test_a_generator_needs_its_tokenizer(error, out, tmp_path, error_of):
    assert "a generator is of no use without its tokenizer" in error("--format", "llamagen", GENERATOR)
    line = error("--format", "llamagen", GENERATOR, TOKENIZER, "--image_size", "32")
    assert "writes 8x8 tokens of 64 codes, but the tokenizer given with it has 16x16 of 64" in line
    (tmp_path / "out").mkdir()
    shutil.copytree(out / "tokenizer", tmp_path / "out" / "tokenizer")
    (tmp_path / "c2i_384.pt").symlink_to(GENERATOR)
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    arguments = ["--format", "llamagen", str(tmp_path / "c2i_384.pt"), "--out", str(tmp_path / "out")]
    line = error_of(lambda *a: convert.main(list(a)), *arguments)
    assert f"writes 24x24 tokens of 64 codes, but the tokenizer in {tmp_path}/out has 8x8 of 64" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--format", "lamagen", TOKENIZER], "--format is 'lamagen': did you mean 'llamagen'?"),
        ([TOKENIZER], "visual_gpt: give one"),
        (["--format", "llamagen"], "PATH is needed"),
        (["--format", "llamagen", "nowhere.pt"], "there is no file or folder nowhere.pt, nor a public checkpoint"),
        (["--format", "llamagen", TOKENIZER, "--image_size", "0"], "--image_size is 0"),
        (["--format", "llamagen", "x" * 5000], "nor a public checkpoint of that name"),
        (["--format", "llamagen", "a\0b"], "nor a public checkpoint of that name"),
        (["--format", "llamagen", TOKENIZER, "--image_size", "100000"], "but must be at least 1 and at most 16384"),
        (["--format", "llamagen", TOKENIZER, "--image_size", "7"], "image_size 7 cannot be halved 1 times"),
        (["--format", "llamagen", TOKENIZER, "--size", "16"], "unrecognized arguments: --size 16"),
        (["--format", "taming", TOKENIZER], "there are no settings for"),
        (
            ["--format", "llamagen", str(TAMING / "net2net.ckpt")],
            "holds neither a tokenizer nor a generator of LlamaGen",
        ),
        (["--format", "llamagen", str(TAMING / "net2net.yaml")], "net2net.yaml is damaged, or no PyTorch checkpoint"),
        (["--format", "llamagen", str(TAMING)], "has no file that ends in .pt, .pth, .bin, .safetensors"),
        (["--format", "visual_gpt", str(LLAMAGEN)], "has no folder tokenizer"),
    ],
)
def test_what_is_wrong_is_one_line(error, arguments, named):
    assert named in error(*arguments)


class Harmful:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_nothing_in_a_file_is_run_and_a_truncated_one_is_refused(error, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "c2i.pt"
    torch.save({"model": {"tok_embeddings.weight": torch.ones(2), "x": Harmful(marker)}}, path)
    assert "wants posix.system to be called, which is not data" in error("--format", "llamagen", path)
    assert not marker.exists()
    path.write_bytes(Path(TOKENIZER).read_bytes()[:-1000])
    assert "c2i.pt is damaged, or no PyTorch checkpoint" in error("--format", "llamagen", path)


def test_an_out_that_cannot_be_written_is_one_line(error_of, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("n" * 300)):
        arguments = ["--format", "llamagen", TOKENIZER, "--out", str(out)]
        assert f"--out {out} cannot be written (" in error_of(lambda *a: convert.main(list(a)), *arguments)
    assert "--out is needed" in error_of(lambda *a: convert.main(list(a)), "--format", "llamagen", TOKENIZER)


def test_a_full_disk_is_one_line(error, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=2_000_000, free=300_000))
    line = error("--format", "llamagen", TOKENIZER, "--image_size", "16")
    assert "out cannot be written (1.3 MB are needed, but 0.3 MB are free)" in line


@pytest.mark.parametrize("metadata", ["[]", '{"kind": "tokenizer"}', "[" * 10**5])
def test_a_damaged_tokenizer_is_one_line(error_of, tmp_path, metadata):
    (tmp_path / "tokenizer" / "model").mkdir(parents=True)
    (tmp_path / "tokenizer" / "model" / "metadata.json").write_text(metadata)
    line = error_of(lambda *a: convert.main(list(a)), "--format", "llamagen", GENERATOR, "--out", str(tmp_path))
    assert "metadata.json " in line
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_if_one_room_cannot_be_moved_none_is(tmp_path, monkeypatch, error_of):
    rename = Path.rename

    def fail_at_last(self, target):
        if self.name == "tokenizer" and ".converting" in str(self.parent):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_last)
    line = error_of(
        lambda *a: convert.main(list(a)), "--format", "llamagen", str(LLAMAGEN), "--out", str(tmp_path / "out")
    )
    assert "cannot be written (No space left on device)" in line
    assert not (tmp_path / "out").exists()


def test_what_is_known_by_name_can_be_read_and_has_a_place():
    assert {known.format for known in KNOWN.values()} <= convert.FORMATS.keys()
    assert convert.ROOMS.keys() == KINDS.keys()


def test_a_public_checkpoint_by_name_comes_with_what_it_needs(tmp_path, monkeypatch, capsys):
    files = {"llamagen-vq-16": TOKENIZER, "llamagen-b-256": GENERATOR}
    fetched = []

    def fetch(name):
        fetched.append(name)
        return [Path(files[name])]

    monkeypatch.setattr(convert, "fetch_known", fetch)
    assert convert.files_of(["llamagen-b-256"], None, tmp_path) == ("llamagen", [Path(TOKENIZER), Path(GENERATOR)])
    assert fetched == ["llamagen-vq-16", "llamagen-b-256"]
    (tmp_path / "tokenizer").mkdir()
    assert convert.files_of(["llamagen-b-256"], None, tmp_path) == ("llamagen", [Path(GENERATOR)])
    convert.main(["--list"])
    assert "llamagen-vq-16" in capsys.readouterr().out
