"""Names as people see them: nothing invisible in them, and no wider than there is room."""

from __future__ import annotations

_DOTS = "…"


def visible(text: str) -> str:
    """A text in one line, with everything that has no picture of its own as Python would write it: ``\\n``, ``\\x07``."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def width(text: str) -> int:
    """How many columns of a terminal a text takes; wide characters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def shortened(text: str, columns: int) -> str:
    """The text if it takes no more than so many columns, else its beginning and its end with dots in between."""
    if width(text) <= columns:
        return text
    room = max(columns - 1, 0)
    head, tail = "", ""
    for char in text:
        if width(head + char) > (room + 1) // 2:
            break
        head += char
    for char in reversed(text):
        if width(head) + width(char + tail) > room:
            break
        tail = char + tail
    return head + _DOTS + tail if columns else ""
