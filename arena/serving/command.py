"""The subcommand `arena serve`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from arena.command_line import command
from arena.config import judge_settings
from arena.options import words_arg
from arena.progress import console, warn

if TYPE_CHECKING:
    from arena.inference.judge import Judge

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SETTINGS = ("judge.", "packing.", "model.base", "model.dtype", "model.attention")
PACKAGES = ("fastapi", "uvicorn", "prometheus-client")
NAME, SETTING = re.compile(r"[\w-]+"), re.compile(r"[a-z_]+(\.[a-z_]+)+")


@dataclass
class Serve:
    """Serve judges over HTTP, with a page to try them out."""

    words: Positional[
        Annotated[
            tuple[str, ...], words_arg("RUN [name=RUN ...] [KEY=VALUE ...]", "Judges, and settings of all of them.")
        ]
    ] = ()
    host: Annotated[str, arg(help="The address to listen on; any but this machine's own needs a token.")] = "127.0.0.1"
    port: Annotated[int, arg(help="The port; 0 takes any that is free.")] = 8000
    token: Annotated[
        str | None,
        arg(
            help="What requests must bring; others can see it, unlike ARENA_TOKEN.", help_behavior_hint="(ARENA_TOKEN)"
        ),
    ] = None
    timeout: Annotated[float, arg(help="Seconds in which a request must be answered.")] = 60.0
    rows: Annotated[int, arg(help="The most rows of a request.")] = 256
    answers: Annotated[int, arg(help="The most answers to rank.")] = 12
    waiting: Annotated[int, arg(help="The most rows that wait for one base; further requests are refused.")] = 2048
    batch_rows: Annotated[int, arg(help="The most rows of several requests that are judged together.")] = 256
    batch_tokens: Annotated[
        int | None,
        arg(help="About how many tokens these have at most.", help_behavior_hint="(the judge's packing.budget)"),
    ] = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")

    def run(self) -> None:
        try:
            from arena.serving.limits import Limits
            from arena.serving.server import Server, bind
        except ModuleNotFoundError as error:
            install = command("pip", "install", *PACKAGES)
            raise ValueError(f"`arena serve` needs further packages ({error}): run `{install}`") from None
        from arena.distributed import fix_threads, in_a_thread

        token = os.environ.get("ARENA_TOKEN") or None if self.token is None else self.token
        check_token(token, self.host)
        limits = Limits(
            rows=self.rows, answers=self.answers, seconds=self.timeout, waiting_rows=self.waiting,
            batch_rows=self.batch_rows, batch_tokens=self.batch_tokens,
        )  # fmt: skip
        socket, names = bind(self.host, self.port), named(self.words)
        fix_threads()
        judges = in_a_thread(lambda: load(*names, self.runs))  # the packer's thread alone computes from here on
        reports = {name: report_files(judge) for name, judge in judges.items()}
        Server(judges, limits=limits, token=token, reports=reports).run([socket])


def check_token(token: str | None, host: str) -> None:
    """Raises `ValueError` if there is no token although other machines could ask, or if it cannot be sent."""
    if token is None and host not in LOOPBACK:
        raise ValueError(f"--host {host} lets other machines ask: set a token in ARENA_TOKEN, or with --token")
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise ValueError("the token must be ASCII letters, digits and signs, without spaces")
    if token is not None and len(token) < 16:
        warn("warning: the token has fewer than 16 characters and can be guessed")


def named(words: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The judges by name, and settings, that words give. Raises `ValueError` for words that cannot be used."""
    judges, settings = dict[str, str](), list[str]()
    for word in words:
        key, is_given, run = word.partition("=")
        if is_given and SETTING.fullmatch(key):
            settings.append(word)
            continue
        is_name = bool(is_given) and NAME.fullmatch(key) is not None
        name = key if is_name else re.sub(r"[^\w-]+", "-", Path(word).name)
        if name in judges:
            raise ValueError(f"two judges are called {name}: name one, as in other={word}")
        judges[name] = run if is_name else word
    if not judges:
        raise ValueError(f"name a judge, as in `{command('arena', 'serve', 'demo')}`")
    return judges, settings


def load(named: dict[str, str], settings: list[str], runs: Path) -> dict[str, Judge]:
    """Loads judges. Those on one base share it."""
    from arena.inference.judge import Judge

    judges: dict[str, Judge] = {}
    for name, run in named.items():
        console.print(f"loading {name}")
        changes = judge_settings(tuple(settings), SETTINGS)
        judges[name] = Judge.from_pretrained(run, settings=changes, runs=runs, beside=list(judges.values()))
    return judges


def report_files(judge: Judge) -> list[Path]:
    """Where the report of a judge's fold or of its run would be; it may be written while the judge is served."""
    return [folder / "report.html" for folder in judge.models[0].folder.resolve().parents[:2]]
