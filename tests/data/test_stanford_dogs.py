"""The published configuration for Stanford Dogs from archives to samples, in miniature, by its command lines."""

import json
import sys

import pytest
from PIL import Image

from vgpt_jax import main, sample
from vgpt_jax.training.saved_model import read_metadata

pytestmark = pytest.mark.usefixtures("one_device")

TINY = {
    "data.image_size": 16,
    "data.resize_size": 16,
    "data.held_out_percent": 25,
    "vqgan.ch": 8,
    "vqgan.ch_mult": (1, 2),
    "vqgan.z_channels": 8,
    "vqgan.num_res_blocks": 1,
    "vqgan.attn_resolutions": (8,),
    "vector_quantize.num_codewords": 32,
    "vector_quantize.embedding_dim": 6,
    "vector_quantize.pretrain_steps": 2,
    "tokenizer_training.num_steps": 6,
    "perceptual.name": "none",
    "adversarial.discriminator": "none",
    "gpt.d_model": 32,
    "gpt.num_layers": 1,
    "gpt.num_heads": 2,
    "generator_training.num_steps": 4,
    "generator_training.optimizer.warmup_steps": 2,
    "classifier.widths": (8, 8),
    "classifier_training.num_steps": 4,
    "sampling.top_k": 20,
    "sampling.num": 1,
}


@pytest.fixture(scope="module")
def run(dogs, tmp_path_factory):
    """The workdir of a run that prepared its data set itself."""
    workdir = tmp_path_factory.mktemp("stfdogs") / "run"
    overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
    data = [f"--config.data.data_dir={workdir.parent / 'data'}", f"--manual_dir={dogs.archives}"]
    line = ["main", "--config=configs/stfdogs.py", f"--workdir={workdir}", *data, *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)  # config_flags looks for overrides there
        main.main(line)
    return workdir


def test_every_stage_is_trained_on_the_120_breeds(run):
    for stage, kind in (("tokenizer", "tokenizer"), ("generator", "gpt"), ("classifier", "classifier")):
        metadata = read_metadata(run / stage / "model", kind)
        assert metadata["steps"] == TINY[f"{stage}_training.num_steps"]
        if stage != "tokenizer":
            assert len(metadata["class_names"]) == 120
            assert metadata["class_names"][2].endswith("-maltese_dog")  # with its number


@pytest.mark.parametrize(("classifier", "accept_n"), [(None, 3), ("none", 1)])
def test_breeds_are_drawn_by_name_and_ranked(run, tmp_path, capsys, classifier, accept_n):
    options = [] if classifier is None else ["--classifier", classifier]
    line = [
        "--from_pretrained",
        str(run),
        "--cls_name",
        "maltese",
        "chihuahua",
        "shih_tzu",
        "--accept_n",
        str(accept_n),
    ]
    sampling = ["--temperature", "1.3", "--top_k", "20", "--top_p", "0.9", "--save_path", str(tmp_path / "dogs.gif")]
    sample.main([*line, *sampling, *options])
    record = json.loads((tmp_path / "dogs.json").read_text())
    assert [picture["label"] for picture in record["pictures"]] == [2, 0, 4]
    assert [len(picture.get("candidate_scores", [None])) for picture in record["pictures"]] == [accept_n] * 3
    assert ("score" in record["pictures"][0]) == (classifier is None)
    out = capsys.readouterr().out
    assert ("maltese_dog: score 0." in out) == (classifier is None)
    with Image.open(tmp_path / "dogs.gif") as gif:
        assert gif.n_frames > 4
    again = ["--from_pretrained", str(run), "--again", str(tmp_path / "dogs.json"), "--pick", "1"]
    sample.main([*again, "--save_path", str(tmp_path / "again.gif")])
    assert "made again: 1 of 1 with the same tokens" in capsys.readouterr().out


def test_a_breed_that_the_chosen_classifier_does_not_know_is_one_line(run, tmp_path, error_of):
    line = ["--from_pretrained", str(run), "--cls_name", "breed_7", "--classifier", "efficientnet"]
    message = error_of(lambda: sample.main([*line, "--save_path", str(tmp_path / "dogs.gif")]))
    assert "the classifier has no label for breed_7: choose another (--classifier), or none and --accept_n 1" in message
