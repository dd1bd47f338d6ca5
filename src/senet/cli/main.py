"""Entry point of the ``senet`` command. Imports no heavy library: ``senet --help`` must answer at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from senet import __version__
from senet.cli import attach, bench, compare, cost, evaluate, fold, inspect, list_models, predict, train
from senet.cli.terminal import prepare_streams
from senet.errors import InputError

EXTRAS = frozenset(
    {
        *("lightning", "torchmetrics", "torchvision", "pydantic", "yaml", "tensorboard", "matplotlib"),
        *("sklearn", "scipy", "simplejpeg", "PIL"),
    }
)

app = typer.Typer(
    name="senet",
    help="Squeeze-and-Excitation for PyTorch: train, compare, evaluate and use SE networks.",
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
    """Run the command line and exit: 0 done, 1 done in part, 2 an error (one line), 130 or 143 stopped by a signal."""
    sys.exit(main(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never lets a traceback of a user's mistake through."""
    prepare_streams()
    _show_warnings()
    try:
        result = app(args=None if arguments is None else list(arguments), prog_name="senet", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        code, message = describe(error)
        if message:
            print(message, file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return result if isinstance(result, int) else 0


def describe(error: Exception) -> tuple[int, str]:
    """(exit code, message) of an error that is the user's or the machine's; any other is raised again."""
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        return 2, str(error)
    if hasattr(error, "format_message"):  # click's, whose home differs between versions of typer
        return 2, f"error: {' '.join(error.format_message().split())}"
    if isinstance(error, InputError) or kind == "NonFiniteError":
        return 2, f"error: {error}"
    if kind == "Interrupted":
        return 128 + getattr(error, "signal", signal.SIGINT), ""  # the command has said how to go on
    if kind == "Abort":
        return 128 + signal.SIGINT, "stopped"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in EXTRAS:
        return 2, f"error: this command needs {error.name.partition('.')[0]!r}: pip install 'senet[train]'"
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return 2, f"error: {error.strerror or error}{where}"
    if kind == "OutOfMemoryError":
        return 2, "error: the device is out of memory; use a smaller --set batch_size=, or --set accumulate=2"
    raise error


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _show_warnings() -> None:
    logger = logging.getLogger("senet")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setLevel(logging.WARNING)
        logger.addHandler(handler)
