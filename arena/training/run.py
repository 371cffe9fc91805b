"""One fold from files to a saved judge: prepare, train, write the results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from arena.config import run_place
from arena.data.files import data_file
from arena.data.prepare import FoldData, prepare_fold
from arena.distributed import deterministic, device_name, peak_memory, start
from arena.inference.saved import SavedJudge, save_judge
from arena.model.attention.varlen import used_backends
from arena.model.backbone import base_config, load_base, load_tokenizer
from arena.model.base_files import base_digest, check_ids, check_length
from arena.model.card import card_of, with_dtype
from arena.model.exactness import check_exact
from arena.model.language_model import check_head
from arena.model.lora import first_trained_layer
from arena.model.memory.estimate import fit
from arena.model.sharding import check_sharding, is_sharded
from arena.model.tuning import adapt
from arena.packing.tree import Prefixes, prefixes_for
from arena.progress import console, optional
from arena.ranks import local_first, on_every_rank, on_first_rank, together
from arena.settings import Recipe
from arena.stopping import stopping
from arena.storage.files import fingerprint, remove_scratch, write_json
from arena.storage.lock import locked
from arena.storage.mirror import Mirror
from arena.tasks import task_of
from arena.training.checkpoint import load_weights
from arena.training.checkpoint_manager import ranking_by
from arena.training.fit_kinds import fit_kinds, kind_table, taken
from arena.training.held_out import scores, write_oof
from arena.training.log import start_tracking, tracking, upload_model
from arena.training.optimizer import trainable
from arena.training.references import REFERENCES, references
from arena.training.run_directory import create_run_directory, finished_metrics, require_shared, run_identity
from arena.training.scores import score_tables
from arena.training.trainer import Trained, Trainer

# of a finished run, besides its model
FILES = ("recipe.yaml", "log.jsonl", "oof.csv", "oof-last.csv", "metrics.json")
PATIENT, HURRIED = 600.0, 15.0  # seconds that a run waits for its mirror when it finishes, and when it is interrupted


def run_fold(recipe: Recipe, fold: int, runs: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Trains fold `fold` into `runs/<recipe>/fold<k>` and returns its metrics; an interrupted run is resumed.

    A finished run of the same recipe and data is not trained again; any other finished run is set aside first.

    Args:
        fresh: set aside whatever run the folder holds and start again.

    Returns:
        The content of `metrics.json`; on processes other than the first, only the recipe's name and the fold.

    Raises:
        ValueError: settings or files are invalid, the folder holds an interrupted run of another recipe, or another
            process is using it.
        Stopped: a signal or `train.max_seconds` ended the run; everything is saved, and the same call resumes.
    """
    folder = run_place(runs, f"{recipe.name}/fold{fold}")
    resume = recipe.train.resume
    if resume not in ("auto", "best", "never") and not Path(resume).is_dir():
        raise ValueError(f"train.resume={resume}: write auto, best, never, or the path of a checkpoint folder")
    ranking_by(recipe.train.best_metric, task_of(recipe).metrics)  # reports unknown names before anything is loaded
    accelerator = start(recipe.seed, recipe.train.track, str(folder))
    console.quiet = not accelerator.is_main_process
    alone = locked(folder) if accelerator.is_main_process else nullcontext()
    with alone, deterministic(recipe.train.deterministic), console.showing(recipe.train.log_level):
        for place in (folder, folder / "checkpoints") if accelerator.is_main_process else ():
            remove_scratch(place)
        return _run(recipe, fold, folder, accelerator, fresh or resume == "never")


def _run(requested: Recipe, fold: int, folder: Path, accelerator: Accelerator, fresh: bool) -> dict[str, Any]:
    """`run_fold` in a folder that is locked for this process."""
    main = accelerator.is_main_process
    console.print(f"{requested.name}, fold {fold}: rows of {requested.data.path}, base {requested.model.base}")
    recipe, data, prefixes, tokenizer = _prepare(requested, fold, accelerator)
    run = run_identity(recipe, data.fingerprint, base_digest(recipe.model.base, recipe.model.revision))
    metrics = None if fresh else together(accelerator, lambda: finished_metrics(folder, run))[0]
    if metrics is not None:
        console.print(f"{folder} is finished: there is nothing to train (--fresh trains it again)")
        return metrics

    def load() -> Any:
        return adapt(load_base(recipe.model, data.task.classes, announce=True), recipe.model)

    model = on_every_rank(accelerator, load, patient=True)
    with (
        stopping(recipe.train.max_seconds) as stop,
        _mirror(recipe, folder, run, main, fresh) as mirror,
        tracking(accelerator),
    ):
        trainer = on_every_rank(
            accelerator,
            lambda: Trainer(
                recipe, data, model, folder, accelerator, prefixes=prefixes, identity=run, stop=stop, mirror=mirror
            ),
        )
        # where this call resumed from does not matter to a judge, or to another fold trained with the same recipe
        saved = recipe.model_copy(update={"train": recipe.train.model_copy(update={"resume": "auto"})})

        def begin() -> None:
            if recipe.train.track != "tensorboard":
                start_tracking(accelerator, recipe, fold)
            create_run_directory(folder, run, saved, fresh=fresh)
            if recipe.train.track == "tensorboard":  # it writes files into the folder
                start_tracking(accelerator, recipe, fold)
            if mirror is not None and not fresh and (fetched := mirror.pull(folder)):
                console.print(f"fetched from {recipe.train.mirror}: {', '.join(path.name for path in fetched)}")

        on_first_rank(accelerator, begin, patient=True)  # only now: a run that cannot be trained replaces no other
        on_every_rank(accelerator, lambda: require_shared(folder, run))
        _announce(recipe, requested, data, trainer)
        try:
            trained = trainer.run()
        finally:
            accelerator.state.destroy_process_group()
        metrics = {"recipe": recipe.name, "fold": fold}
        if main:
            found = fit_kinds(data, trained.best.probabilities)
            judge = SavedJudge(folder / "model", saved, data.prior, data.trained_on, run["base"], taken(found))
            if is_sharded(trainer.classifier):
                model = load()
                load_weights(trainer.checkpoints.step(trained.best_step), model)
            save_judge(model, tokenizer, judge)
            _write_predictions(folder, data, trained)
            metrics |= _effort(data, trained, trainer) | {"kinds": kind_table(found)}
            metrics |= {**scores(data, trained.best.probabilities, trained.base), **dict.fromkeys(REFERENCES)}
            write_json(folder / "metrics.json", metrics)  # last: its presence marks the run as finished
            metrics |= _finish(recipe, data, folder, metrics, trained, mirror)
            upload_model(accelerator, recipe, fold, folder / "model")
    return metrics


def _prepare(requested: Recipe, fold: int, accelerator: Accelerator) -> tuple[Recipe, FoldData, Prefixes | None, Any]:
    """The recipe as it runs on the cards of all ranks, the fold's data and what they share, and the tokenizer."""
    task, cards = task_of(requested), together(accelerator, lambda: card_of(accelerator.device))
    # a missing folder is reported first, and a data set of the hub fetched
    local_first(accelerator, lambda: data_file(requested.data.path, "train", requested.data.cache))
    tokenizer = load_tokenizer(requested.model.base, requested.model.revision)
    config = base_config(requested.model)
    check_length(config, requested.prompt.max_length, requested.model.base)
    first_trained_layer(requested.model, config.num_hidden_layers)  # reports a layer that the base lacks
    recipe = with_dtype(requested, min(cards, key=lambda card: card.bfloat16))
    check_sharding(recipe)
    for card in cards:
        recipe = fit(recipe, config, card, accelerator.num_processes if recipe.train.shard else 1)
    check_exact(config, recipe.model, recipe.prompt.max_length)
    if not task.classes:
        check_head(config, recipe.model.base)

    def prepare() -> tuple[FoldData, Prefixes | None]:
        data = prepare_fold(recipe, task, fold, tokenizer)
        return data, prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))

    data, prefixes = local_first(accelerator, prepare)
    check_ids(config, data.store, tokenizer, recipe.model.base)
    return recipe, data, prefixes, tokenizer


def _write_predictions(folder: Path, data: FoldData, trained: Trained) -> None:
    """Those of the held-out rows, by the best checkpoint, and by the last one if that is another."""
    write_oof(folder / "oof.csv", data, trained.best.probabilities)
    if trained.best_step != trained.done.step:
        write_oof(folder / "oof-last.csv", data, trained.last.probabilities)


def _finish(
    recipe: Recipe, data: FoldData, folder: Path, metrics: dict[str, Any], trained: Trained, mirror: Mirror | None
) -> dict[str, Any]:
    """Adds intervals, slices and references, and mirrors the results; whatever fails here is only a warning."""
    added = references(recipe, data, trained.best.probabilities)
    with optional("computing intervals and slices", "metrics.json has the plain metrics"):
        added |= score_tables(data, trained.best, trained.last, trained.base)
    with optional(f"adding intervals, slices and references to {folder / 'metrics.json'}"):
        write_json(folder / "metrics.json", metrics | added)
    shutil.rmtree(folder / "logits", ignore_errors=True)
    if mirror is not None:
        with optional(f"sending the finished run to {recipe.train.mirror}", f"copy {folder} there yourself"):
            mirror.push_files("model", [folder / "model"])
            mirror.push_files("files", [folder / name for name in FILES if (folder / name).is_file()])
    return added


@contextmanager
def _mirror(recipe: Recipe, folder: Path, run: dict[str, str], main: bool, fresh: bool) -> Iterator[Mirror | None]:
    """The mirror that `train.mirror` names, on the first rank; waits for pending uploads when the run ends."""
    if recipe.train.mirror is None or not main:
        yield None
        return
    place = f"{recipe.name}/{folder.name}/{fingerprint(run)}"
    staging = folder.with_name(f".{folder.name}.mirror")
    cost = ranking_by(recipe.train.best_metric, task_of(recipe).metrics).cost
    mirror = Mirror(recipe.train.mirror, place, staging, fresh=fresh or recipe.train.resume != "auto", cost=cost)
    patience = HURRIED
    try:
        yield mirror
        patience = PATIENT
    finally:
        with optional(f"closing the mirror {recipe.train.mirror}"):
            mirror.close(patience)


def _announce(recipe: Recipe, requested: Recipe, data: FoldData, trainer: Trainer) -> None:
    for note in data.notes:
        console.print(note)
    plan = trainer.plan
    count = sum(parameter.numel() for parameter in trainable(trainer.model).values())
    console.print(
        f"{recipe.name}: {len(data.train_rows):,} rows to train on, {len(data.eval_rows):,} held out; "
        f"{plan.n_steps:,} steps, {plan.n_micro_batches:,} micro-batches of at most {plan.budget:,} tokens, "
        f"fill rate {plan.fill_rate:.1%}, {plan.unique_share:.1%} of the examples' tokens computed, the rest shared; "
        f"{count:,} trainable parameters; {device_name(trainer.accelerator.device)}; attention {trainer.attention}"
        + (f"; {plan.ranks} processes" if plan.ranks > 1 else "")
    )
    if plan.budget < requested.packing.budget:
        console.print(
            f"micro-batches hold at most {plan.budget:,} tokens instead of {requested.packing.budget:,}, to fit the "
            f"memory of {device_name(trainer.device)}"
        )
    if trainer.recompute_plan is not None:
        console.print(str(trainer.recompute_plan))
    cut = int((data.store.tokens_cut > 0).sum())
    if cut:
        lacking = 0 if data.store.targets_cut is None else int((data.store.targets_cut > 0).sum())
        console.print(
            f"{cut:,} of {len(data.store):,} examples are cut to {recipe.prompt.max_length:,} tokens"
            + (f"; {lacking:,} of them lack a part of what is to be predicted" if lacking else "")
        )


def _effort(data: FoldData, trained: Trained, trainer: Trainer) -> dict[str, Any]:
    """The size, time and memory of the run."""
    done, plan, model, device = trained.done, trainer.plan, trainer.model, trainer.device
    return {
        "n_eval": len(data.eval_rows),
        "n_train": len(data.train_rows),
        "steps": done.step,
        "best_step": trained.best_step,
        "micro_batches": done.micro_batches,
        "fill_rate": plan.fill_rate,
        "tokens": done.tokens,
        "unique_tokens": done.unique_tokens,
        "tokens_per_second": done.tokens / max(done.seconds, 1e-9),
        "train_seconds": done.seconds,
        "data_wait_seconds": done.waited,
        "peak_memory_bytes": peak_memory(device),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable(model).values()),
        "device": device_name(device),
        "attention_backend": used_backends(model),
    }
