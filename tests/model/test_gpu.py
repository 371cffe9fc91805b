"""What only a GPU can show: the same numbers there as on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arena.data.prepare import prepare_fold
from arena.distributed import compute_in
from arena.model.attention import trial
from arena.model.attention.backends import BACKENDS
from arena.model.attention.flex import block_mask as flex_mask
from arena.model.attention.flex import bucket, flex, visible
from arena.model.attention.trial import cannot_compile
from arena.model.attention.varlen import used_backends, varlen_attention
from arena.model.backbone import attention_choice, backbone, load_base, load_tokenizer
from arena.model.card import card_of
from arena.model.classifier import loss_sum
from arena.model.memory.fused import PARTS, POLICIES, set_policies
from arena.model.tuning import adapt
from arena.settings import ModelSettings
from arena.tasks import task_of
from arena.tasks.preference import CLASSES
from arena.training.optimizer import trainable
from tests.helpers import classifier, exact, make_base, pack, tiny_recipe, trainer_for
from tests.model.test_classifier import shared_batch, swap_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LENGTHS = [40, 1, 9, 8, 33]
HALF = [torch.bfloat16, torch.float16]

# Gemma-2-9B's attention: 16 heads of 256 on 8 key heads, scale 1/16, soft cap 50, window 4096
HEADS, KV_HEADS, DIM = 16, 8, 256
GEMMA: dict[str, Any] = {"scale": 1 / 16, "softcap": 50.0}
PACKED = [5200, 1, 130, 700, 4096]
# a shared beginning of 4500 tokens, longer than the window, then what follows it in three examples; one query alone
SHARED = [(4500, 0), (300, 4500), (1, 4500), (900, 4500), (64, 0)]


def skip_unless_it_runs(name: str, dtype: torch.dtype, head_dim: int, softcap: float | None = 50.0) -> None:
    why = BACKENDS[name].supports(card_of("cuda"), dtype, head_dim, softcap, True)
    if why is not None:
        pytest.skip(f"{name}: {why}")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small model with heads of 256: a small build of flash-attn has no others."""
    return make_base(tmp_path / "base", head_dim=DIM, query_pre_attn_scalar=DIM)


# what is to be the same with any backend is looked at with the one that training uses, and with one that always runs
TRAINED = [("flash", "bfloat16"), ("blockwise", "bfloat16"), ("blockwise", "float32")]


def states(n_q: list[int], n_k: list[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v on the GPU, with scores of up to 40, where the soft cap of 50 matters."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (sum(n_q), HEADS, DIM), (sum(n_k), KV_HEADS, DIM), (sum(n_k), KV_HEADS, DIM)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    return [(3 * q).to(dtype), (3 * k).to(dtype), v.to(dtype)]


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def naive(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int, **options: Any) -> Tensor:
    """Segment by segment, head by head, every step in the dtype of its inputs."""
    scale, softcap, window = options["scale"], options["softcap"], options["window"]
    n_q, n_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    group, out = q.shape[1] // k.shape[1], []
    for queries, keys, values in zip(q.split(n_q), k.split(n_k), v.split(n_k), strict=True):
        place = torch.arange(len(queries), device="cuda")[:, None] + len(keys) - len(queries)
        key = torch.arange(len(keys), device="cuda")[None, :]
        hidden = key > place if window is None else (key > place) | (key <= place - window)
        heads = []
        for head in range(q.shape[1]):
            scores = (queries[:, head] @ keys[:, head // group].T) * scale
            scores = softcap * torch.tanh(scores / softcap)
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values[:, head // group])
        out.append(torch.stack(heads, dim=1))
    return torch.cat(out)


def with_gradients(attend: Any, qkv: list[Tensor], n_q: list[int], n_k: list[int], **options: Any) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in qkv]
    out = attend(*leaves, ends(n_q), ends(n_k), max(n_q), max(n_k), **GEMMA, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def worst(ours: Tensor, exact: Tensor) -> float:
    difference = (ours.float() - exact.float()).abs().max()
    assert torch.isfinite(difference)
    return float(difference)


def by(name: str) -> Any:
    return lambda *given, **named: varlen_attention(*given, **named, backend=name)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("shared", [False, True])
def test_errors_are_at_most_twice_those_of_a_naive_one(
    name: str, dtype: torch.dtype, window: int | None, shared: bool
) -> None:
    skip_unless_it_runs(name, dtype, DIM)
    n_q = [n for n, _ in SHARED] if shared else PACKED
    n_k = [n + before for n, before in SHARED] if shared else PACKED
    half = states(n_q, n_k, dtype)
    truth = with_gradients(by("reference"), [each.float() for each in half], n_q, n_k, window=window)
    plain = with_gradients(naive, half, n_q, n_k, window=window)
    ours = with_gradients(by(name), half, n_q, n_k, window=window)
    for part, mine, naive_one, right in zip(("out", "q", "k", "v"), ours, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert worst(mine, right) <= 2 * worst(naive_one, right), part


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("wrong", [{"window": 4095}, {"window": 4097}, {"window": 4096, "softcap": 10.0}])
def test_a_wrong_window_or_softcap_is_seen(name: str, wrong: dict[str, Any]) -> None:
    """The edge of the window is one key of 4096: queries there are given a key that outweighs all others."""
    skip_unless_it_runs(name, torch.bfloat16, DIM)
    q, k, v = states([5200], [5200], torch.bfloat16)
    q, k = q.clone(), k.clone()
    q[4600], k[4600 - 4095], k[4600 - 4096] = 1.0, 1.0, 1.0  # the last key seen and the first that is not
    v[4600 - 4095], v[4600 - 4096] = 8.0, -8.0
    boundaries = ends([5200])
    arguments = (q, k, v, boundaries, boundaries, 5200, 5200)
    right = varlen_attention(*arguments, **{**GEMMA, "window": 4096}, backend="reference")
    ours = varlen_attention(*arguments, **{**GEMMA, "window": 4096}, backend=name)
    other = varlen_attention(*arguments, **{**GEMMA, **wrong}, backend=name)
    assert worst(ours, right) < 0.1 * worst(other, right)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_single_queries(name: str) -> None:
    """As in the last layer, where only the last token of each segment asks."""
    skip_unless_it_runs(name, torch.bfloat16, DIM)
    n_q, n_k = [1] * 5, [5200, 1, 130, 700, 4096]
    half = states(n_q, n_k, torch.bfloat16)
    truth = with_gradients(by("reference"), [each.float() for each in half], n_q, n_k, window=4096)
    plain = with_gradients(naive, half, n_q, n_k, window=4096)
    ours = with_gradients(by(name), half, n_q, n_k, window=4096)
    for mine, naive_one, right in zip(ours, plain, truth, strict=True):
        assert worst(mine, right) <= 2 * worst(naive_one, right)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["flash", "flex"])
def test_deterministic_gradients_are_equal_bit_by_bit(name: str) -> None:
    skip_unless_it_runs(name, torch.bfloat16, DIM)
    half = states(PACKED, PACKED, torch.bfloat16)
    once, again = (with_gradients(by(name), half, PACKED, PACKED, window=4096) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def test_flex_under_autocast_and_checkpoints() -> None:
    skip_unless_it_runs("flex", torch.bfloat16, DIM)
    lengths = [300, 40]
    half = states(lengths, lengths, torch.bfloat16)
    exact_ones = with_gradients(flex, half, lengths, lengths, window=100)

    def checkpointed(*given: Any, **named: Any) -> Tensor:
        result: Tensor = checkpoint(flex, *given, use_reentrant=False, **named)
        return result

    with torch.autocast("cuda", dtype=torch.bfloat16):
        full = [each.float() for each in half]
        cast = with_gradients(flex, full, lengths, lengths, window=100)
    again = with_gradients(checkpointed, half, lengths, lengths, window=100)
    for mine, under_autocast, checkpointed_one in zip(exact_ones, cast, again, strict=True):
        assert torch.equal(mine, checkpointed_one)
        # the same products in bfloat16; only the gradient of the output is rounded elsewhere
        assert (mine.float() - under_autocast).norm() <= 1e-2 * mine.float().norm()


def test_masks_of_flex_do_not_wait_for_the_gpu() -> None:
    boundaries, rows = ends(PACKED), bucket(sum(PACKED))
    flex_mask(*visible(boundaries, boundaries, rows, rows, 4096), rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flex_mask(*visible(boundaries, boundaries, rows, rows, 4096), rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def results(settings: ModelSettings, device: str, share: bool, widen: bool = False) -> tuple[Tensor, Tensor, str]:
    """Logits, gradients of all that is trained, and the attention backend that was used."""
    model = classifier(settings)
    dtype = "float32" if widen else settings.dtype
    model = (model.float() if widen else model).to(device)
    batch = (shared_batch(swap_pairs(), 4) if share else pack(LENGTHS)).pin_memory().to(device)
    with compute_in(torch.device(device), dtype):
        logits = model(batch)
    loss_sum(logits, batch.label).backward()
    grads = torch.cat([parameter.grad.reshape(-1) for parameter in trainable(model.model).values()])
    used = used_backends(model)
    assert used == attention_choice(model.model, dtype, training=True).name
    return logits.detach().cpu(), grads.cpu(), used


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["auto", "flex", "blockwise", "reference"])
@pytest.mark.parametrize("share", [False, True])
def test_logits_and_gradients_equal_those_of_the_cpu(gemma2: Path, name: str, share: bool) -> None:
    """In float32, where `auto` is flex or blockwise."""
    if name != "auto":
        skip_unless_it_runs(name, torch.float32, 32)
    cpu = results(exact(gemma2), "cpu", share)
    cuda = results(exact(gemma2, attention=name), "cuda", share)
    assert name in ("auto", cuda[2])
    assert max(relative(cuda[at], cpu[at]) for at in (0, 1)) < 1e-4  # type: ignore[arg-type, type-var]


@pytest.mark.parametrize("name", ["flash", "flex", "blockwise"])
@pytest.mark.parametrize("share", [False, True])
def test_in_bfloat16_a_model_is_as_near_as_with_the_reference(base: Path, name: str, share: bool) -> None:
    skip_unless_it_runs(name, torch.bfloat16, DIM)
    settings = exact(base, dtype="bfloat16", attention="reference")
    truth = results(settings, "cpu", share, widen=True)
    plain = results(settings, "cuda", share)
    ours = results(settings.model_copy(update={"attention": name}), "cuda", share)
    assert ours[2] == name
    for at in (0, 1):
        assert relative(ours[at], truth[at]) <= 2 * relative(plain[at], truth[at])  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_four_bit_training_step(base: Path, name: str, dtype: str) -> None:
    skip_unless_it_runs(name, getattr(torch, dtype), DIM)
    model = classifier(exact(base, quantization="nf4", dtype=dtype, attention=name)).to("cuda")
    batch = pack(LENGTHS).to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(batch)
    loss_sum(logits, batch.label).backward()
    assert used_backends(model) == name
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(model.model).values())


@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_policies_and_fused_parts_change_no_number(base: Path, name: str, dtype: str) -> None:
    """Each policy, plain and with all parts fused, against nothing recomputed and nothing fused."""
    skip_unless_it_runs(name, getattr(torch, dtype), DIM)
    found, batch = {}, pack([400, 1, 90, 80, 330]).to("cuda")
    for fuse in ("none", PARTS):
        for policy in POLICIES:
            settings = exact(base, dtype=dtype, quantization="nf4", checkpointing=policy, fuse=fuse, attention=name)
            model = classifier(settings).to("cuda").train()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                loss_sum(model(batch), batch.label).backward()
            found[fuse, policy] = torch.cat([each.grad.reshape(-1) for each in trainable(model.model).values()])
    bound = 0.1 if dtype == "bfloat16" else 1e-4
    for key, grads in found.items():
        assert (grads - found["none", "none"]).norm() / found["none", "none"].norm() < bound, key


def test_each_policy_holds_less_than_the_one_before(gemma2: Path) -> None:
    model = classifier(exact(gemma2, fuse=PARTS, attention="blockwise")).to("cuda").train()
    batch, held = pack([400] * 5).to("cuda"), []
    for policy in POLICIES:
        set_policies(model.model, [policy] * 3)
        for _ in range(2):  # the first compiles
            before = torch.cuda.memory_allocated()
            loss = loss_sum(model(batch), batch.label)
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
            model.zero_grad()
        held.append(kept)
    assert held == sorted(held, reverse=True) and held[0] > 2 * held[-1]


def test_nothing_is_left_of_a_forward_that_ran_out_of_memory(gemma2: Path) -> None:
    model = classifier(exact(gemma2, fuse=PARTS, attention="blockwise")).to("cuda").train()
    batch = pack([400] * 5).to("cuda")
    backbone(model.model).layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    for policy in POLICIES:
        set_policies(model.model, [policy] * 3)
        for turn in range(2):
            before = torch.cuda.memory_allocated()
            with pytest.raises(MemoryError):
                model(batch)
            gc.collect()
            assert not turn or torch.cuda.memory_allocated() == before, policy


@pytest.mark.parametrize("name", ["flash", "blockwise"])
def test_the_probe_measures_on_this_card(base: Path, tmp_path: Path, name: str) -> None:
    skip_unless_it_runs(name, torch.bfloat16, DIM)
    recipe = tiny_recipe(
        tmp_path, base, "model.checkpointing=auto", f"model.attention={name}", "model.dtype=bfloat16"
    )  # fmt: skip
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(recipe.model.base))
    trainer = trainer_for(recipe, data, adapt(load_base(recipe.model, CLASSES), recipe.model), tmp_path)
    assert trainer.recompute_plan is not None and trainer.recompute_plan.peak is not None
    assert (
        trainer.recompute_plan.policies == ["none"] * 3
        and 0 < trainer.recompute_plan.peak < trainer.recompute_plan.limit
    )


@pytest.mark.parametrize("name", ["flash", "flex"])
def test_a_backend_that_is_believed_to_run_was_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From within what a layer may be in; and an error of its own is the reason."""
    monkeypatch.setattr(trial, "_outcomes", {})
    skip_unless_it_runs(name, torch.bfloat16, DIM)
    assert [(key[0], key[1].training) for key in trial._outcomes] == [(name, True)]
    monkeypatch.setattr(trial, "_outcomes", {})
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16):
        assert BACKENDS[name].supports(card_of("cuda"), torch.bfloat16, DIM, 50.0, True) is None
    monkeypatch.setattr(trial, "_outcomes", {})

    def lacking(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("this build has no such heads")

    monkeypatch.setattr(f"arena.model.attention.{name}.{name}", lacking)
    assert "does not run here: this build has no such heads" in str(
        BACKENDS[name].supports(card_of("cuda"), torch.bfloat16, DIM, 50.0, True)
    )


@pytest.mark.parametrize("head_dim", [64, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_card_has_tiles_for_flex(head_dim: int, dtype: torch.dtype) -> None:
    """Whatever shared memory the card has, and also for heads that torch has no tiles for."""
    card = card_of("cuda")
    if card.capability < (8, 0) or cannot_compile() is not None:
        pytest.skip(f"flex: {card.name} is too old, or there is no compiler")
    assert BACKENDS["flex"].supports(card, dtype, head_dim, 50.0, True) is None
