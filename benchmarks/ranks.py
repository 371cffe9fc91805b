"""What processes that train together share, timed: `torchrun --nproc_per_node 2 -m benchmarks.ranks gradients`.

`gradients` are summed in three ways: a call for each weight, flat buckets as training uses, and DDP, which sums while
the last micro-batch is still in its backward. Each rank has as many micro-batches as the others here, without which DDP
would wait for ever. `evaluation` is that of the demo's held-out rows, by one process alone and by all. Settings of the
demo's recipe may follow. On CPUs, set the environment variable `ACCELERATE_USE_CPU` to `true`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from arena.config import load_recipe
from arena.data.prepare import prepare_fold
from arena.demo.synthetic import ensure_demo
from arena.distributed import device_name, start
from arena.inference.evaluate import Evaluation
from arena.model.backbone import load_base, load_tokenizer
from arena.model.classifier import loss_sum
from arena.model.language_model import packed_model
from arena.model.tuning import adapt
from arena.packing.batch import PackedBatch
from arena.packing.tree import prefixes_for
from arena.progress import console
from arena.ranks import local_first, sum_gradients, together
from arena.settings import Recipe
from arena.tasks import task_of
from arena.tasks.preference import CLASSES
from arena.training.batches import open_fold
from arena.training.optimizer import trainable

ROUNDS, MICRO_BATCHES = 5, 2

Way = Callable[[], None]


def main() -> None:
    """Times what the command names."""
    what, *settings = sys.argv[1:] or [""]
    measured = {"gradients": gradients, "evaluation": evaluation}
    if what not in measured:
        raise ValueError(f"say what to time, {' or '.join(measured)}, not {what!r}")
    measured[what](settings)


def _started(recipe: Recipe) -> Accelerator:
    """The ranks, of which there must be several: without the variable, processes on CPUs do not know of each other."""
    accelerator = start(recipe.seed)
    if accelerator.num_processes == 1:
        raise ValueError("start several processes with torchrun, on CPUs with ACCELERATE_USE_CPU set to true")
    return accelerator


def gradients(settings: list[str]) -> None:
    """Prints the time of a step each way, and how many calls and how many numbers it exchanges."""
    little = ["prompt.max_length=256", "packing.budget=512"]  # little work to hide the sums in
    recipe = load_recipe("demo", [*little, *settings])
    accelerator = _started(recipe)
    model = adapt(load_base(recipe.model, CLASSES), recipe.model)
    classifier = packed_model(model).to(accelerator.device).train()
    loader = open_fold(recipe)
    every = [each for step, _ in zip(loader, range(3 * accelerator.num_processes), strict=False) for each in step]
    first = MICRO_BATCHES * accelerator.process_index
    own = [each.to(accelerator.device) for each in every[first : first + MICRO_BATCHES]]
    parameters = list(trainable(model).values())
    with torch.no_grad():
        for each in parameters:  # a new adapter's second matrix is zero, and then has no gradient but zero
            each.add_(torch.randn_like(each) * 0.01)
    shared = DistributedDataParallel(classifier, bucket_cap_mb=64)
    ways: dict[str, Way] = {
        "a call for each weight": lambda: _one_by_one(accelerator, classifier, own, parameters),
        "flat buckets": lambda: _flat(accelerator, classifier, own, parameters),
        "DDP": lambda: _ddp(shared, own),
        "no sum at all": lambda: _backward(classifier, own),
    }
    summed, lines = {}, []
    for name, way in ways.items():
        calls = _calls(way, parameters)
        summed[name] = torch.cat([each.grad.reshape(-1) for each in parameters if each.grad is not None])
        lines.append((name, calls))
    times = {name: min(_time(accelerator, way, parameters) for _ in range(ROUNDS)) for name, way in ways.items()}
    count = sum(each.numel() for each in parameters)
    scale = {"DDP": accelerator.num_processes}  # its mean is over the ranks
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} processes, {device_name(accelerator.device)}")
        print(f"{len(parameters)} trained weights, {count:,} numbers")
        for name, calls in lines:
            off = float((summed[name] * scale.get(name, 1) - summed["flat buckets"]).norm())
            off /= float(summed["flat buckets"].norm())
            print(f"{name:24}{times[name]:8.3f} s a step,{calls:4} calls, gradient off by {off:.1e}")
    accelerator.state.destroy_process_group()


def evaluation(settings: list[str]) -> None:
    """Prints the time of evaluating the held-out rows by the first process alone and by all, taken in turns."""
    recipe = load_recipe("demo", settings)
    accelerator = _started(recipe)
    console.quiet = True
    held_out = local_first(accelerator, lambda: _held_out(recipe))
    classifier = packed_model(adapt(load_base(recipe.model, CLASSES), recipe.model)).to(accelerator.device)

    def alone() -> None:
        if accelerator.is_main_process:
            held_out.probabilities(classifier, dtype=recipe.model.dtype)

    def shared() -> None:
        held_out.probabilities(classifier, dtype=recipe.model.dtype, accelerator=accelerator)

    rounds = [[_elapsed(accelerator, way) for way in (alone, shared)] for _ in range(ROUNDS + 1)][1:]  # one to warm up
    if accelerator.is_main_process:
        one, all_ = (min(times) for times in zip(*rounds, strict=True))
        ratios = sorted(shared / alone for alone, shared in rounds)
        print(
            f"{accelerator.num_processes} processes of {torch.get_num_threads()} threads on "
            f"{device_name(accelerator.device)}: {held_out.plan.n_micro_batches} micro-batches of "
            f"{len(held_out.rows):,} held-out rows, {ROUNDS} rounds"
        )
        print(f"by one process {one:.3f} s, by all {all_:.3f} s, at best")
        print(f"ratio {all_ / one:.3f}; in single rounds {ratios[0]:.3f} to {ratios[-1]:.3f}")
    accelerator.state.destroy_process_group()


def _held_out(recipe: Recipe) -> Evaluation:
    """The rows of fold 0 as they are evaluated in training."""
    ensure_demo(recipe)
    task = task_of(recipe)
    data = prepare_fold(recipe, task, 0, load_tokenizer(recipe.model.base))
    prefixes = prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))
    rows, budget = data.eval_rows[data.has_input[data.eval_rows]], recipe.packing.budget
    return Evaluation(task, data.store, rows, orders=range(1), budget=budget, prefixes=prefixes, ids=data.ids)


def _backward(model: nn.Module, own: list[PackedBatch]) -> None:
    for batch in own:
        assert batch.targets is not None
        loss_sum(model(batch), batch.targets).backward()


def _one_by_one(
    accelerator: Accelerator, model: nn.Module, own: list[PackedBatch], weights: list[nn.Parameter]
) -> None:
    _backward(model, own)
    for weight in weights:
        torch.distributed.all_reduce(weight.grad)


def _flat(accelerator: Accelerator, model: nn.Module, own: list[PackedBatch], weights: list[nn.Parameter]) -> None:
    _backward(model, own)
    sum_gradients(accelerator, weights)


def _ddp(model: DistributedDataParallel, own: list[PackedBatch]) -> None:
    with model.no_sync():
        _backward(model, own[:-1])
    _backward(model, own[-1:])


def _calls(way: Way, parameters: list[nn.Parameter]) -> int:
    """The sums over ranks in a step, after one that DDP arranges its buckets by; leaves that step's gradients."""
    found = profile(activities=[ProfilerActivity.CPU])
    way()
    for each in parameters:
        each.grad = None
    with found:
        way()
    return sum(event.count for event in found.key_averages() if event.key.endswith(":all_reduce"))


def _time(accelerator: Accelerator, way: Way, parameters: list[nn.Parameter]) -> float:
    for each in parameters:
        each.grad = None
    return _elapsed(accelerator, way)


def _elapsed(accelerator: Accelerator, way: Way) -> float:
    """The time until the last rank has done it, of ranks that begin together."""
    together(accelerator, lambda: None)
    begin = time.perf_counter()
    way()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return max(together(accelerator, lambda: time.perf_counter() - begin))


if __name__ == "__main__":
    main()
