"""`--help` in words: a switch takes no value, so none is shown; a bound that nobody reaches is left to the error."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

from apportion.cli.options import MOST


class PlainCommand(TyperCommand):
    def get_params(self, ctx: Any) -> Any:
        return [_plain(one) for one in super().get_params(ctx)]


class PlainGroup(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return [_plain(one) for one in super().get_params(ctx)]


def _plain(parameter: Any) -> Any:
    """`min` and `max` are what is shown; typer checks values against its own."""
    if getattr(parameter, "is_flag", False):
        parameter.metavar = ""
    if (getattr(parameter, "max", None) or 0) >= MOST:
        parameter.min = parameter.max = None
    return parameter
