"""The `apportion` command: one verb per file; what a user did wrong becomes one line and an exit code."""

import sys
from typing import Annotated

import typer

import apportion
from apportion.cli.bench import bench
from apportion.cli.export import export
from apportion.cli.plan import plan
from apportion.cli.probe import probe
from apportion.cli.run import run
from apportion.cli.verify import verify
from apportion.cli.whatif import whatif
from apportion.types.errors import ApportionError, UsageError

INTERRUPTED_EXIT_CODE = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(plan)
app.command()(probe)
app.command()(export)
app.command()(run)
app.command()(bench)
app.command()(verify)
app.command()(whatif)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"apportion {apportion.__version__}")
        raise typer.Exit


@app.callback()
def apportion_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Divide one large language model among unequal, low-memory devices: planned exactly, certified, and run."""


def main() -> None:
    sys.exit(exit_code(sys.argv[1:]))


def exit_code(arguments: list[str]) -> int:
    """Runs the command. Errors a user can cause are one line on stderr, without traceback."""
    try:
        code = app(arguments, prog_name="apportion", standalone_mode=False)
    except ApportionError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED_EXIT_CODE
    except Exception as error:
        # typer's usage errors have no public base class; this is what they have in common.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _fail(f"{message()} (see apportion --help)", UsageError.exit_code)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"apportion: error: {' '.join(message.split())}\n")
    return code
