"""The Inception V3 of the Fréchet Inception distance, in the file that pytorch-fid publishes (Apache-2.0; TensorFlow's weights of
2015-12-05 in torchvision's names). Address and length as in pytorch-fid; the SHA-256 is pinned by several public projects."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flax import nnx

from vgpt_jax.data.sources import chosen_cache_dir
from vgpt_jax.errors import UserError
from vgpt_jax.models.inception import BLOCKS, STEM, InceptionV3
from vgpt_jax.pretrained.converted import Converted, open_state_dict, source_of
from vgpt_jax.pretrained.efficientnet_lite0 import folded_batch_norm
from vgpt_jax.pretrained.fetch import fetch
from vgpt_jax.pretrained.strict import Table, conv_kernel, load_strictly
from vgpt_jax.pretrained.vgg16 import converted_folder
from vgpt_jax.training.saved_model import load_model

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"  # 96 MB
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def cached_file() -> Path:
    """Where the published file is kept once it is fetched: in the cache folder (`chosen_cache_dir`)."""
    return chosen_cache_dir(None) / URL.rsplit("/", 1)[1]


def load_inception(file_or_folder: str | Path = "") -> InceptionV3:
    """The network with its weights.

    Args:
      file_or_folder: a state dict in the published names, or a folder that `vgpt_jax.convert` made of one. "": the published
        file, from the cache folder, into which it is fetched if it is not there.

    Raises:
      UserError: it is not there, cannot be fetched, or holds something else.
    """
    path = Path(file_or_folder).expanduser() if file_or_folder else fetch(URL, cached_file(), SHA256)
    if path.is_dir():
        return load_model(converted_folder(path, "inception"), "inception")[0]
    tensors = open_state_dict(path)
    ignored = [name for name in tensors if name.startswith("fc.") or name.endswith(".num_batches_tracked")]

    def create() -> InceptionV3:
        return InceptionV3(rngs=nnx.Rngs(0))

    return load_strictly(create, tensors, _table(), str(path), ignored)


def read_inception(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """A feature network "inception".

    Args:
      paths: the file.
      image_size: None: the network resizes pictures itself.

    Raises:
      UserError: as `load_inception`, or there is another number of files than one, or an image size.
    """
    if len(paths) != 1 or not paths[0].is_file():
        raise UserError(
            f"Inception is one file, such as {cached_file().name}, but {', '.join(map(str, paths))} is given"
        )
    if image_size is not None:
        raise UserError(f"image_size is {image_size}, but Inception takes pictures of any size: leave it out")
    yield Converted("inception", load_inception(paths[0]), {}, {"source": source_of("inception", paths)})


def _table() -> Table:
    table = {}
    for name, layer in STEM.items():
        if layer is not None:
            table |= folded_batch_norm(conv_kernel, f"{name}.conv", f"{name}.bn", f"stem.{name}")
    for block_name, block in BLOCKS.items():
        for branch in block.all_branches():
            for name in branch.layer_names():
                theirs, ours = f"{block_name}.{name}", f"blocks.{block_name}.convs.{name}"
                table |= folded_batch_norm(conv_kernel, f"{theirs}.conv", f"{theirs}.bn", ours)
    return table
