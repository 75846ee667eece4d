"""Names that are not known: one sentence for keys, devices, models, engines, units, verbs and options alike."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import cast

MOST_LISTED = 24
"""So many names are all told where none is near; of more, a few."""
_WORD = re.compile(r"[^\W_]+")
_LEAST_PART = 3
"""Letters that a name must share with another to be taken for a part of it."""


def unknown_name(
    what: str,
    asked: str,
    known: Iterable[str] | Mapping[str, str],
    *,
    meant: Mapping[str, str] | None = None,
    spelt: Callable[[str], str] | None = None,
) -> str:
    """ "unknown key 'devices'; did you mean device?", or what there is where nothing is near.

    A mapping of `known` holds further spellings and the name that each stands for; `meant` names that are spelt quite
    differently; `spelt` what of a name is compared.
    """
    names = _by_spelling(known)
    near = near_names(asked, names, meant=meant, spelt=spelt)
    shown = asked if asked.isprintable() else ascii(asked)[1:-1]
    return f"unknown {what} '{shown}'" + (f"; did you mean {one_of(near)}?" if near else _there_is(names))


def near_names(
    asked: str,
    known: Iterable[str] | Mapping[str, str],
    *,
    meant: Mapping[str, str] | None = None,
    spelt: Callable[[str], str] | None = None,
    most: int = 3,
) -> list[str]:
    """Of `known` what `asked` may mean: what begins with it, contains it or is part of it, then what is spelt alike,
    letters out of order first."""
    spelt = spelt or letters
    by_spelling: dict[str, list[str]] = {}
    for spelling, name in _by_spelling(known).items():
        by_spelling.setdefault(spelt(spelling), []).append(name)
    for spelling, name in (meant or {}).items():
        by_spelling.setdefault(spelt(spelling), []).append(name)
    wanted = spelt(asked)
    if wanted in by_spelling:
        return list(dict.fromkeys(by_spelling[wanted]))[:most]
    longer = [spelling for spelling in by_spelling if len(wanted) >= _LEAST_PART and wanted in spelling]
    longer.sort(key=lambda spelling: (not spelling.startswith(wanted), len(spelling)))
    parts = [spelling for spelling in by_spelling if len(spelling) > _LEAST_PART and spelling in wanted]
    parts.sort(key=len, reverse=True)
    alike = difflib.get_close_matches(wanted, by_spelling, n=most, cutoff=0.6)
    alike.sort(key=lambda spelling: sorted(spelling) != sorted(wanted))
    found = [name for spelling in (*longer, *parts, *alike) for name in by_spelling[spelling]]
    return list(dict.fromkeys(found))[:most]


def names_with(asked: str, known: Iterable[str] | Mapping[str, str]) -> list[str]:
    """Of `known` what has `asked` in it from the beginning of a word on: as it is written, or where there is no such
    name by its letters alone."""
    spellings = _by_spelling(known)
    written = [name for spelling, name in spellings.items() if f"-{_words(asked)}" in f"-{_words(spelling)}"]
    by_letters = [
        name
        for spelling, name in spellings.items()
        if any(
            letters(spelling[match.start() :]).startswith(letters(asked))
            for match in _WORD.finditer(spelling)
        )
    ]
    return list(dict.fromkeys(written or by_letters))


def _words(name: str) -> str:
    return re.sub(r"[\s_:/-]+", "-", name.casefold().strip())


def letters(name: str) -> str:
    """What people spell alike: without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())


def one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _by_spelling(known: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(known, Mapping):
        return dict(cast(Mapping[str, str], known))
    return {name: name for name in known}


def _there_is(names: Mapping[str, str]) -> str:
    shown = list(dict.fromkeys(names.values()))
    if not shown:
        return "; there is none"
    if len(shown) <= MOST_LISTED:
        return f"; there is {', '.join(shown)}"
    return f"; there are {len(shown)}, such as {', '.join(shown[:3])}"
