"""What the server does for a request, apart from HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from arena.data.rows import Cells
from arena.inference.judge import ONE_ORDER, Judge
from arena.serving.body import WRONG, checked, checked_texts, refused
from arena.serving.limits import CLOSE, STOPPING, Limits, RefusedError
from arena.serving.metrics import Metrics
from arena.serving.packer import Job, Packer
from arena.serving.schema import judge_request, rank_request, reads_turns

OPTIONS = ("judge", "prompts")  # of a request that is one row, beside its columns


class Service:
    """Judges by name, with a packer for each base.

    Attributes:
        draining: whether no further request is taken.
    """

    def __init__(self, judges: Mapping[str, Judge], limits: Limits | None = None) -> None:
        for name, judge in judges.items():
            if odd := {"rows", *OPTIONS} & {*judge.task.texts}:
                raise ValueError(f"{name} reads a column {min(odd)}, which means something else in a request")
        self.judges, self.limits, self.metrics = dict(judges), limits or Limits(), Metrics()
        self.draining = False
        self.requests = {name: judge_request(judge.task, self.limits.rows) for name, judge in judges.items()}
        self._rank_request = rank_request(self.limits.answers)
        self._packers: dict[str, Packer] = {}
        for name, judge in self.judges.items():
            beside = (packer for other, packer in self._packers.items() if _share(self.judges[other], judge))
            self._packers[name] = next(beside, None) or Packer(self.limits, self.metrics)
        self.metrics.watch(lambda: sum(packer.waiting_rows for packer in self.packers))

    @property
    def packers(self) -> set[Packer]:
        return set(self._packers.values())

    @property
    def is_idle(self) -> bool:
        """Whether every accepted request is answered."""
        return all(packer.is_idle for packer in self.packers)

    def close(self) -> None:
        """Answers what was accepted, and ends the threads."""
        for packer in self.packers:
            packer.close()

    def facts(self) -> list[dict[str, Any]]:
        """What can be known of the judges without asking one."""
        return [
            {
                "name": name, "task": judge.task.name, "classes": list(judge.task.classes),
                "columns": list(judge.task.texts), "reads_turns": reads_turns(judge.task),
                "ranks": judge.task.tie is not None and _reads_all_orders(judge), "examples": dict(judge.task.examples),
                "invented": all(model.recipe.data.synthetic_rows is not None for model in judge.models),
                "limits": {"rows": self.limits.rows, "answers": self.limits.answers},
            }
            for name, judge in self.judges.items()
        ]  # fmt: skip

    def judge_schema(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The JSON schema of a request for verdicts, and examples."""
        forms, examples = list[dict[str, Any]](), dict[str, Any]()
        for name, model in self.requests.items():
            form = model.model_json_schema()
            row = form.pop("$defs")["Row"]
            form["properties"]["rows"]["items"] = row
            options = {key: form["properties"][key] for key in OPTIONS}
            several = [{**row, "properties": {**row["properties"], **options}}, form]
            forms += [each for each in several if each not in forms]
            examples |= self.judges[name].task.examples
        if examples:
            examples["Several rows"] = {"rows": list(examples.values())[:2], "prompts": True}
        return {"anyOf": forms}, examples

    def rank_schema(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The JSON schema of a request to rank, and an example."""
        answers = ["Rome.", "It is Rome.", "Milan, I believe."]
        return self._rank_request.model_json_schema(), {
            "A capital": {"prompt": "What is the capital of Italy?", "answers": answers}
        }

    def judge_job(self, body: dict[str, Any]) -> Job:
        """A request for verdicts: rows, or one row. Raises `RefusedError`."""
        name = self.named(body)
        if "rows" not in body:
            options = {key: body.pop(key) for key in OPTIONS if key in body}
            body = {"rows": [body], **options}
        asked = checked(self.requests[name], body)
        rows = [row.model_dump(by_alias=True) for row in asked.rows]
        return self._job(name, rows, asked.prompts)

    def rank_job(self, body: dict[str, Any]) -> Job:
        """A request for the verdicts on all pairs of some answers. Raises `RefusedError`."""
        name = self.named(body)
        asked = checked(self._rank_request, body)
        task = self.judges[name].task
        if task.tie is not None and not _reads_all_orders(self.judges[name]):
            raise RefusedError(WRONG, f"answers cannot be compared fairly: {ONE_ORDER}")
        try:
            return self._job(name, task.pairs(asked.prompt, asked.answers), False)
        except ValueError as error:
            raise RefusedError(WRONG, str(error)) from None
        except RefusedError as error:
            pairs = list(combinations(range(len(asked.answers)), 2))
            raise refused([_of_answers(each, task.texts, pairs) for each in error.problems]) from None

    def submit(self, job: Job) -> None:
        """Queues a job, whose `answer` then comes. Raises `RefusedError`."""
        if self.draining:
            raise RefusedError(503, STOPPING, headers=CLOSE)
        self._packers[job.name].submit(job)

    def named(self, body: Mapping[str, Any]) -> str:
        """The name of the judge that a request is for, by default the first one. Raises `RefusedError`."""
        name = body.get("judge")
        if name is None or (isinstance(name, str) and name in self.judges):
            return name or next(iter(self.judges))
        problem = {"row": None, "field": "judge", "what": f"is not one of {', '.join(self.judges)}"}
        raise RefusedError(404 if isinstance(name, str) else WRONG, f"judge: {problem['what']}", [problem])

    def _job(self, name: str, rows: list[Cells], prompts: bool) -> Job:
        judge = self.judges[name]
        return Job(name, judge, checked_texts(judge.task, rows, self.limits), prompts)


def _of_answers(problem: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """A problem of a row that compares two answers, in the fields of the request."""
    names = dict(zip(texts, ("prompt", *(f"answers[{at}]" for at in pairs[problem["row"]])), strict=True))
    fields = [names.get(field, field) for field in problem["field"].split(", ")]
    return {**problem, "row": None, "field": ", ".join(fields)}


def _reads_all_orders(judge: Judge) -> bool:
    """Whether a judge reads each row in all orders: in one order, a ranking depends on how the answers are listed."""
    return all(model.recipe.reads_all_orders for model in judge.models)


def _share(one: Judge, other: Judge) -> bool:
    """Whether two judges have a base in memory in common."""
    return any(model.shares_base(beside) for model in one.models for beside in other.models)
