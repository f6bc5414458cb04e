"""The table of public checkpoints, and how their files come, from a server on this machine."""

import hashlib
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vgpt_jax.convert import FORMATS
from vgpt_jax.errors import UserError
from vgpt_jax.pretrained import known, vgg16
from vgpt_jax.pretrained.known import KNOWN, KnownFile, KnownModel, describe_known, fetch_known, known_model


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a checkpoint of two files, of which one has a hash, as "toy"."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "model.yaml").write_bytes(b"model: toy")
    (folder / "last.ckpt").write_bytes(b"weights")

    def make_handler(*arguments):
        return Handler(*arguments, directory=str(folder))

    with ThreadingHTTPServer(("127.0.0.1", 0), make_handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        files = (
            KnownFile(f"{url}/model.yaml", "toy.yaml"),
            KnownFile(f"{url}/last.ckpt", "toy.ckpt", 7, hashlib.sha256(b"weights").hexdigest()),
        )
        monkeypatch.setattr(known, "KNOWN", {"toy": KnownModel("taming", files, "none", "a toy")})
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def test_the_files_come_into_a_folder_of_their_own(server, tmp_path):
    files = fetch_known("toy", str(tmp_path / "cache"))
    assert files == [tmp_path / "cache" / "checkpoints" / "toy" / name for name in ("toy.yaml", "toy.ckpt")]
    assert [file.read_bytes() for file in files] == [b"model: toy", b"weights"]
    (server / "model.yaml").unlink()
    assert fetch_known("toy", str(tmp_path / "cache")) == files  # both are there


def test_a_changed_file_is_refused_where_its_hash_is_known(server, tmp_path):
    (server / "last.ckpt").write_bytes(b"WEIGHTS")
    with pytest.raises(UserError, match="last.ckpt is not the file that was expected .by its SHA-256.*toy.ckpt$"):
        fetch_known("toy", str(tmp_path / "cache"))


def test_without_a_network_it_is_said_what_to_put_where(server, tmp_path, monkeypatch):
    url = "http://127.0.0.1:1/model.yaml"  # where nobody listens
    toy = known.KNOWN["toy"]
    monkeypatch.setattr(known, "KNOWN", {"toy": replace(toy, files=(replace(toy.files[0], url=url),))})
    with pytest.raises(UserError, match=f"get {url} by other means and put it at {tmp_path}/checkpoints/toy/toy.yaml$"):
        fetch_known("toy", str(tmp_path))


def test_feature_networks_lie_where_their_loaders_look(tmp_path, monkeypatch):
    monkeypatch.setenv("VGPT_JAX_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(known, "fetch", lambda url, path, sha256, size: asked.append((url, path, sha256)) or path)
    assert fetch_known("vgg16") == [vgg16.cached_file()]
    assert asked == [(vgg16.URL, vgg16.cached_file(), vgg16.SHA256)]


def test_an_unknown_name_is_answered_with_the_close_ones():
    with pytest.raises(
        UserError, match="no public checkpoint is called 'llamagen-vq16': did you mean 'llamagen-vq-16'"
    ):
        known_model("llamagen-vq16")
    assert known_model("cin-transformer").format == "taming"


def test_what_is_installed_needs_no_files():
    assert fetch_known("efficientnet-lite0") == []


@pytest.mark.parametrize("name", KNOWN)
def test_the_entries_are_whole(name):
    model = KNOWN[name]
    assert model.format in FORMATS
    assert model.licence and model.what
    assert not model.needs or KNOWN[model.needs].format == model.format
    assert len({file.name for file in model.files}) == len(model.files)
    for file in model.files:
        assert file.url.startswith("https://")
        assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
        assert file.size is None or file.size > 0


def test_the_table_has_a_line_for_each():
    lines = describe_known().splitlines()
    assert len(lines) == 2 + len(KNOWN)
    by_name = {line.split()[0]: line for line in lines[2:]}
    assert list(by_name) == list(KNOWN)
    assert "980 MB" in by_name["vqgan-imagenet-f16-16384"]
    assert by_name["llamagen-b-256"].endswith("needs llamagen-vq-16")
