"""Which network the Fréchet distances are of. What is measured with it: ``tests/test_command_lines.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.evaluation import measure
from vgpt_jax.evaluation.measure import Request, _feature_network
from vgpt_jax.models.efficientnet_lite0 import EfficientNetLite0
from vgpt_jax.models.inception import InceptionV3

PICTURES = jax.ShapeDtypeStruct((2, 40, 30, 3), jnp.float32)


def request(frechet, inception_file=""):
    return Request(num=1, accept_n=1, seed=0, frechet=frechet, inception_file=inception_file)


def shape_of_features(network):
    return nnx.eval_shape(lambda network, x: network(x), network, PICTURES).shape


class Corners(nnx.Module):
    """Stands for EfficientNet; its features are the pixels in the four corners of what it is given."""

    def embed(self, x):
        assert x.shape[1:3] == (224, 224)
        return x[:, ::223, ::223].reshape(len(x), 12)


def test_efficientnet_is_given_whole_pictures_in_its_range(monkeypatch):
    monkeypatch.setattr(measure, "load_efficientnet_lite0", Corners)
    images = np.full((1, 448, 224, 3), 0.5, np.float32)
    images[0, :90, :90], images[0, -90:, -90:] = 0.0, 1.0  # a cut to the centre would lose these corners
    features = _feature_network(request("efficientnet"))(images)[0].reshape(4, 3)
    np.testing.assert_allclose(features[:, 0], [-127 / 128, 0.5 / 128, 0.5 / 128, 1.0], atol=1e-5)


def test_efficientnets_features_are_those_before_its_classes(monkeypatch):
    abstract = nnx.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0)))
    monkeypatch.setattr(measure, "load_efficientnet_lite0", lambda: abstract)
    assert shape_of_features(_feature_network(request("efficientnet"))) == (2, 1280)


def test_inception_is_of_the_file_that_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"there is no file nowhere\.pth"):
        _feature_network(request("inception", "nowhere.pth"))
    abstract, asked = nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))), []
    monkeypatch.setattr(measure, "load_inception", lambda file: asked.append(file) or abstract)
    for file in ("", "here.pth"):
        assert shape_of_features(_feature_network(request("inception", file))) == (2, 2048)
    assert asked == ["", "here.pth"]


def test_an_inception_file_for_another_network_is_refused():
    assert _feature_network(request("none")) is None
    for frechet in ("none", "efficientnet"):
        with pytest.raises(UserError, match="--inception_file is for --frechet inception"):
            _feature_network(request(frechet, "here.pth"))
