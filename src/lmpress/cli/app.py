"""The application: its verbs, and how an error ends."""

from __future__ import annotations

import sys
import warnings

import typer
from rich.console import Console

from lmpress.cli import compare, compress, demo, evaluate, generate, inspect, recipes
from lmpress.cli.output import fail
from lmpress.errors import LmpressError
from lmpress.version import __version__

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

app = typer.Typer(
    name="lmpress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress language models: SVD, structured pruning, sparsity and quantization in one recipe.",
)
app.command("demo")(demo.demo)
app.command("compress")(compress.compress)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("inspect")(inspect.inspect)
app.command("generate")(generate.generate)
app.add_typer(recipes.app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        Console().print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    traceback: bool = typer.Option(
        False, "--traceback", help="Show the traceback of an error, to report it."
    ),
) -> None:
    _quiet()
    _State.traceback = traceback


class _State:
    traceback = False


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 the work failed, 2 the request was wrong."""
    json_mode = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into an exit of its own
            raise KeyboardInterrupt
    except LmpressError as error:
        if _State.traceback:
            raise
        fail(str(error), error.exit_code, json_mode)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; compress goes on with --resume where it stopped", INTERRUPTED, json_mode)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if _State.traceback:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", 1, json_mode)
    except Exception as error:
        if hasattr(error, "format_message"):  # what typer says of words that it cannot parse
            fail(f"{error.format_message()} (lmpress --help, or lmpress VERB --help)", 2, json_mode)
        if _State.traceback:
            raise
        told = (str(error).strip().splitlines() or [""])[0]
        fail(f"unexpected {type(error).__name__}: {told} (lmpress --traceback ... shows where)", 1, json_mode)


def _quiet() -> None:
    """Let the libraries below be silent: progress and errors are told by lmpress itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
