"""`bert-fast`: parses, calls, prints.

Results go to the standard output, everything else to the standard error. The exit status is 0, 1
after an error, 2 after a wrong command line, 130 after Ctrl-C. Modules of the package are imported
when a verb needs them, so that `--help` need not wait for torch.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from bert_fast.cli.verbs import app

# With some versions of typer these are click's, with others its own.
_UsageError = typer.BadParameter.__bases__[0]
_CommandError = _UsageError.__bases__[0]
_EXPECTED = ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        arguments: without the program's name; None: those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(arguments, prog_name="bert-fast", standalone_mode=False)
            sys.stdout.flush()
        except BrokenPipeError:  # as of `bert-fast ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:  # nobody else would print it
            if "--debug" in arguments:
                traceback.print_exc()
            return _failed(error)
    if status == 130:
        print("bert-fast: error: interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _failed(error: Exception) -> int:
    """Print an error as one line and return the exit status for it."""
    status, message = 1, str(error)
    if isinstance(error, _CommandError):
        status, message = 2, error.format_message()
        if message.startswith("Usage:"):  # no verb was given: this is the help
            print(message, file=sys.stderr)
            return status
        if context := getattr(error, "ctx", None):
            message += f" See {context.command_path} --help"
    elif isinstance(error, OSError) and error.strerror:
        parts = error.filename, error.strerror
        message = ": ".join(str(part) for part in parts if part is not None)
    elif not isinstance(error, _EXPECTED) or not message:
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    print(f"bert-fast: error: {_one_line(message)}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"bert-fast: warning: {_one_line(str(message))}", file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:2000]
