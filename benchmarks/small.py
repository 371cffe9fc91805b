"""The benchmark of a small model: the same weights, rows and precision read in several ways, timed in turn.

Variants take turns (a, b, c, d, e, a, b, ...), so that a machine that slows down slows all of them; medians are
compared. First they must agree on the numbers.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config
from tyro.conf import Suppress, arg

from arena.config import load_recipe
from arena.distributed import device_name, fix_threads
from arena.progress import console, progress
from arena.storage.files import local_path
from benchmarks.agreement import check_agreement
from benchmarks.cells import Cell, Settings
from benchmarks.machine import provenance
from benchmarks.models import CLASSIFIERS, make_model, set_checkpointing
from benchmarks.packing import measure_packing
from benchmarks.passes import PAD, Taken, Work, infer, train, work_of
from benchmarks.small_report import as_text, write_bench
from benchmarks.timing import peak, reset_peak
from benchmarks.variants import BATCH, ONCE, TASKS, VARIANTS, cells_of
from benchmarks.workload import COMPETITION_MEAN, Workload, field_lengths, make_workload

AUTOJ_MEAN = 887.0  # tokens of an example
WORKLOADS = ("autoj", "competition")
WARM_UP_ROWS = 2
# A Gemma-2 whose layers spend most of their time in linear layers, as those of the large ones do. Every variant's time
# grows with the number of layers, so that more of them mean waiting more than other ratios. What they do change is the
# weight of the last layer, of which ours computes the last tokens only: a quarter here, a 42nd in Gemma-2-9B.
SIZE: dict[str, float] = {
    "hidden": 512, "intermediate": 2048, "heads": 4, "kv_heads": 2, "head_dim": 128, "window": 4096,
    "softcap": 50.0, "vocabulary": 8192,
}  # fmt: skip


@dataclass
class Small:
    """Time our packed batches beside transformers' own, on the same weights, rows and precision."""

    rows: Annotated[int, arg(help="Auto-J conversations in a step, a multiple of 8, at most 160.")] = 32
    repeats: Annotated[int, arg(help="How often each variant is timed, in turn; (e) is timed once.")] = 3
    check_rows: Annotated[int, arg(help="Conversations on which all variants must agree first.")] = 2
    layers: Annotated[int, arg(help="Of the random Gemma-2.")] = 4
    budget: Annotated[int, arg(help="Tokens in a packed micro-batch at most.")] = 8192
    dtype: Annotated[Literal["bfloat16", "float32"], arg(help="Precision, the same for all.")] = "bfloat16"
    variants: Annotated[str, arg(help="Some of the letters abcde; times are compared with the first.")] = "abcde"
    workloads: Annotated[tuple[str, ...], arg(help="Whose lengths: autoj, competition.")] = WORKLOADS
    out: Annotated[Path, arg(help="The folder for bench-cpu (or bench-gpu) .json, .md and .png.")] = Path("docs")
    longest: Suppress[int] = 4096  # tokens at which examples are cut
    seed: Suppress[int] = 0
    size: Suppress[dict[str, float]] = field(default_factory=lambda: dict(SIZE))

    def check(self) -> None:
        """Raises `ValueError` for a setting that cannot be measured."""
        if self.rows % BATCH or self.rows < 1:
            raise ValueError(f"--rows {self.rows} must be a multiple of the padded batches' {BATCH} examples")
        if self.longest > self.budget:
            raise ValueError(f"--budget {self.budget} cannot hold an example of {self.longest} tokens")
        if not self.variants or set(self.variants) - set(VARIANTS):
            raise ValueError(f"--variants {self.variants}: name some of the letters {''.join(VARIANTS)}")
        if not self.workloads or set(self.workloads) - set(WORKLOADS):
            raise ValueError(f"--workloads {' '.join(self.workloads)}: name some of {', '.join(WORKLOADS)}")
        if self.repeats < 1 or self.check_rows < 2:
            raise ValueError("--repeats must be 1 at least, and --check-rows 2")

    def rows_of(self, workload: str) -> int:
        """Conversations in a step, a multiple of `BATCH`; of the competition's longer ones as many tokens, or so."""
        share = AUTOJ_MEAN / COMPETITION_MEAN if workload == "competition" else 1.0
        return max(BATCH, int(self.rows * share) // BATCH * BATCH)

    def about(self) -> dict[str, Any]:
        """The settings as they are written."""
        given = {key: value for key, value in asdict(self).items() if key not in ("out", "layers")}
        return {
            **given, "workloads": list(self.workloads), "batch": BATCH, "checkpointing": True,
            "size": {**self.size, "layers": self.layers},
        }  # fmt: skip

    def run(self) -> None:
        """Measures, prints and writes."""
        local_path(self.out, "--out")
        self.check()
        self.out.mkdir(parents=True, exist_ok=True)  # half an hour later would be late to find that it cannot be
        result = run_small(self)
        console.print(as_text(result), soft_wrap=True, markup=False, highlight=False)
        console.print(f"written: {', '.join(map(str, write_bench(result, self.out)))}")


def run_small(small: Small, packing_examples: int | None = None) -> dict[str, Any]:
    """Checks that the variants agree, times them, packs lengths; everything that `write_bench` writes.

    Args:
        packing_examples: lengths in the packing tables, where not the competition's number.

    Raises:
        ValueError: variants that do not agree.
    """
    fix_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = {each: field_lengths(each, small.rows_of(each), small.seed) for each in small.workloads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_of(small, folder)
        half = -(-small.check_rows // 2)
        fields = np.concatenate([field_lengths(each, half, small.seed) for each in WORKLOADS])

        def workload(name: str, fields: np.ndarray) -> Workload:
            vocabulary = int(small.size["vocabulary"])
            return make_workload(name, fields, folder, vocabulary=vocabulary, longest=small.longest, seed=small.seed)

        agreement = check_agreement(small.variants, workload("check", fields), settings, device)
        models, few = load_models(settings, device), workload("warm-up", fields[:WARM_UP_ROWS])
        measured: list[dict[str, Any]] = []
        for each in small.workloads:
            rows = workload(each, lengths[each])
            for task in TASKS:
                measured += time_task(rows, few, task, models, small, settings, device)
    return {
        **provenance(),
        "device": device_name(device),
        "settings": small.about(),
        "agreement": asdict(agreement),
        "measured": measured,
        "packing": measure_packing(**({} if packing_examples is None else {"examples": packing_examples})),
    }


def settings_of(small: Small, folder: Path) -> Settings:
    """Makes the base in the folder, and the settings of all cells."""
    overrides = [
        f"model.base={make_base(folder / 'base', small)}", f"model.dtype={small.dtype}", "model.quantization=nf4",
        f"packing.budget={small.budget}", f"prompt.max_length={small.longest}", f"seed={small.seed}",
    ]  # fmt: skip
    return Settings(load_recipe("demo", overrides), small.rows, small.rows, small.repeats, small.seed)


def make_base(folder: Path, small: Small) -> Path:
    """Writes a random Gemma-2 whose weights are large enough for attention, soft cap and window to matter."""
    torch.manual_seed(small.seed)
    size: dict[str, Any] = small.size
    config = Gemma2Config(
        vocab_size=size["vocabulary"], hidden_size=size["hidden"], intermediate_size=size["intermediate"],
        num_hidden_layers=small.layers, num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        head_dim=size["head_dim"], query_pre_attn_scalar=size["head_dim"], sliding_window=size["window"],
        attn_logit_softcapping=size["softcap"], max_position_embeddings=8192,
        initializer_range=1.4 * size["hidden"] ** -0.5, pad_token_id=PAD, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    # as published weights are; so 4-bit weights are the same in every precision
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(folder)
    return folder


def load_models(settings: Settings, device: torch.device) -> dict[tuple[bool, bool], nn.Module]:
    """The same weights three times, by whether the model is ours and whether it judges.

    transformers' model is there once to train and once to judge: on some CPUs bitsandbytes repacks 4-bit weights in
    place in an evaluation forward, after which a training step reads garbage.
    """

    def load(key: str) -> nn.Module:
        model: nn.Module = make_model(VARIANTS[key][1], settings.recipe, device, settings.seed, stored=True)
        return model

    ours = load("a")
    return {(True, False): ours, (True, True): ours, (False, False): load("c"), (False, True): load("c")}


def time_task(
    workload: Workload, few: Workload, task: str, models: Mapping[tuple[bool, bool], nn.Module], small: Small,
    settings: Settings, device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    """Times a task by all variants in turn, after each has done it on a `few` rows.

    What a real run does once for its whole data (planning, finding what is shared) is done beforehand.

    Returns:
        For each variant `seconds` of each repeat; `logical_tokens` of the examples; `computed_tokens`, those the model
        was given; `batches`; `peak_bytes`, the most that was held above what was held before, models included in the
        latter (None where the machine does not tell).
    """
    cells = cells_of(small.variants, task)
    works = {key: work_of(cell, workload, settings) for key, cell in cells.items()}

    def begin(cell: Cell, work: Work, count: int) -> Iterator[Taken]:
        classifier = CLASSIFIERS[cell.way](models[cell.way == "ours", cell.task == "infer"])
        if cell.task == "train":
            set_checkpointing(classifier, cell, settings.recipe, None)
        return (train if cell.task == "train" else infer)(classifier, work, settings, count, device)

    counts = {key: 1 if key in ONCE else small.repeats for key in cells}
    seconds: dict[str, list[float]] = {key: [] for key in cells}
    peaks: dict[str, list[int]] = {key: [] for key in cells}
    with progress(f"{workload.name}, {TASKS[task]}", sum(counts.values()) + len(cells), "passes") as advance:
        for key, cell in cells.items():
            list(begin(cell, work_of(cell, few, settings), 1))
            advance(1, note=key)
        gc.collect()  # what the warm-up left would count as freed by the first variant
        runs = {key: begin(cell, works[key], counts[key]) for key, cell in cells.items()}
        for repeat in range(small.repeats):
            for key in (key for key in cells if repeat < counts[key]):
                before = reset_peak(device)
                seconds[key].append(next(runs[key]).seconds)
                peaks[key] += [] if before is None else [peak(device) - before]
                advance(1, note=f"{key} {seconds[key][-1]:.1f} s")
    return [
        {
            "workload": workload.name, "task": task, "variant": key, "title": VARIANTS[key][0],
            "seconds": seconds[key], "batches": work.micro_batches, "logical_tokens": work.logical,
            "computed_tokens": work.computed, "peak_bytes": max(peaks[key], default=None),
        }
        for key, work in works.items()
    ]  # fmt: skip
