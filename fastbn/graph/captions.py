"""Names that fit into boxes: cut in the middle, and so that different names look different."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LONGEST", "captions", "short"]

# Characters of a caption.
LONGEST = 26

# Characters of a name that are kept at its beginning, and behind the place where it differs from others.
HEAD, BEFORE = 5, 4


def short(text: str) -> str:
    """Return a text that fits into a box: its middle is left out."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}..{text[1 - half :]}"


def captions(names: Sequence[str]) -> dict[str, str]:
    """Return name -> caption: the short name; of names that would look the same, the part in which they differ is shown."""
    found = {name: short(name) for name in dict.fromkeys(names)}
    same: dict[str, list[str]] = {}
    for name, caption in found.items():
        same.setdefault(caption, []).append(name)
    for alike in same.values():
        if len(alike) > 1:
            found.update(_apart(alike))
    return found


def _apart(names: Sequence[str]) -> dict[str, str]:
    """Return captions of names whose short forms are the same: each shows where it differs from the others, or is numbered."""
    first, last = min(names), max(names)
    start = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    shown = {name: _around(name, start) for name in names}
    if len(set(shown.values())) < len(shown):
        shown = {name: f"{short(name)[: LONGEST - 5]} ~{number + 1}" for number, name in enumerate(names)}
    return shown


def _around(name: str, place: int) -> str:
    """Return a name with its beginning and what stands around a place."""
    text = "".join(char if char.isprintable() else "?" for char in name)
    first = max(HEAD, place - BEFORE)
    rest = text[first : first + LONGEST - HEAD - 4]
    return f"{text[:HEAD]}..{rest}" + (".." if first + len(rest) < len(text) else "")
