"""The application: its verbs, and how an error ends."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn

import typer

from lmpress.cli import compare, compress, demo, evaluate, generate, inspect, recipes
from lmpress.cli.interruption import Interruption, interruptible
from lmpress.cli.output import UnprintedError, close_stdout, fail, open_streams, print_text
from lmpress.errors import LmpressError, out_of_memory, refusal, system_error
from lmpress.version import __version__

INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""

AGAIN = {
    "compress": "go on with --resume where it stopped",
    "compare": "run the same command again: it goes on where it stopped",
    "demo": "run the same command again: it goes on where it stopped",
}
"""What a verb offers after an interruption, if anything."""

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
        print_text(f"{__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    traceback: bool = typer.Option(
        False, "--traceback", help="Show the traceback of an error, to report it."
    ),
) -> None:
    _quiet()
    _State.traceback = traceback
    _State.verb = context.invoked_subcommand or ""


class _State:
    traceback = False
    verb = ""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 128 and a signal's number.
    """
    open_streams()
    json_mode = "--json" in sys.argv
    with interruptible() as interruption:
        try:
            code = app(standalone_mode=False)
            if code == INTERRUPTED:  # typer turns Ctrl-C into an exit of its own
                raise KeyboardInterrupt
        except (KeyboardInterrupt, typer.Abort):
            _interrupted(interruption, json_mode)
        except BrokenPipeError:  # whoever reads has enough
            close_stdout()
            sys.exit(1)
        except UnprintedError as error:
            fail(str(error), error.exit_code, json_mode=False)
        except Exception as error:
            if interruption.came:  # something on the way took it for a failure of its own
                _interrupted(interruption, json_mode)
            if _State.traceback and not _is_usage(error):
                raise
            fail(*_told(error), json_mode)


def _interrupted(interruption: Interruption, json_mode: bool) -> NoReturn:
    again = AGAIN.get(_State.verb)
    told = f"{interruption.told}; {again}" if again else interruption.told
    fail(told, interruption.exit_code, json_mode)


def _is_usage(error: Exception) -> bool:
    """Whether typer could not parse the command line: its errors have no class that it shows."""
    return hasattr(error, "format_message")


def _told(error: Exception) -> tuple[str, int]:
    """An error in one line, and its exit code; a line of nothing where typer has shown the help instead."""
    if _is_usage(error):
        told = error.format_message()  # type: ignore[attr-defined]
        return f"{told} (lmpress --help, or lmpress VERB --help)" if told else "", 2
    refused = system_error(error)
    known = out_of_memory(error) if refused is None else refusal(refused, again="try again")
    known = error if isinstance(error, LmpressError) else known
    if known is not None:
        return str(known), known.exit_code
    first = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first} (lmpress --traceback ... shows where)", 1


def _quiet() -> None:
    """Let the libraries below be silent: progress and errors are told by lmpress itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
