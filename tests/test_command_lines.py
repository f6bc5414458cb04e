"""The command lines that train and measure, as a user types them: what they write, and one clear line for what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import quick_compile
from vgpt_jax import evaluate, main, sample
from vgpt_jax.data.image_folder import load_image_folder
from vgpt_jax.data.token_cache import read_token_cache
from vgpt_jax.evaluation import measure
from vgpt_jax.evaluation.frechet import frechet_distance
from vgpt_jax.training.saved_model import read_metadata

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_main(monkeypatch):
    """Runs ``vgpt_jax.main`` with arguments."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["main", *arguments])  # config_flags looks for overrides there
        main.main(["main", *arguments])

    return run


def test_evaluate_writes_figures_and_pictures_that_agree_with_the_cache(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    evaluate.main(["--workdir", str(workdir), "--num", "2", "--accept_n", "2"])
    figures = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    fingerprint = read_metadata(workdir / "tokenizer" / "model", "tokenizer")["fingerprint"]
    for part in ("held_out", "training"):
        ids = read_token_cache(workdir / "token_cache", fingerprint=fingerprint)[part == "held_out"].token_ids.ravel()
        share = np.bincount(ids, minlength=32) / len(ids)
        by_hand = np.exp(-sum(p * np.log(p) for p in share if p > 0))
        assert figures[f"tokenizer/{part}_code_use"] == pytest.approx(np.mean(share > 0))
        assert figures[f"tokenizer/{part}_perplexity"] == pytest.approx(by_hand)
    assert figures["sampling/score_of_best"] >= figures["sampling/score_of_one"]
    last = [json.loads(line) for line in (workdir / "tokenizer" / "metrics.jsonl").read_text().splitlines()][-1]
    assert figures["tokenizer/psnr_db"] == pytest.approx(last["held_out/psnr"], abs=1e-3)
    for picture in ("reconstructions", "samples", "curves"):
        assert Image.open(workdir / "evaluation" / f"{picture}.png").width > 100
    assert (workdir / "evaluation" / "table.md").read_text().strip() in capsys.readouterr().out


@pytest.fixture
def run_evaluate(monkeypatch):
    def run(*arguments: object) -> None:
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        evaluate.main(arguments)

    return run


@pytest.fixture
def animals(tmp_path):
    """A folder of random pictures of the toy's classes, and the arguments that name it."""
    rng = np.random.default_rng(0)
    for name in ("big dogs", "cats", "small dogs"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(8):
            picture = rng.integers(0, 256, (20, 16, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "animals" / name / f"{i}.png")
    data = {"name": "image_folder", "folder": tmp_path / "animals", "held_out_percent": 50, "resize_size": 0}
    return ["--config=configs/emoji.py", *(f"--config.data.{name}={value}" for name, value in data.items())]


class MeanColours(nnx.Module):
    """Stands for a network of features."""

    def __call__(self, images):
        return images.mean((1, 2))


def test_evaluate_measures_models_that_nobody_trained_here(
    random_workdir, random_toy, animals, run_evaluate, tmp_path, capsys, monkeypatch
):
    """On data of its classes in another order, at its own size and range, with held-out tokens made on the spot."""
    monkeypatch.setattr(measure, "_feature_network", lambda request: MeanColours())
    workdir = tmp_path / "run"
    shutil.copytree(random_workdir, workdir)
    options = ("--num", 2, "--accept_n", 2, "--frechet", "efficientnet")
    run_evaluate(
        "--workdir", workdir, *animals, "--config.sampling.guidance=1.0", "--config.sampling.top_k=0", *options
    )
    figures = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    _, held_out = load_image_folder(str(tmp_path / "animals"), held_out_percent=50)
    assert 3 < figures["generator/nats_per_token"] < 10  # random weights, and 32 codes
    assert "generator/random_order_nats_per_token" in figures
    assert 0 <= figures["classifier/accuracy"] <= 1
    assert figures["sampling/score_of_best"] >= figures["sampling/score_of_one"]
    assert figures["sampling/frechet_pictures"] == 6
    before = np.stack([held_out[i]["image"][2:18] for i in range(len(held_out))]) / 255.0
    after = (np.clip(random_toy.tokenizer(before * 2 - 1).reconstruction, -1, 1) + 1) / 2
    gaussians = [f(x.mean((1, 2))) for x in (before, after) for f in (lambda c: c.mean(0), lambda c: np.cov(c.T))]
    assert figures["tokenizer/frechet"] == pytest.approx(frechet_distance(*gaussians), rel=1e-3)
    assert 0 < figures["sampling/frechet"] != figures["tokenizer/frechet"]
    assert "tokenizer/training_code_use" not in figures
    out = capsys.readouterr().out
    assert "(features of efficientnet, 6 pictures)" in out and "not measured" not in out


def test_evaluate_goes_without_a_classifier_where_none_knows_the_classes(
    random_workdir, animals, run_evaluate, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(random_workdir, workdir, ignore=shutil.ignore_patterns("classifier"))
    run_evaluate(
        "--workdir", workdir, *animals, "--config.sampling.guidance=1.0", "--config.sampling.top_k=0", "--num", 1
    )
    figures = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    assert (figures["sampling/accept_n"], figures["sampling/candidates"]) == (1, 3)
    assert not {"sampling/score_of_best", "classifier/accuracy"} & set(figures)
    assert "not measured: scores: there is no classifier that knows all classes" in capsys.readouterr().out


def test_evaluate_leaves_out_what_is_not_there(random_workdir, animals, run_evaluate, tmp_path, capsys, error_of):
    workdir = tmp_path / "run"
    shutil.copytree(random_workdir, workdir, ignore=shutil.ignore_patterns("generator", "classifier"))
    run_evaluate("--workdir", workdir, *animals)
    figures = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    assert {name.split("/")[0] for name in figures} == {"tokenizer"}
    assert not (workdir / "evaluation" / "curves.png").exists()
    assert "not measured: the generator and its samples: there is none" in capsys.readouterr().out
    assert "has no config: say which data" in error_of(run_evaluate, "--workdir", workdir)
    assert "'--acept_n' is no flag" in error_of(run_evaluate, "--workdir", workdir, "--acept_n", 3)


def test_evaluate_of_no_workdir_is_one_line(tmp_path, error_of):
    def run(*arguments):
        evaluate.main(list(arguments))

    assert "not a workdir" in error_of(run, "--workdir", str(tmp_path))
    assert "required: --workdir" in error_of(run)
    assert "--frechet: invalid choice: 'fid'" in error_of(run, "--workdir", str(tmp_path), "--frechet", "fid")
    assert "--num_processes, --process_id or " in error_of(run, "--workdir", str(tmp_path), "--coordinator", "here:1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--config is needed"),
        (["--config=configs/emoji.py"], "--workdir is needed"),
        (["--config=configs/none.py", "--workdir=x"], "there is no such file"),
        (["--config=configs/emoji.py", "--workdir=x", "--config.gpt.d_modle=3"], "did you mean 'gpt.d_model'"),
        (["--config=configs/emoji.py", "--workdir=x", "--config.gtp.d_model=3"], "'gpt.d_model'"),
        (["--config=configs/emoji.py", "--workdir=x", "--config.gpt.d_model=wide"], "gpt.d_model"),
        (["--config=configs/emoji.py", "--workdir=x", "--config.data.flip=3.5"], "data.flip"),
        (["--config=configs/emoji.py", "--workdir=x", "--wrkdir=y"], "did you mean 'workdir'"),
        (["--config=configs/emoji.py", "--workdir=x", "config.gpt.d_model=3"], "did you mean --config.gpt.d_model=3"),
        (["--config=configs/emoji.py", "--workdir=x", "--config.stages=tokenizr"], "an entry of stages is 'tokenizr'"),
    ],
)
def test_main_says_what_is_wrong(run_main, error_of, tmp_path, arguments, named):
    arguments = [a.replace("--workdir=x", f"--workdir={tmp_path}/x") for a in arguments]
    assert named in error_of(run_main, *arguments)
    assert not (tmp_path / "x").exists()  # nothing is left behind


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--config.data.name=dogs", "data.name is 'dogs'"),
        ("--config.data.name=image_folder", "data.folder"),
        ("--config.data.emoji_label=colour", "emoji_label"),
        ("--config.data.crop=left", "data.crop"),
        ("--config.tokenizer.architecture=vqvan", "tokenizer.architecture"),
        ("--config.tokenizer_training.reconstruction=l3", "reconstruction"),
        ("--config.vector_quantize.init_method=random", "init_method"),
        ("--config.vqvae.num_downsamplings=5", "cannot be halved"),
        ("--config.tokenizer_training.batch_size=0", "batch_size is 0"),
        ("--config.gpt.d_model=0", "gpt.d_model is 0"),
        ("--config.gpt.num_heads=-1", "gpt.num_heads is -1"),
        ("--config.gpt.residual_dropout=2.0", "gpt.residual_dropout is 2.0"),
        ("--config.vqvae.ch=0", "vqvae.ch is 0"),
        ("--config.classifier.widths=0,8", "classifier.widths is 0"),
        ("--config.classifier.widths=4,4,4,4,4", "too many for images"),
        ("--config.generator_training.optimizer.learning_rate=-1.0", "learning_rate is -1"),
        ("--config.gpt.class_dropout=1.5", "gpt.class_dropout is 1.5"),
        ("--config.gpt.size=XXXL", "gpt.size is 'XXXL'"),
        ("--config.generator_training.random_until=1.5", "generator_training.random_until is 1.5"),
        ("--config.generator_training.raster_from=0.25", "generator_training.raster_from is 0.25"),
        ("--config.sampling.order=random", "in the config's sampling section, order is random"),
        ("--config.classifier_training.num_steps=0", "num_steps is 0"),
        ("--config.sampling.top_k=33", "top_k is 33"),
        ("--config.logging.log_every=0", "logging.log_every is 0"),
        ("--config.logging.keep_checkpoints=0", "logging.keep_checkpoints is 0"),
        (
            "--config.generator_training.model_from=best --config.logging.keep_best=0",
            'generator_training.model_from is "best", but logging.keep_best',
        ),
        ("--config.seed=-1", "seed is -1"),
        ("--config.data.image_size=8", "data.image_size is 8"),
        ("--config.data.held_out_percent=0", "held_out_percent is 0"),
    ],
)
def test_a_config_that_cannot_be_built_is_one_line(run_main, error_of, tmp_path, tiny_arguments, argument, named):
    assert named in error_of(
        run_main, "--config=configs/emoji.py", f"--workdir={tmp_path}/x", *tiny_arguments, *argument.split()
    )
    assert not (tmp_path / "x").exists()  # found out before anything is trained or claimed


def test_a_missing_model_to_start_from_is_one_line(run_main, error_of, tmp_path, tiny_arguments):
    start = ["--config=configs/emoji.py", f"--workdir={tmp_path}/x", *tiny_arguments]
    message = error_of(run_main, *start, "--config.tokenizer_training.init_from=/nowhere")
    assert "there is no trained tokenizer in /nowhere" in message


def test_help_says_how_it_is_used(run_main, capsys):
    run_main("--help")
    assert "python -m vgpt_jax.main --config=configs/emoji.py" in capsys.readouterr().out


def test_a_config_that_does_not_run_is_one_line(run_main, error_of, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert "SyntaxError" in error_of(run_main, f"--config={tmp_path}/broken.py", f"--workdir={tmp_path}/x")


def test_a_workdir_of_another_config_is_refused_and_logging_may_change(
    run_main, capsys, error_of, trained, tiny_arguments
):
    start = ["--config=configs/emoji.py", f"--workdir={trained}", *tiny_arguments]
    message = error_of(run_main, *start, "--config.gpt.d_model=64")
    assert "gpt.d_model (32 there, 64 here)" in message
    run_main(*start, "--config.logging.log_every=7")
    assert capsys.readouterr().out.count("finished before") == 3


def test_a_tokenizer_that_does_not_fit_the_token_cache_is_refused(
    run_main, error_of, trained, tmp_path, tiny_arguments
):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "generator")
    metadata = workdir / "token_cache" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"fingerprint": "0" * 16}))
    message = error_of(run_main, "--config=configs/emoji.py", f"--workdir={workdir}", *tiny_arguments)
    assert "was written by tokenizer 0000000000000000" in message


def test_a_folder_of_pictures_is_trained_on_like_the_emoji(run_main, error_of, tmp_path, tiny_arguments):
    rng = np.random.default_rng(0)
    for name in ("reds", "blues", *"abcdefg"):  # as many classes as emoji have: the programs are compiled already
        (tmp_path / "pictures" / name).mkdir(parents=True)
        colour = rng.integers(30, 200, 3)
        for i in range(10):
            pixels = np.clip(colour + rng.integers(-30, 30, (24 + i, 30, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
    (tmp_path / "pictures" / "reds" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    start = [
        "--config=configs/emoji.py", f"--workdir={tmp_path}/run", *tiny_arguments, "--config.data.name=image_folder",
        f"--config.data.folder={tmp_path}/pictures", "--config.data.held_out_percent=30",
    ]  # fmt: skip
    assert "broken.jpg" in error_of(run_main, *start)
    again = [sys.executable, "-m", "vgpt_jax.main", *start, "--config.data.on_corrupt=skip"]
    # In the same workdir: what was refused has left nothing there.
    ended = subprocess.run(again, cwd=ROOT, env=os.environ | quick_compile.ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0 and "skipped 1 of 91 pictures" in ended.stderr, ended.stderr
    sample.main(
        ["--from_pretrained", f"{tmp_path}/run", "--cls_name", "red", "blue", "--save_path", f"{tmp_path}/out.gif"]
    )
    assert [p["class"] for p in json.loads((tmp_path / "out.json").read_text())["pictures"]] == ["reds", "blues"]
