"""A watcher of the demo that writes down what it is told."""

from __future__ import annotations


class Notes:
    """Keeps the lines, and what was being done at each step."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.doings: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def stepped(self, done: int, planned: int, doing: str) -> None:
        assert done <= planned
        self.doings.append(doing)
