"""A file as google-research publishes it, with noise for weights, and its network written in PyTorch's functions."""

import json
import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from flax.serialization import msgpack_serialize
from torch.nn import functional

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.maskgit import read_maskgit

CH, CH_MULT, NUM_RES_BLOCKS, Z_CHANNELS = 8, (1, 1, 2, 3), 2, 12
IMAGE_SIZE = 16


class Peer:
    """The published network over a tree of arrays, which it makes up as it comes to them, numbering them as Flax does."""

    def __init__(self):
        self.rng, self.params, self.counts = np.random.default_rng(0), {}, {}

    def place(self, part, kind):
        index = self.counts[part, kind] = self.counts.get((part, kind), -1) + 1
        node = self.params
        for name in (*part, f"{kind}_{index}"):
            node = node.setdefault(name, {})
        return node, (*part, f"{kind}_{index}")

    def conv(self, part, x, channels, side, bias):
        node, _ = self.place(part, "Conv")
        if not node:
            shape = (side, side, x.shape[1], channels)
            node["kernel"] = self.rng.normal(0, 1.3 / math.prod(shape[:3]) ** 0.5, shape).astype(np.float32)
            if bias:
                node["bias"] = self.rng.normal(0, 0.1, channels).astype(np.float32)
        kernel = torch.from_numpy(node["kernel"]).permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, torch.from_numpy(node["bias"]) if bias else None, padding=side // 2)

    def activated(self, part, x):
        node, _ = self.place(part, "GroupNorm")
        channels = x.shape[1]
        if not node:
            node["scale"] = self.rng.uniform(0.5, 1.5, channels).astype(np.float32)
            node["bias"] = self.rng.normal(0, 0.1, channels).astype(np.float32)
        scale, bias = torch.from_numpy(node["scale"]), torch.from_numpy(node["bias"])
        return functional.silu(functional.group_norm(x, math.gcd(32, channels), scale, bias, eps=1e-6))

    def block(self, part, x, channels):
        _, part = self.place(part, "ResBlock")
        y = self.conv(part, self.activated(part, x), channels, 3, False)
        y = self.conv(part, self.activated(part, y), channels, 3, False)
        return y + (x if x.shape[1] == channels else self.conv(part, y, channels, 1, False))

    def encode(self, x):
        self.counts, part = {}, ("encoder",)
        x = self.conv(part, x, CH, 3, False)
        for i, multiple in enumerate((*CH_MULT, CH_MULT[-1])):
            if 0 < i < len(CH_MULT):
                x = functional.avg_pool2d(x, 2)
            for _ in range(NUM_RES_BLOCKS):
                x = self.block(part, x, CH * multiple)
        return self.conv(part, self.activated(part, x), Z_CHANNELS, 1, True)

    def decode(self, z):
        self.counts, part = {}, ("decoder",)
        x = self.conv(part, z, CH * CH_MULT[-1], 3, True)
        for i, multiple in enumerate((CH_MULT[-1], *reversed(CH_MULT))):
            if i > 1:
                x = functional.interpolate(x, scale_factor=2, mode="nearest")
                x = self.conv(part, x, x.shape[1], 3, True)
            for _ in range(NUM_RES_BLOCKS):
                x = self.block(part, x, CH * multiple)
        return self.conv(part, self.activated(part, x), 3, 3, True)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(size=(3, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def published(images, tmp_path_factory):
    """The file, the tree in it, and what the peer makes of the pictures: token ids and reconstructions."""
    peer, x = Peer(), torch.from_numpy(images).permute(0, 3, 1, 2)
    latents = peer.encode(x).permute(0, 2, 3, 1).numpy()
    codebook = latents.reshape(-1, Z_CHANNELS)  # a code near each latent, 12 in all
    codebook = (codebook + peer.rng.normal(0, 0.3 * latents.std(), codebook.shape)).astype(np.float32)
    distances = ((latents[..., None, :].astype(np.float64) - codebook) ** 2).sum(-1)
    ids = distances.argmin(-1)
    reconstructions = peer.decode(torch.from_numpy(codebook[ids]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    tree = {"params": peer.params | {"quantizer": {"codebook": codebook}}}
    path = tmp_path_factory.mktemp("maskgit") / "tokenizer_imagenet256_checkpoint"
    path.write_bytes(msgpack_serialize(tree))
    return path, tree, ids, reconstructions


@pytest.fixture(scope="module")
def converted(published):
    return next(read_maskgit([published[0]], image_size=IMAGE_SIZE))


def test_ids_and_reconstructions_are_the_peers(published, converted, images):
    _, _, ids, reconstructions = published
    graph, state = nnx.split(converted.model)

    @jit
    def run(state, images, ids):
        tokenizer = nnx.merge(graph, state)
        return tokenizer.encode(images), tokenizer.decode(ids), tokenizer(images).reconstruction

    our_ids, decoded, reconstructed = run(state, images, ids)
    np.testing.assert_array_equal(our_ids, ids)
    assert len(np.unique(ids)) > 6
    np.testing.assert_allclose(decoded, reconstructions, atol=1e-4)
    np.testing.assert_allclose(reconstructed, reconstructions, atol=1e-4)
    assert reconstructions.std() > 0.1


def test_what_is_said_of_the_model(published, converted):
    assert converted.kind == "tokenizer"
    arguments = json.loads(json.dumps(converted.arguments))
    assert arguments["architecture_args"] == {
        "z_channels": Z_CHANNELS,
        "ch": CH,
        "ch_mult": list(CH_MULT),
        "num_res_blocks": NUM_RES_BLOCKS,
    }
    again = nnx.eval_shape(lambda: Tokenizer(**arguments, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(again) == nnx.graphdef(nnx.eval_shape(lambda: converted.model))
    assert (again.num_codes, again.token_shape) == (12, (2, 2))
    source = {"format": "maskgit", "files": ["tokenizer_imagenet256_checkpoint"]}
    assert converted.metadata == {"value_range": [0.0, 1.0], "source": source}
    assert not converted.model.quantizer.is_warming_up()


def test_without_a_size_pictures_have_256_pixels(published):
    model = next(read_maskgit([published[0]])).model
    assert (model.image_size, model.token_shape) == (256, (32, 32))


def test_what_does_not_fit_is_listed(published, tmp_path):
    path = tmp_path / "damaged"

    def refused(match, change=None, options=None):
        if change is not None:
            tree = jax.tree.map(lambda x: x, published[1])
            change(tree)
            path.write_bytes(msgpack_serialize(tree))
        with pytest.raises(UserError, match=match):
            next(read_maskgit([path], **options or {}))

    def several(tree):
        del tree["params"]["encoder"]["ResBlock_1"]["GroupNorm_0"]["scale"]
        tree["params"]["decoder"]["extra"] = np.zeros(3, np.float32)
        tree["params"]["decoder"]["Conv_2"]["kernel"] = np.zeros((3, 3, 2, 2), np.float32)
        tree["batch_stats"] = {"mean": 0.5}

    refused("decoder.extra has no place.*batch_stats.mean has no.*ResBlock_1.GroupNorm_0.scale is missing", several)
    refused("decoder.Conv_2.kernel give .3, 3, 2, 2. for our decoder.upsamples.1.conv.kernel", several)
    refused("encoder.Conv_0.kernel is missing, and the network's sizes", lambda t: t["params"]["encoder"].pop("Conv_0"))
    refused("10 residual blocks are not those of 3 levels", lambda t: t["params"]["decoder"].pop("Conv_4"))
    refused("params of decoder, encoder, quantizer, but decoder, encoder", lambda t: t["params"].pop("quantizer"))
    refused("no tokenizer of MaskGIT.*, but Embed_0", lambda t: t.update(params={"Embed_0": np.zeros(1)}))
    refused("image_size 20 cannot be halved 3 times", lambda t: None, {"image_size": 20})


def test_what_is_no_such_file_is_refused(published, tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"some text, not a checkpoint", published[0].read_bytes()[:-100], msgpack_serialize([1, 2])):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match="file is damaged, or no checkpoint in Flax|file holds no tokenizer of Mask"
        ):
            next(read_maskgit([path]))
    with pytest.raises(UserError, match="there is no file"):
        next(read_maskgit([tmp_path / "none"]))
    with pytest.raises(UserError, match="one file, but 2 are given"):
        next(read_maskgit([path, path]))
