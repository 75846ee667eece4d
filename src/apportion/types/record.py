"""Frozen dataclasses as plain values (numbers, texts, lists, dictionaries) that any wire carries, and back.

For values of our own, between processes of one version: what comes is typed as its fields say, and not checked as what
a person writes would be.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_Make = Callable[[Any], Any]


def plain(value: Any) -> Any:
    """Of a dataclass the values of its fields, in order."""
    if is_dataclass(value):
        return [plain(getattr(value, one.name)) for one in fields(value)]
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in cast(list[Any], value)]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in cast(dict[Any, Any], value).items()}
    return value


def from_plain(record: type[Record], value: Any) -> Record:
    return _maker(record)(value)


@cache
def _maker(hint: Any) -> _Make:
    """Makes a value of that type of what `plain` made of it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _of_record(cast(type[Any], hint))
    if origin in (Union, UnionType):
        return _of_choice(arguments)
    if origin is tuple and arguments[-1:] == (...,):
        make = _maker(arguments[0])
        return lambda value: tuple(make(one) for one in value)
    if origin is tuple:
        makes = [_maker(one) for one in arguments]
        return lambda value: tuple(make(one) for make, one in zip(makes, value, strict=True))
    if origin is dict:
        make_key, make_value = (_maker(one) for one in arguments)
        return lambda value: {make_key(key): make_value(one) for key, one in value.items()}
    return lambda value: value


def _of_record(record: type[Any]) -> _Make:
    hints = get_type_hints(record)
    names = [one.name for one in fields(record)]
    makes = [_maker(hints[name]) for name in names]
    return lambda values: record(
        **{name: make(value) for name, make, value in zip(names, makes, values, strict=True)}
    )


def _of_choice(arguments: tuple[Any, ...]) -> _Make:
    """Between None and one type, or among types that are plain as they are."""
    others = [_maker(one) for one in arguments if one is not NoneType]
    if len(others) == 1:
        return lambda value: None if value is None else others[0](value)
    assert not any(is_dataclass(one) or get_args(one) for one in arguments), arguments
    return lambda value: value
