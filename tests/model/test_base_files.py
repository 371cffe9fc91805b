"""Where a base stands, and the fingerprint of what is loaded of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from arena.model.backbone import load_base
from arena.model.base_files import base_digest, base_folder
from arena.model.safety import INDEX, WEIGHTS
from arena.storage import files
from arena.tasks.preference import CLASSES
from tests.helpers import exact

COMMIT, LATER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def base(gemma2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gemma2, tmp_path / "base"))


def shard(base: Path) -> None:
    """Divides the weights of a base among two files."""
    tensors = load_file(base / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, base / file, metadata={"format": "pt"})
    (base / WEIGHTS).unlink()
    places = {name: file for file, mine in parts.items() for name in mine}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds the base as `some/base`, as its client lays it out; the folder of its commit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    store = tmp_path / "hub/models--some--base"
    (store / "refs").mkdir(parents=True)
    (store / "refs/main").write_text(COMMIT)
    snapshot = store / "snapshots" / COMMIT
    (store / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for at, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, store / f"blobs/{at}")
        (snapshot / file.name).symlink_to(f"../../blobs/{at}")
    return snapshot


def test_it_depends_on_config_and_weights_alone(base: Path) -> None:
    first = base_digest(str(base))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config, indent=7, sort_keys=True))  # the same content
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("words")
    (base / "other.safetensors").write_bytes(b"not loaded")
    assert base_digest(str(base)) == first
    (base / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": 3.0}))
    assert base_digest(str(base)) != first


@pytest.mark.parametrize("where", [0.3, 0.5, 0.9])
def test_it_depends_on_every_byte_of_the_weights(where: float, base: Path) -> None:
    """Also in the middle of a large file, with the same size and names."""
    save_file({"x": torch.zeros(3 * 2**20)}, base / WEIGHTS, metadata={"format": "pt"})
    first = base_digest(str(base))
    with (base / WEIGHTS).open("r+b") as file:
        file.seek(int((base / WEIGHTS).stat().st_size * where))
        file.write(b"\x01")
    assert base_digest(str(base)) != first


def test_it_depends_on_every_shard(base: Path) -> None:
    shard(base)
    first = base_digest(str(base))
    for part in sorted(base.glob("model-*.safetensors")):
        whole = part.read_bytes()
        part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert base_digest(str(base)) != first
        part.write_bytes(whole)
        assert base_digest(str(base)) == first
    part.unlink()
    with pytest.raises(ValueError, match=f"lacks {part.name}: fetch the complete base again"):
        base_digest(str(base))


def test_a_file_is_read_once_until_it_changes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: read.append(path) or real(path))
    first = base_digest(str(base))
    assert base_digest(str(base)) == first and len(read) == 1
    os.utime(base / WEIGHTS, ns=(1, 1))
    assert base_digest(str(base)) == first and len(read) == 2


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_of_a_hub_is_known_by_its_content(
    sharded: bool, base: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if sharded:
        shard(base)
    snapshot = request.getfixturevalue("hub")
    assert base_folder("some/base") == snapshot
    assert base_digest("some/base") == base_digest("some/base", COMMIT) == base_digest(str(base))
    model = load_base(exact(Path("some/base")), CLASSES)
    assert model.name_or_path == model.config.name_or_path == "some/base"
    for loaded, there in zip(model.parameters(), load_base(exact(base), CLASSES).parameters(), strict=True):
        assert torch.equal(loaded, there)
    later = shutil.copytree(snapshot, snapshot.with_name(LATER), symlinks=False)
    (snapshot.parents[1] / "refs/main").write_text(LATER)
    assert base_digest("some/base") == base_digest(str(base))  # another commit, the same weights
    weights = sorted(later.glob("model*.safetensors"))[-1]
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert base_digest("some/base") != base_digest("some/base", COMMIT) == base_digest(str(base))


def test_an_unreachable_hub_is_an_error(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.base: 'some/other' could not be loaded .*hf download some/other"):
        base_digest("some/other")
    (hub / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"no {WEIGHTS}"):
        base_digest("some/base")
