"""The file that pytorch-fid publishes, with noise for weights, and its network written in PyTorch's functions."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.models import inception as inception_module
from vgpt_jax.pretrained import inception as pretrained_module
from vgpt_jax.pretrained.inception import cached_file, load_inception, read_inception

SIZE = 139  # pixels, in place of 299: the last maps have 3x3 positions


class Peer:
    """The published network as a function of named tensors, which it makes up as it comes to them.

    A convolution's weights are drawn so that activations keep their size; its BatchNorm's are around what it would have learned.
    """

    def __init__(self):
        self.generator, self.tensors = torch.Generator().manual_seed(0), {}

    def conv(self, name, x, channels, kernel=1, stride=1, padding=0):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if f"{name}.conv.weight" not in self.tensors:
            shape = (channels, x.shape[1], *kernel)
            scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
            self.tensors[f"{name}.conv.weight"] = scale * torch.randn(shape, generator=self.generator)
            for part, low, high in (
                ("weight", 0.8, 1.6),
                ("bias", -0.2, 0.2),
                ("running_mean", -0.1, 0.1),
                ("running_var", 0.5, 1.5),
            ):
                values = low + (high - low) * torch.rand(channels, generator=self.generator)
                self.tensors[f"{name}.bn.{part}"] = values
            self.tensors[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
        x = functional.conv2d(x, self.tensors[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, variance, scale, shift = (
            self.tensors[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu(functional.batch_norm(x, mean, variance, scale, shift, eps=0.001))

    def average(self, name, x, channels):
        x = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.conv(f"{name}.branch_pool", x, channels)

    def block_a(self, name, x, pooled):
        b5 = self.conv(f"{name}.branch5x5_1", x, 48)
        b3 = self.conv(f"{name}.branch3x3dbl_1", x, 64)
        b3 = self.conv(f"{name}.branch3x3dbl_2", b3, 96, 3, padding=1)
        outputs = [
            self.conv(f"{name}.branch1x1", x, 64),
            self.conv(f"{name}.branch5x5_2", b5, 64, 5, padding=2),
            self.conv(f"{name}.branch3x3dbl_3", b3, 96, 3, padding=1),
            self.average(name, x, pooled),
        ]
        return torch.cat(outputs, 1)

    def block_6a(self, x):
        y = self.conv("Mixed_6a.branch3x3dbl_1", x, 64)
        y = self.conv("Mixed_6a.branch3x3dbl_2", y, 96, 3, padding=1)
        y = self.conv("Mixed_6a.branch3x3dbl_3", y, 96, 3, 2)
        return torch.cat([self.conv("Mixed_6a.branch3x3", x, 384, 3, 2), y, functional.max_pool2d(x, 3, 2)], 1)

    def block_c(self, name, x, c):
        wide, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        y = self.conv(f"{name}.branch7x7_1", x, c)
        y = self.conv(f"{name}.branch7x7_2", y, c, **wide)
        y = self.conv(f"{name}.branch7x7_3", y, 192, **tall)
        z = self.conv(f"{name}.branch7x7dbl_1", x, c)
        z = self.conv(f"{name}.branch7x7dbl_2", z, c, **tall)
        z = self.conv(f"{name}.branch7x7dbl_3", z, c, **wide)
        z = self.conv(f"{name}.branch7x7dbl_4", z, c, **tall)
        z = self.conv(f"{name}.branch7x7dbl_5", z, 192, **wide)
        return torch.cat([self.conv(f"{name}.branch1x1", x, 192), y, z, self.average(name, x, 192)], 1)

    def block_7a(self, x):
        y = self.conv("Mixed_7a.branch3x3_2", self.conv("Mixed_7a.branch3x3_1", x, 192), 320, 3, 2)
        z = self.conv("Mixed_7a.branch7x7x3_1", x, 192)
        z = self.conv("Mixed_7a.branch7x7x3_2", z, 192, (1, 7), padding=(0, 3))
        z = self.conv("Mixed_7a.branch7x7x3_3", z, 192, (7, 1), padding=(3, 0))
        z = self.conv("Mixed_7a.branch7x7x3_4", z, 192, 3, 2)
        return torch.cat([y, z, functional.max_pool2d(x, 3, 2)], 1)

    def block_e(self, name, x, maximum):
        def fork(prefix, y):
            return [
                self.conv(f"{prefix}a", y, 384, (1, 3), padding=(0, 1)),
                self.conv(f"{prefix}b", y, 384, (3, 1), padding=(1, 0)),
            ]

        z = self.conv(f"{name}.branch3x3dbl_1", x, 448)
        z = self.conv(f"{name}.branch3x3dbl_2", z, 384, 3, padding=1)
        y = fork(f"{name}.branch3x3_2", self.conv(f"{name}.branch3x3_1", x, 384))
        z = fork(f"{name}.branch3x3dbl_3", z)
        if maximum:
            pooled = self.conv(f"{name}.branch_pool", functional.max_pool2d(x, 3, 1, 1), 192)
        else:
            pooled = self.average(name, x, 192)
        return torch.cat([self.conv(f"{name}.branch1x1", x, 320), *y, *z, pooled], 1)

    def __call__(self, images, size):
        """Images ``[B, 3, H, W]`` in 0..1 to features ``[B, 2048]``."""
        x = functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        x = self.conv("Conv2d_1a_3x3", 2 * x - 1, 32, 3, 2)
        x = self.conv("Conv2d_2a_3x3", x, 32, 3)
        x = self.conv("Conv2d_2b_3x3", x, 64, 3, padding=1)
        x = functional.max_pool2d(x, 3, 2)
        x = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x, 80), 192, 3)
        x = functional.max_pool2d(x, 3, 2)
        for letter, pooled in zip("bcd", (32, 64, 64), strict=True):
            x = self.block_a(f"Mixed_5{letter}", x, pooled)
        x = self.block_6a(x)
        for letter, inner in zip("bcde", (128, 160, 160, 192), strict=True):
            x = self.block_c(f"Mixed_6{letter}", x, inner)
        x = self.block_e("Mixed_7b", self.block_7a(x), maximum=False)
        return self.block_e("Mixed_7c", x, maximum=True).mean((2, 3))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The peer with its tensors, and a file with them."""
    peer = Peer()
    with torch.no_grad():
        peer(torch.zeros(1, 3, 16, 16), 75)
    tensors = peer.tensors | {"fc.weight": torch.zeros(1008, 2), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(tensors, path)
    return peer, path, tensors


@pytest.fixture(scope="module")
def network(published):
    return load_inception(published[1])


def test_features_are_pytorchs(published, network, monkeypatch):
    monkeypatch.setattr(inception_module, "IMAGE_SIZE", SIZE)
    images = np.random.default_rng(0).uniform(size=(2, 170, 90, 3)).astype(np.float32)  # one side shrinks, one grows
    with torch.no_grad():
        expected = published[0](torch.from_numpy(images).permute(0, 3, 1, 2), SIZE).numpy()
    graph, state = nnx.split(network)
    run = jit(lambda s, x: nnx.merge(graph, s)(x))
    ours = np.asarray(run(state, images))
    assert ours.shape == (2, 2048)
    assert expected.std() > 0.1 and np.abs(expected[0] - expected[1]).max() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_a_file_that_does_not_fit(published, tmp_path):
    tensors = dict(published[2])
    del tensors["Mixed_7c.branch3x3_2b.bn.running_var"]
    tensors["AuxLogits.fc.weight"] = torch.ones(1)
    tensors["Conv2d_1a_3x3.conv.weight"] = torch.ones(32, 3, 5, 5)
    path = tmp_path / "other.pth"
    torch.save(tensors, path)
    with pytest.raises(UserError) as error:
        load_inception(path)
    for part in ("AuxLogits.fc.weight has no place", "branch3x3_2b.bn.running_var is missing", "give .5, 5, 3, 32."):
        assert error.match(part)
    with pytest.raises(UserError, match="Inception is one file, such as pt_inception-2015-12-05-6726825d.pth, but"):
        next(read_inception([tmp_path]))
    with pytest.raises(UserError, match="image_size is 256, but Inception takes pictures of any size"):
        next(read_inception([path], image_size=256))


def test_files_folders_and_the_cache_folder(published, network, tmp_path, monkeypatch):
    (converted,) = read_inception([published[1]])
    assert (converted.kind, converted.arguments) == ("inception", {})
    assert converted.metadata == {"source": {"format": "inception", "files": [published[1].name]}}
    for x, y in zip(jax.tree.leaves(nnx.state(converted.model)), jax.tree.leaves(nnx.state(network)), strict=True):
        np.testing.assert_array_equal(x, y)

    monkeypatch.setattr(pretrained_module, "load_model", lambda folder, kind: ((folder, kind), {}))
    model = tmp_path / "out" / "inception" / "model"
    model.mkdir(parents=True)
    (model / "metadata.json").touch()
    assert load_inception(tmp_path / "out") == load_inception(model) == (model, "inception")

    monkeypatch.setenv("VGPT_JAX_CACHE", str(tmp_path))
    assert cached_file() == tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    asked = []
    monkeypatch.setattr(pretrained_module, "fetch", lambda *arguments: asked.append(arguments) or arguments[1])
    with pytest.raises(UserError, match="there is no file .*pt_inception"):
        load_inception()
    ((url, path, sha256),) = asked
    assert (url.rsplit("/", 1)[1], path) == (cached_file().name, cached_file())
    assert (sha256[:8], len(sha256)) == ("6726825d", 64)  # its first digits are in its name
