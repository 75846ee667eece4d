"""The `apportion` command: one verb per file; what a user did wrong becomes one line and an exit code."""

import gc
import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated

import typer

import apportion
from apportion.cli.mistyped import VERBS_MEANT, sentence
from apportion.cli.plain_help import PlainCommand, PlainGroup
from apportion.cli.stop_signals import handle_stop_signals, ignore_stop_signals
from apportion.cli.text_streams import check_text, close_streams, open_streams
from apportion.types.errors import ApportionError, EngineError, UsageError
from apportion.types.names import unknown_name

INTERRUPTED_EXIT_CODE = 130
CLOSED_PIPE_EXIT_CODE = 1
VERBS = ("plan", "run", "whatif", "export", "bench", "probe", "verify", "models", "devices")
_COLLECTED_OBJECTS = 300_000
"""Python looks for unreachable objects after so many new ones: imports make tens of thousands, none unreachable."""


def _app(arguments: list[str]) -> typer.Typer:
    """With the verb that is asked for, and all of them where it is none: importing them takes a tenth of a second."""
    app = typer.Typer(cls=PlainGroup, add_completion=False, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(apportion_command)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    if asked is not None and asked not in VERBS:
        raise UsageError(unknown_name("command", asked, VERBS, meant=VERBS_MEANT))
    for verb in (asked,) if asked in VERBS else VERBS:
        app.command(cls=PlainCommand)(getattr(import_module(f"apportion.cli.{verb}"), verb))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"apportion {apportion.__version__}")
        raise typer.Exit


def apportion_command(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Divide one large language model among unequal, low-memory devices: planned exactly, certified, and run."""
    if context.invoked_subcommand is None:
        from apportion.cli.welcome import welcome

        typer.echo(welcome())


def main() -> None:
    gc.set_threshold(_COLLECTED_OBJECTS)
    handle_stop_signals()
    open_streams()
    code = exit_code(sys.argv[1:])
    ignore_stop_signals()
    sys.exit(code)


def exit_code(arguments: list[str]) -> int:
    """Runs the command. Errors a user can cause are one line on stderr, without traceback."""
    try:
        check_text(arguments)
        code = _app(arguments)(arguments, prog_name="apportion", standalone_mode=False)
        sys.stdout.flush()
    except ApportionError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        close_streams()
        return CLOSED_PIPE_EXIT_CODE
    except (OSError, MemoryError) as error:
        return _fail(_lacking(error), EngineError.exit_code)
    except typer.Abort as error:
        if isinstance(error.__cause__, EOFError):  # typer takes any for the end of what is typed
            return _fail("a process of this run ended unexpectedly; run again", EngineError.exit_code)
        return INTERRUPTED_EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        return _fail(message, UsageError.exit_code)
    return code if isinstance(code, int) else 0


def _lacking(error: OSError | MemoryError) -> str:
    """What the machine refuses: room on a disk, file descriptors, memory."""
    if isinstance(error, MemoryError):
        return "out of memory, or of what the shell allows (ulimit -v)"
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        sys.stderr.write(f"apportion: error: {' '.join(message.split())}\n")
    try:
        sys.stdout.flush()
    except (OSError, UsageError):
        close_streams()
    return code
