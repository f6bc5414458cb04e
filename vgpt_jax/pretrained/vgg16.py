"""VGG16 as torchvision publishes it, and the linear heads of LPIPS that were trained on top of it.

VGG16's file is given by the user, found in the cache folder, or fetched into it. The heads, 1472 numbers, are in
``lpips_vgg_heads.npz`` beside this file: the tensors of ``lpips/weights/v0.1/vgg.pth`` in the package lpips 0.1.4, whose
licence (BSD-2-Clause) wants this to be said with them:

    Copyright (c) 2018, Richard Zhang, Phillip Isola, Alexei A. Efros, Eli Shechtman, Oliver Wang
    All rights reserved.

    Redistribution and use in source and binary forms, with or without modification, are permitted provided that the
    following conditions are met:

    * Redistributions of source code must retain the above copyright notice, this list of conditions and the following
      disclaimer.

    * Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the following
      disclaimer in the documentation and/or other materials provided with the distribution.

    THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES,
    INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
    DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL,
    SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
    SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY,
    WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
    OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from vgpt_jax.data.sources import chosen_cache_dir
from vgpt_jax.errors import UserError
from vgpt_jax.models.vgg16 import STAGES, VGG16
from vgpt_jax.pretrained.converted import Converted, open_state_dict, source_of
from vgpt_jax.pretrained.fetch import fetch
from vgpt_jax.pretrained.strict import Table, conv_kernel, load_strictly, unchanged
from vgpt_jax.training.saved_model import load_model

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # 528 MiB, most of it the classifier
SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
HEADS = Path(__file__).with_name("lpips_vgg_heads.npz")


def cached_file() -> Path:
    """Where torchvision's file is kept once it is fetched: in the cache folder (`chosen_cache_dir`)."""
    return chosen_cache_dir(None) / URL.rsplit("/", 1)[1]


def load_vgg16(file: str | Path = "") -> VGG16:
    """The convolutions with their weights.

    Args:
      file: a state dict in torchvision's names, such as ``vgg16-397923af.pth``, or a folder that `vgpt_jax.convert` made of one.
        "": torchvision's own, from the cache folder, into which it is fetched if it is not there.

    Raises:
      UserError: there is no such file, it cannot be fetched, or it holds something else.
    """
    path = Path(file).expanduser() if file else fetch(URL, cached_file(), SHA256)
    if path.is_dir():
        return load_model(converted_folder(path, "vgg16"), "vgg16")[0]
    tensors = open_state_dict(path)

    def create() -> VGG16:
        return VGG16(rngs=nnx.Rngs(0))

    classifier = [name for name in tensors if name.startswith("classifier.")]
    return load_strictly(create, tensors, _table(), str(path), ignored=classifier)


def read_lpips(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """The network "vgg16" that LPIPS looks through; the heads are part of this package.

    Args:
      paths: the file.
      image_size: None: the network takes pictures of any size.

    Raises:
      UserError: as `load_vgg16`, or there is another number of files than one, or an image size.
    """
    if len(paths) != 1 or not paths[0].is_file():
        raise UserError(f"VGG16 is one file, such as {cached_file().name}, but {', '.join(map(str, paths))} is given")
    if image_size is not None:
        raise UserError(f"image_size is {image_size}, but VGG16 takes pictures of any size: leave it out")
    yield Converted("vgg16", load_vgg16(paths[0]), {}, {"source": source_of("lpips", paths)})


def converted_folder(folder: Path, kind: str) -> Path:
    """Where a model is that `vgpt_jax.convert` wrote: in the folder itself, or in the room of its kind."""
    rooms = (folder, folder / "model", folder / kind / "model")
    return next((room for room in rooms if (room / "metadata.json").is_file()), folder)


def load_lpips_heads() -> list[np.ndarray]:
    """The weight of each channel in LPIPS, not negative: five arrays ``[C]`` float32."""
    with np.load(HEADS) as stored:
        return [stored[f"lin{i}"] for i in range(len(STAGES))]


def _table() -> Table:
    table, index = {}, 0  # torchvision counts convolutions, ReLUs and poolings in one row
    for i, channels in enumerate(STAGES):
        for j in range(len(channels)):
            table[f"stages.{i}.{j}.kernel"] = (conv_kernel, (f"features.{index}.weight",))
            table[f"stages.{i}.{j}.bias"] = (unchanged, (f"features.{index}.bias",))
            index += 2
        index += 1
    return table
