"""What the commands share: progress, tables, JSON, and errors as one line."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import logging
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from milan_pipe.cli import json_log
from milan_pipe.cli.stderr import Stderr
from milan_pipe.errors import (
    MilanError,
    ReportedElsewhereError,
    StoppedError,
    one_line,
    printable,
    printable_json,
    resource_hint,
)
from milan_pipe.units import rate, size

console = Console(file=cast("IO[str]", Stderr()))
results = Console()
# No more: some child processes close every descriptor up to the limit.
_MOST_FILES = 65536
_LOG_SECONDS = 30.0
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_labelled("warning", "bold yellow", one_line(record.getMessage()))


def show_warnings_as_lines() -> None:
    """Print a warning, or what a library logs as one, as one line without the place in the code that it came from."""
    logging.lastResort = _Lines(logging.WARNING)

    def show_one(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, (RuntimeWarning, UserWarning)):
            print_labelled("warning", "bold yellow", " ".join(str(message).split()))

    warnings.showwarning = show_one


def print_labelled(label: str, style: str, text: str) -> None:
    """One line on stderr, however long, that begins with a label."""
    if json_log.wanted():
        event: json_log.Event = "warning" if label == "warning" else "error"
        json_log.tell(event, message=printable(text if label == event else f"{label}: {text}"))
    else:
        console.print(Text.assemble((f"{label}:", style), " ", printable(text)), soft_wrap=True)


def plain(text: str, **style: Any) -> Text:
    """Text for a table or line: neither markup nor control characters in it have an effect."""
    return Text(printable(text), **style)


def results_on(as_json: bool) -> Console:
    """Where the tables of a report go: stdout, unless that is its JSON's."""
    return console if as_json else results


def show(title: str, rows: dict[str, str], report: Any, as_json: bool) -> Any:
    """Print a report on stdout, as a table or with `as_json` as one line of JSON, the table then on stderr; returns it.

    Where there is no report, the table is all.
    """
    if json_log.wanted():
        json_log.tell_report(printable(title), rows if report is None else dataclasses.asdict(report))
    # `Text`, as paths may hold what rich takes for markup; a title of its own, as a table wraps it to its width.
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, plain(value))
    results_on(as_json).print(plain(title, style="bold"), soft_wrap=True)
    results_on(as_json).print(table)
    if as_json and report is not None:
        print_json(dataclasses.asdict(report))
    return report


def print_json(values: dict[Any, Any]) -> None:
    """One line of JSON on stdout; settings in it are dumped."""
    as_text = printable_json if (sys.stdout.encoding or "").lower() in ("utf-8", "utf8") else json.dumps
    text = as_text(values, default=lambda part: part.model_dump(mode="json"))
    sys.stdout.write(f"{text}\n")


# How the values of a progress line are written for people.
_TEXTS: dict[str, Callable[[Any], str]] = {
    "views": lambda count: f"{count:,} views",
    "images": lambda count: f"{count:,} images",
    "bad": lambda count: f"{count:,} skipped",
    "workers": lambda count: f"{count} workers" if count > 1 else "",
    "epoch": lambda number: f"ep {number}",
    "loss": lambda loss: f"loss {loss:.3f}",
    "lr": lambda lr: f"lr {lr:.0e}".replace("e-0", "e-"),
    "data_wait": lambda share: f"wait {100 * share:.0f} %",
    "memory": size,
    "score": lambda share: f"score {100 * share:.1f} %",
    "zero_shot": lambda share: f"zero-shot {100 * share:.2f} %",
}


def _text(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{rate(value)}/s" if name.endswith("_per_second") else _TEXTS[name](value)


def _texts(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _text(name, value) for name, value in values.items()}


@contextmanager
def progress(*columns: str, **fixed: str) -> Iterator[Callable[..., None]]:
    """Progress; call what it yields with steps done, steps in all, and the values of `columns` as numbers or words.

    One line that moves on a terminal; elsewhere, as in a log, a new line every half minute, of text or of JSON.
    """
    values: dict[str, Any] = dict.fromkeys(columns) | fixed
    if json_log.wanted() or not console.is_terminal:
        yield _log_lines(values)
        return
    with Progress(
        SpinnerColumn(),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}") for name in values),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None, **_texts(values))

        def update(completed: int, total: int | None = None, **fields: Any) -> None:
            bar.update(task, completed=completed, total=total, **_texts(fields))

        yield update


def _log_lines(values: dict[str, Any]) -> Callable[..., None]:
    began = told = time.monotonic()
    first: int | None = None

    def update(completed: int, total: int | None = None, **fields: Any) -> None:
        nonlocal began, told, first
        values.update(fields)
        now = time.monotonic()
        if first is None or completed <= first:
            # What was there before, as in a run that goes on, says nothing about the rate; nor does preparation.
            began, first = now, completed
        # A command may be over sooner than the first line is due; a program that reads its log is to see its end.
        if now - told < _LOG_SECONDS and not (json_log.wanted() and completed == total):
            return
        told = now
        speed = (completed - first) / (now - began) if completed > first and now > began else None
        left = (total - completed) / speed if speed and total is not None else None
        if json_log.wanted():
            json_log.tell("progress", completed=completed, total=total, rate=speed, seconds_left=left, **values)
            return
        parts = [f"{completed:,}" if total is None else f"{completed:,} of {total:,}"]
        parts += _texts(values).values()
        if speed and not any(name.endswith("_per_second") for name in values):
            parts.append(f"{rate(speed)}/s")
        if left is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        console.print(printable(", ".join(filter(None, parts))), soft_wrap=True, highlight=False, markup=False)

    return update


def raise_file_limit() -> None:
    """Raise the soft limit of open files, which most systems set far below the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed: fresh pages cost a CPU more than most of what it does with them."""
    # It returns every block above 32 MB to the system at once; other C libraries have no such function.
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    # Older ones take no more than 32 MB. Without a threshold that is set, the second option would make it 128 KB.
    if any(set_option(_MMAP_THRESHOLD, most) for most in (2**30, 2**25)):
        set_option(_TRIM_THRESHOLD, 2**31 - 1)


def _fail(message: str) -> NoReturn:
    print_labelled("error", "bold red", " ".join(message.splitlines()))
    sys.exit(2)


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """End the process with one line and exit code 2 on a mistake of the user, 128 + the signal's number on a signal."""
    try:
        yield
    except StoppedError as stopped:
        print_labelled("stopped", "bold yellow", str(stopped))
        sys.exit(128 + stopped.signal)
    except ReportedElsewhereError as reported:
        sys.exit(128 + reported.cause.signal if isinstance(reported.cause, StoppedError) else 2)
    except MilanError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        print_labelled("interrupted", "bold red", "what was committed stays")
        sys.exit(130)
    except Exception as error:
        hint = resource_hint(error)
        if hint is None:
            raise
        _fail(f"{one_line(error)}: {hint}")


@contextmanager
def as_command() -> Iterator[None]:
    """What a process does as a command: it is made ready for its work, and ends as `errors_as_one_line` says."""
    # Where a shell has closed them (`>&-`); open for as long as the process.
    sys.stdout, sys.stderr = (one or Path(os.devnull).open("w") for one in (sys.stdout, sys.stderr))  # noqa: SIM115
    show_warnings_as_lines()
    # Tables are for people: what they show is in the reports.
    earlier, console.quiet = console.quiet, json_log.wanted()
    results.quiet = console.quiet
    # As stderr does, which shows names that it has no letters for with escapes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    raise_file_limit()
    keep_freed_memory()
    try:
        with errors_as_one_line():
            yield
    except Exception as error:
        if not json_log.wanted():
            raise
        shown = {"type": type(error).__name__, "traceback": traceback.format_exc()}
        json_log.tell("error", message=printable(one_line(error)), **shown)
        sys.exit(1)
    finally:
        console.quiet = results.quiet = earlier
