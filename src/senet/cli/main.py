"""Entry point of the ``senet`` command. Imports no heavy libraries, so that ``senet --help`` is fast."""

from __future__ import annotations

import errno
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from senet import __version__
from senet.cli import attach, bench, compare, cost, evaluate, fold, inspect, list_models, predict, train
from senet.cli.options import resume_command
from senet.cli.streams import ReaderGone, steady_streams
from senet.errors import InputError
from senet.text import shown

_LONGEST = 400  # characters of a message
EXTRAS = frozenset(
    {
        *("lightning", "torchmetrics", "torchvision", "pydantic", "yaml", "tensorboard", "matplotlib"),
        *("sklearn", "scipy", "simplejpeg", "PIL"),
    }
)
_RUNS = ("train", "compare")  # commands that can be resumed
_OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "not enough memory", "bad_alloc", "out of memory", "Cannot allocate memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
_OUT_OF_SHARED_MEMORY = (
    *("</torch_", "killed by signal: Bus error", "insufficient shared memory", "shared memory limit"),
    "DataLoader worker cannot be started: [Errno 28]",
)
_LOADER_ENDED = ("DataLoader worker (pid", "DataLoader worker cannot be started", "ancdata", "Pin memory thread exited")
_PROCESS_LOST = ("gloo/transport", "by peer", "remote process exited")

app = typer.Typer(
    name="senet",
    help="Squeeze-and-Excitation for PyTorch: train, compare, evaluate, and use SE networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare.command)
app.command("train")(train.command)
app.command("eval")(evaluate.command)
app.command("predict")(predict.command)
app.command("list")(list_models.command)
app.command("bench")(bench.command)
app.command("attach")(attach.command)
app.command("inspect")(inspect.command)
app.command("fold")(fold.command)
app.command("cost")(cost.command)


def _show_version(value: bool) -> None:
    if value:
        print(f"senet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 partial success, 2 error (one line), 128 + n stopped by signal n."""
    sys.exit(main(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. User errors never produce a traceback."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    # Closing a pager must not end hours of training.
    with steady_streams(finish=words[:1] in ([name] for name in _RUNS)):
        _show_warnings()
        try:
            result = app(args=None if arguments is None else words, prog_name="senet", standalone_mode=False)
            sys.stdout.flush()
        except Exception as error:
            code, message = describe(error, words)
            if message:
                print(*map(shown, message.split("\n")), sep="\n", file=sys.stderr)
            return code
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 128 + signal.SIGINT
        return result if isinstance(result, int) else 0


def describe(error: Exception, words: Sequence[str] = ()) -> tuple[int, str]:
    """Return (exit code, message) for an error of the user or the machine. Any other error is raised again."""
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        return 2, str(error)
    if hasattr(error, "format_message"):  # click's; its module depends on the version of typer
        return 2, f"error: {_shortened(' '.join(error.format_message().split()))}"
    if isinstance(error, InputError) or kind == "NonFiniteError":
        return 2, f"error: {error}"
    if kind == "Interrupted":
        return 128 + getattr(error, "signal", signal.SIGINT), ""  # the command has already printed how to continue
    if kind == "Abort":
        return 128 + signal.SIGINT, "stopped"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in EXTRAS:
        return 2, f"error: this command needs {error.name.partition('.')[0]!r}: pip install 'senet[train]'"
    if isinstance(error, ReaderGone):
        return 0, ""
    fault = _fault_of_machine(error, words)
    if fault:
        return 2, f"error: {fault}"
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return 2, f"error: {error.strerror or _last_line(error)}{where}"
    raise error


def _fault_of_machine(error: Exception, words: Sequence[str]) -> str | None:
    """Message and remedy for exhausted memory or a killed process. PyTorch distinguishes these only by their text."""
    if not isinstance(error, (RuntimeError, MemoryError, OSError)):
        return None
    text, command = str(error), words[0] if words else "train"
    go_on = f"; continue with: {resume_command(words, '--workers', '0')}" if words and command in _RUNS else ""

    def says(marks: Sequence[str]) -> bool:
        return not isinstance(error, OSError) and any(mark in text for mark in marks)

    if isinstance(error, MemoryError) or says(_OUT_OF_MEMORY) or getattr(error, "errno", None) == errno.ENOMEM:
        if command in _RUNS:
            return "out of memory; use a smaller --set batch_size=, or --set accumulate=2"
        return "out of memory; use a smaller batch or smaller images"
    if says(_OUT_OF_SHARED_MEMORY):
        return f"out of shared memory for loading images; use --workers 0, or give the container --shm-size=1g{go_on}"
    if says(_LOADER_ENDED):
        reason = _last_line(error).rstrip(". ")
        return f"a process that loads images exited ({reason}); use fewer --workers, or --workers 0{go_on}"
    if says(_PROCESS_LOST):
        return "lost the connection to another process of this run; see the message of that process"
    return None


def _shortened(text: str) -> str:
    """Cut the middle out of a message that quotes long input."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _StderrHandler(logging.StreamHandler):
    """Writes to the current ``sys.stderr``, which can be replaced while the program runs."""

    def emit(self, record: logging.LogRecord) -> None:
        lines = f"{record.levelname.lower()}: {record.getMessage()}".split("\n")
        print(*map(shown, lines), sep="\n", file=sys.stderr)


def _show_warnings() -> None:
    logger = logging.getLogger("senet")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setLevel(logging.WARNING)
        logger.addHandler(handler)
