"""The typer app and the entry point of `regionspot`.

Results go to stdout, progress and warnings to stderr. An error that the user can fix is one line and exit code 2;
`--debug` shows its traceback. Ctrl-C and SIGTERM also end in one line (commands/signals.py). Commands import what they
need inside their functions, so that `--help` is fast.
"""

from __future__ import annotations

import logging
import re
import sys
from contextlib import suppress
from itertools import pairwise
from typing import Annotated

import typer

from regionspot.cache.errors import InputError, RegionSpotError
from regionspot.cache.progress import CLEAR_LINE, log_to
from regionspot.commands.cache import cache_app
from regionspot.commands.compare import compare, report
from regionspot.commands.config_file import configurable
from regionspot.commands.dataset import dataset
from regionspot.commands.demo import demo, toy_world
from regionspot.commands.doctor import doctor
from regionspot.commands.evaluate import eval_lvis, evaluate
from regionspot.commands.extract import extract
from regionspot.commands.index import index, search
from regionspot.commands.predict import predict
from regionspot.commands.runs import runs
from regionspot.commands.serve import serve
from regionspot.commands.signals import raise_if_stopped, signals_interrupt, stop_line
from regionspot.commands.train import train

app = typer.Typer(
    help="Recognise any region of an image by name.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    dataset,
    extract,
    doctor,
    train,
    runs,
    evaluate,
    eval_lvis,
    compare,
    report,
    predict,
    index,
    search,
    serve,
    toy_world,
    demo,
):
    app.command()(command)
app.add_typer(cache_app, name="cache")
for group in (app, cache_app):
    for registered in group.registered_commands:
        assert registered.callback is not None
        registered.callback = configurable(registered.callback)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    log_to(sys.stderr)


def main() -> None:
    """Run the command line, and exit with its code."""
    with signals_interrupt():
        try:
            _refuse_empty_arguments(sys.argv[1:])
            # Not standalone: typer would print errors in a box, and nothing on Ctrl-C.
            code = app(sys.argv[1:], prog_name="regionspot", standalone_mode=False)
            raise_if_stopped()
            sys.exit(int(code or 0))
        except (Exception, KeyboardInterrupt) as error:
            # The signal first: errors during its handling are of no interest.
            line, code = stop_line() or _error_line(error) or (None, 1)
            if line is None or "--debug" in sys.argv:
                raise
    logging.shutdown()  # ends a progress line
    with suppress(OSError):  # stderr may be closed
        # Removes the ^C that a terminal writes.
        clear = CLEAR_LINE if sys.stderr.isatty() else ""
        print(f"{clear}regionspot: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


def _refuse_empty_arguments(arguments: list[str]) -> None:
    """Raises InputError: an empty argument is usually an unset shell variable, and as a path the current directory."""
    for before, argument in pairwise(["regionspot", *arguments]):
        if re.fullmatch(r"(--[\w-]+=)?\s*", argument):
            name = (argument.strip() or before).removesuffix("=")
            raise InputError(f"the argument of {name} is empty; give a value")


def _error_line(error: BaseException) -> tuple[str, int] | None:
    """The message and exit code of an error that the user can fix; None for a bug."""
    if isinstance(error, RegionSpotError | OSError):
        return str(error), 2
    if hasattr(error, "format_message"):  # click's usage errors; typer has its own copy of these classes
        return error.format_message().replace("Value error, ", "") or "give one of these commands", 2
    return None


if __name__ == "__main__":
    main()
