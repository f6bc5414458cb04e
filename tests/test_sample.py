"""The sampler's command line as a user types it: the files it writes, and one clear line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgpt_jax import sample
from vgpt_jax.sampling.completion import Completion
from vgpt_jax.sampling.request import Drawing

OPTIONS = ["--accept_n", "2", "--top_k", "20"]


@pytest.fixture
def draw(random_workdir, tmp_path):
    """Runs the command on ``random_workdir``; gives the record, with the GIF at ``tmp_path/NAME.gif``."""

    def run(*arguments: str, name: str = "out") -> dict:
        path = tmp_path / f"{name}.gif"
        sample.main(["--from_pretrained", str(random_workdir), "--save_path", str(path), *arguments])
        return json.loads(path.with_suffix(".json").read_text())

    return run


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_gif_grid_and_record(random_toy, toy_classifier, draw, tmp_path, capsys):
    line = ["--cls_name", "cats", "big", "--accept_n", "3", "--temperature", "1.3", "--top_k", "20", "--seed", "5"]
    record = draw(*line, "--z_shape", "4", "4", name="deep/out")
    assert [p["class"] for p in record["pictures"]] == ["Cats", "Big Dogs"]
    sampler = sample.ClassConditionedRejectionSampler(random_toy, toy_classifier)
    expected = sampler.sample(["cats", "big"], accept_n=3, temperature=1.3, top_k=20, seed=5)
    for i, picture in enumerate(record["pictures"]):
        np.testing.assert_array_equal(picture["token_ids"], expected.token_ids[i])
        np.testing.assert_allclose(picture["candidate_scores"], expected.candidate_scores[i], atol=1e-5)
        assert picture["score"] == max(picture["candidate_scores"]) == picture["candidate_scores"][picture["chosen"]]
        assert (picture["label"], picture["index"]) == (i, 3 * i + picture["chosen"])
    assert record["drawing"] == vars(Drawing(temperature=1.3, top_k=20, seed=5))
    assert record["settings"]["accept_n"] == 3 and record["settings"]["cls_name"] == ["cats", "big"]
    with Image.open(tmp_path / "deep" / "out.gif") as gif:
        assert gif.n_frames == 16  # one a token
        assert gif.size == (4 + 2 * 132, 136)  # side by side, 128 px each
    grid = read(tmp_path / "deep" / "out.png")
    picture = np.repeat(np.repeat(np.round(expected.images[1] * 255), 8, axis=0), 8, axis=1)
    np.testing.assert_allclose(grid[-132:-4, -132:-4], picture, atol=1)
    said = capsys.readouterr()
    assert said.out.count("best of 3") == 2 and "drawing: 2/2 done" in said.err
    assert not (tmp_path / "deep" / "out").exists()  # single files only where they are asked for


def test_the_same_line_writes_the_same_files(draw, tmp_path):
    for name in ("a", "b"):
        draw("--cls_name", "cats", *OPTIONS, "--order", "random", "--num_steps", "4", name=name)
    for suffix in (".gif", ".png", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_again_makes_the_same_pictures_of_their_indices_alone(draw, tmp_path, capsys):
    line = ["--cls_name", "cats", "big", *OPTIONS, "--num", "2", "--guidance", "2.5", "--guidance_schedule", "linear"]
    first = draw(*line)
    capsys.readouterr()
    again = draw("--again", str(tmp_path / "out.json"), name="again")
    assert "made again: 4 of 4 with the same tokens" in capsys.readouterr().out
    assert again["drawing"] == first["drawing"]
    picked = draw("--again", str(tmp_path / "again.json"), "--pick", "3", "0", name="picked")
    assert "made again: 2 of 2 with the same tokens" in capsys.readouterr().out
    for pictures, of_first in ((again["pictures"], [0, 1, 2, 3]), (picked["pictures"], [3, 0])):
        for picture, i in zip(pictures, of_first, strict=True):
            there = first["pictures"][i]
            assert [picture[n] for n in ("label", "index", "token_ids")] == [
                there[n] for n in ("label", "index", "token_ids")
            ]
            assert picture["score"] == pytest.approx(there["score"], abs=1e-5)
            assert len(picture["candidate_scores"]) == 1
    first["pictures"][1]["token_ids"][0][0] += 1
    (tmp_path / "other.json").write_text(json.dumps(first))
    draw("--again", str(tmp_path / "other.json"), name="again")
    assert "made again: 3 of 4 with the same tokens" in capsys.readouterr().out


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_a_picture_is_completed(random_toy, draw, picture, tmp_path, capsys):
    line = ["--complete", picture, "--keep", "top", *OPTIONS, "--num", "2", "--num_steps", "3"]
    record = draw("--cls_name", "cats", "big", *line)
    given = np.asarray(random_toy.tokenizer.encode(read(Path(picture))[None] / np.float32(127.5) - 1))[0]
    for completed in record["pictures"]:
        np.testing.assert_array_equal(completed["token_ids"][:2], given[:2])
    assert record["pictures"][0]["token_ids"] != record["pictures"][1]["token_ids"]
    grid = read(tmp_path / "out.png")
    margin = grid.shape[1] - (4 + 4 * 132)  # of the names, before the original, what is kept and two completions
    assert grid.shape[0] == 4 + 2 * 132 and margin > 0
    for row in (4, 136):
        original, kept = (grid[row : row + 128, margin + 4 + 132 * i :][:, :128] for i in (0, 1))
        np.testing.assert_array_equal(original[::8, ::8], read(Path(picture)))
        np.testing.assert_array_equal(kept[:64], original[:64])
        assert (kept[64:] == 200).all()
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames <= 8  # of the tokens that are not given; equal frames are one
    capsys.readouterr()
    draw("--again", str(tmp_path / "out.json"), name="again")
    assert "4 of 4 with the same tokens" in capsys.readouterr().out


def test_what_a_completion_keeps_is_shown_at_each_place():
    kept = np.array([[True, False], [False, False]])
    before = np.random.default_rng(0).random((64, 64, 3), np.float32)
    grid = sample.completion_grid(Completion(before, kept), np.zeros((3, 64, 64, 3), np.uint8), 3, [])
    shown = grid[4:132, 136:264]
    assert (shown[:64, 64:] == 200).all() and (shown[64:] == 200).all()
    np.testing.assert_array_equal(shown[:64:2, :64:2], np.round(before[:32, :32] * 255))
    assert (grid[4:132, 268:396] == 0).all()


def test_files(random_toy, draw, tmp_path):
    record = draw("--cls_name", "cats", "big", "--accept_n", "1", "--files")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["000000_cats.png", "000001_big_dogs.png"]
    images = random_toy.tokenizer.decode(np.array([p["token_ids"] for p in record["pictures"]]))
    for name, image in zip(names, images, strict=True):
        np.testing.assert_allclose(
            read(tmp_path / "out" / name), np.clip(np.asarray(image) * 127.5 + 127.5, 0, 255), atol=1
        )


def test_many_pictures_stream(draw, tmp_path, monkeypatch, capsys):
    """More than the grid and the GIF show, in several batches: each has a file, and the record has all."""
    monkeypatch.setattr("vgpt_jax.sampling.cond_visual_gpt.MAX_BATCH", 4)
    monkeypatch.setattr(sample, "IN_GRID", 6)
    monkeypatch.setattr(sample, "IN_GIF", 3)
    written = []
    monkeypatch.setattr(sample.Record, "write", lambda self, path, write=sample.Record.write: (
        written.append(len(self.pictures)), write(self, path)
    ))  # fmt: skip
    record = draw("--cls_name", "cats", "big", "--num", "5", "--accept_n", "1", "--top_k", "20")
    assert written == [4, 8, 10]
    assert [p["index"] for p in record["pictures"]] == list(range(10))
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"{i:06d}_{'cats' if i < 5 else 'big_dogs'}.png" for i in range(10)]
    grid = read(tmp_path / "out.png")
    assert grid.shape[0] == 4 + 2 * 132  # five cats and one dog
    assert (grid[4 + 132 :, -132:] == 255).all()
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.width == 4 + 3 * 132
    said = capsys.readouterr().out
    assert said.count("best of 1") == 3 and "mean score of 10" in said


def test_both_views_stand_one_above_the_other(draw, tmp_path):
    heights = {}
    for view in sample.VIEWS:
        draw("--cls_name", "cats", "--accept_n", "1", "--order", "random", "--view", view, name=view)
        heights[view] = Image.open(tmp_path / f"{view}.gif").height
    assert heights == {"decoding": 136, "patches": 136, "both": 272}


def test_frames_of_patches_follow_each_pictures_order(random_toy):
    samples = random_toy.sample([0, 1], order="random")
    frames = list(sample.animation(random_toy, samples, "patches", 0))
    assert len(frames) == 16
    for i, frame in enumerate(frames):
        for picture in range(2):
            cells = frame[4:132, 4 + 132 * picture :][:, :128].reshape(4, 32, 4, 32, 3)
            shown = (cells != 255).any(axis=(1, 3, 4)).ravel()
            np.testing.assert_array_equal(np.sort(samples.orders[picture, : i + 1]), np.flatnonzero(shown))


def test_what_is_given_is_there_from_the_first_frame(random_toy):
    samples = random_toy.sample([0, 1])
    frames = list(sample.animation(random_toy, samples, "patches", 12))
    shown = [(frame[4:132, 4:132].reshape(4, 32, 4, 32, 3) != 255).any(axis=(1, 3, 4)).sum() for frame in frames]
    assert shown == [13, 14, 15, 16]
    assert len(list(sample.animation(random_toy, samples, "decoding", 12))) == 4
    assert len(list(sample.animation(random_toy, samples, "decoding", 0, max_frames=5))) == 5


def test_a_path_that_cannot_be_written_is_found_out_before_drawing(tmp_path, error_of, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sample, "ClassConditionedRejectionSampler", None)  # drawing would fail otherwise
    arguments = ["--from_pretrained", "x", "--cls_name", "cats", "--save_path", f"{tmp_path}/file/out.gif"]
    assert "cannot be written" in error_of(lambda *a: sample.main(list(a)), *arguments)


def test_a_folder_in_the_way_of_a_file_is_one_line(draw, tmp_path, error_of):
    (tmp_path / "out.gif").mkdir()
    assert "cannot be written" in error_of(draw, "--cls_name", "cats", *OPTIONS)
    (tmp_path / "files").write_text("")
    assert "cannot be written" in error_of(lambda *a: draw(*a, name="files"), "--cls_name", "cats", "--files", *OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cls_name", "dragons"], "there is no class 'dragons'"),
        (["--cls_name", "dogs"], "fits 2 classes"),
        (["--cls_name", "cats", "--top_k", "33"], "top_k is 33"),
        (["--cls_name", "cats", "--top_k", "many"], "--top_k"),
        (["--cls_name", "cats", "--temperature", "0"], "temperature is 0"),
        (["--cls_name", "cats", "--top_p", "0"], "top_p is 0"),
        (["--cls_name", "cats", "--min_p", "2"], "min_p is 2"),
        (["--cls_name", "cats", "--guidance", "-1"], "guidance is -1"),
        (["--cls_name", "cats", "--guidance_schedule", "square"], "--guidance_schedule"),
        (["--cls_name", "cats", "--guidance_power", "0"], "guidance_power is 0"),
        (["--cls_name", "cats", "--order", "spiral"], "--order"),
        (["--cls_name", "cats", "--num_steps", "17"], "num_steps is 17"),
        (["--cls_name", "cats", "--z_shape", "16", "16"], "--z_shape is (16, 16)"),
        (["--cls_name", "cats", "--save_path", "out.mp4"], "must end in .gif"),
        (["--cls_name", "cats", "--accept_n", "0"], "accept_n is 0"),
        (["--cls_name", "cats", "--accept_n", "2", "--classifier", "none"], "with --classifier none nothing chooses"),
        (
            ["--cls_name", "cats", "--classifier", "efficientnt"],
            "--classifier is 'efficientnt', but must be own, efficientnet",
        ),
        (["--cls_name", "cats", "--classifier", "efficientnet"], "the classifier has no label for Cats"),
        (["--again", "x.json", "--classifier", "none"], "leave --classifier out"),
        (["--cls_name", "cats", "--num", "0"], "num is 0"),
        (["--cls_name", "cats", "--seed", "-1"], "seed is -1"),
        (["--cls_name", "cats", "--view", "sideways"], "--view"),
        (["--cls_name", "cats", "--colour", "red"], "--colour"),
        (["--cls_name", "cats", "--complete", "none.png"], "belong together"),
        (["--cls_name", "cats", "--keep", "top"], "belong together"),
        (["--cls_name", "cats", "--complete", "none.png", "--keep", "top"], "none.png cannot be read"),
        (["--cls_name", "cats", "--again", "x.json"], "either --cls_name or --again"),
        (["--cls_name", "cats", "--pick", "0"], "--pick"),
        (["--again", "x.json", "--complete", "a.png", "--keep", "top"], "leave --complete out"),
        (["--again", "x.json", "--temperature", "2"], "leave --temperature out"),
        (["--again", "x.json", "--num", "2"], "leave --num out"),
        (["--again", "none.json"], "there is no record none.json"),
        (["--cls_name", "cats", "--process_id", "1"], "--coordinator, --num_processes or "),
        ([], "--cls_name"),
    ],
)
def test_what_is_wrong_is_one_line(draw, error_of, arguments, named):
    assert named in error_of(draw, *arguments)


def test_records_of_other_models_and_numbers_beyond_them_are_one_line(draw, tmp_path, error_of):
    picture = {"label": 0, "index": 0, "token_ids": []}
    record = {"settings": {"complete": None, "keep": None}, "drawing": {}, "pictures": [picture] * 2}
    (tmp_path / "a.json").write_text(json.dumps(record))
    for number in ("2", "-1"):
        assert "the record has pictures 0 to 1" in error_of(draw, "--again", f"{tmp_path}/a.json", f"--pick={number}")
    record["pictures"] = [picture, picture | {"label": 8}]
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert "there is no label 8 among the 3 classes" in error_of(draw, "--again", f"{tmp_path}/a.json")
    (tmp_path / "a.json").write_text("{}")
    assert "is no record of vgpt_jax.sample" in error_of(draw, "--again", f"{tmp_path}/a.json")


def test_sampling_loads_neither_tensorflow_nor_torch(random_workdir, tmp_path):
    check = (
        "import sys; from vgpt_jax import sample; "
        f"sample.main(['--from_pretrained', {str(random_workdir)!r}, '--cls_name', 'cats', '--accept_n', '2', "
        f"'--save_path', {str(tmp_path / 'out.gif')!r}]); "
        "assert not {'tensorflow', 'torch', 'matplotlib', 'clu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[1], check=True)
