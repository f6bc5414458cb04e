"""PyTorch writes the files that are read here."""

import pytest

CONTAINERS = {"zip": True, "stream": False}


@pytest.fixture(params=CONTAINERS)
def written(request, tmp_path):
    """A function that has PyTorch write an object, in either container, and gives the file's path."""
    import torch

    def write(thing, **arguments):
        path = tmp_path / "file.pt"
        torch.save(thing, path, _use_new_zipfile_serialization=CONTAINERS[request.param], **arguments)
        return path

    return write
