"""The packaged Gemma 3 270M: its weights, and its numbers on packed batches."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from arena.config import load_recipe
from arena.model import exactness
from arena.model.backbone import base_config, load_base, load_tokenizer
from arena.model.base_files import base_folder
from arena.model.families import ARCHITECTURES
from arena.model.packaged import PACKAGED, packaged_file
from arena.model.safety import SAFE_WEIGHTS, WEIGHTS
from arena.packing.batch import collate
from arena.tasks.preference import CLASSES
from tests.helpers import known_head

BASE = "gemma-3-270m"
LENGTHS = [1, 40, 511, 512, 513, 700, 900, 64]  # around the window of 512

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(PACKAGED[BASE].module) is None, reason="the extra gemma3 is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user")))
        yield


def test_weights_are_those_that_transformers_dequantises() -> None:
    file = packaged_file(BASE)
    stored = load_file(base_folder(BASE) / WEIGHTS)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **SAFE_WEIGHTS
    ).state_dict()
    assert len(stored) == 236 and set(theirs) == {*stored, "lm_head.weight"}
    assert all(torch.equal(value, theirs[name]) for name, value in stored.items())
    assert torch.equal(theirs["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_its_config_and_tokenizer_are_those_of_gemma_3() -> None:
    config, known = (each.to_dict() for each in (base_config(load_recipe(BASE).model), ARCHITECTURES[BASE]))
    differ = {name for name in known if config.get(name) != known[name]}
    assert differ <= {"_name_or_path", "rms_norm_eps", "architectures", "dtype"}
    assert config["rms_norm_eps"] == pytest.approx(known["rms_norm_eps"])  # stored in single precision
    tokenizer = load_tokenizer(BASE)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (2, 1, 262144)
    assert tokenizer("The  capital of France", add_special_tokens=False).input_ids == [818, 138, 41626, 529, 7001]


def test_packed_shared_and_one_by_one_agree() -> None:
    """To 1e-5 of the largest logit, with plain transformers; rows taken for one and wrong windows do not."""
    settings = load_recipe(BASE, ["model.attention=reference"]).model
    ours = known_head(load_base(settings, CLASSES)).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(
        base_folder(BASE), num_labels=3, dtype=torch.float32, attn_implementation="eager", **SAFE_WEIGHTS
    ).eval()
    plain.score.weight.data.copy_(ours.model.score.weight)
    rows = _rows(settings.base)
    packed, (order, shared) = collate([{"input_ids": row} for row in rows]), exactness._sharing(rows)
    windows = [each for each in ours.modules() if exactness._has_window(each)]
    assert len(windows) == 15 and int(shared.input_ids.numel()) < int(packed.input_ids.numel())
    with torch.no_grad():
        right = torch.cat([plain(input_ids=torch.from_numpy(row)[None].long(), use_cache=False).logits for row in rows])
        alone = torch.cat([ours(collate([{"input_ids": row}])) for row in rows])
        errors = [_apart(alone, right), _apart(ours(packed), right), _apart(ours(shared), right[order])]
        wrong = [_apart(ours(exactness._in_pairs(packed)), right[1::2])]
        for window in (511, 513):
            for module in windows:
                setattr(module, "sliding_window", window)  # noqa: B010 - not declared by torch's modules
            wrong.append(_apart(ours(packed), right))
    print("errors", errors, "controls", wrong)
    assert max(errors) <= 1e-5 and min(wrong) > 1e-3


def _rows(base: str) -> list[np.ndarray]:
    """Rows of real text, whose beginnings some have in common."""
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    )
    ids = np.array(load_tokenizer(base)(text, add_special_tokens=False).input_ids, dtype=np.int32)
    rows = [ids[1000 * at : 1000 * at + n].copy() for at, n in enumerate(LENGTHS)]
    for row, other in ((rows[4], rows[3]), (rows[6], rows[5])):
        row[:300] = other[:300]
    return rows


def _apart(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())
