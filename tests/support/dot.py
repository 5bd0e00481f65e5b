"""A strict reader of Graphviz' language, as far as it is needed to check what we write: directed graphs, no HTML strings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# What Graphviz' own lexer knows. In a quoted string `\"` is a quote and `\\` stays two backslashes; a raw line break or
# another control character is refused here, though Graphviz is not so strict.
_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_\x80-\uffff][A-Za-z0-9_\x80-\uffff]*|-?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?))"
    r'|"(?P<quoted>(?:[^"\\\x00-\x1f\x7f]|\\[^\x00-\x1f\x7f])*)"'
    r"|(?P<mark>->|[{}\[\]=;,]))"
)
_KEYWORDS = {"graph", "digraph", "subgraph", "node", "edge", "strict"}


@dataclass
class Dot:
    """A graph as Graphviz would understand it.

    Attributes:
        name: Its name.
        nodes: Attributes by node, of what was declared.
        edges: Pairs of nodes, in order.
        clusters: For each cluster its label and the nodes declared right in it.
    """

    name: str = ""
    nodes: dict[str, dict[str, str]] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    clusters: dict[str, tuple[str, list[str]]] = field(default_factory=dict)


def read(text: str) -> Dot:
    """Read a graph; anything that is not in the grammar, or an edge of an undeclared node, is an AssertionError."""
    tokens = _tokens(text)
    dot = Dot()
    reader = _Reader(tokens, dot)
    assert reader.next() == ("name", "digraph")
    dot.name = reader.identity()
    reader.block(None)
    assert reader.position == len(tokens), f"something follows the graph: {tokens[reader.position :]}"
    assert all(node in dot.nodes for edge in dot.edges for node in edge)
    return dot


def drawn(text: str) -> str:
    """What is drawn for an attribute's string: its escapes and entities resolved; unknown ones are refused."""
    found = re.sub(r"\\(.)", lambda match: {"n": "\n", "\\": "\\"}[match[1]], text)
    assert re.fullmatch(r"(?:[^&]|&amp;)*", found, flags=re.DOTALL), f"a bare & in {found!r}"
    return found.replace("&amp;", "&")


def _tokens(text: str) -> list[tuple[str, str]]:
    found, position = [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        assert match is not None, f"no token: {text[position : position + 40]!r}"
        kind = str(match.lastgroup)
        found.append((kind, match[kind].replace('\\"', '"') if kind == "quoted" else match[kind]))
        position = match.end()
    return found


class _Reader:
    def __init__(self, tokens: list[tuple[str, str]], dot: Dot) -> None:
        self.tokens, self.dot, self.position = tokens, dot, 0

    def next(self) -> tuple[str, str]:
        self.position += 1
        return self.tokens[self.position - 1]

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position]

    def identity(self) -> str:
        kind, text = self.next()
        assert kind == "quoted" or (kind == "name" and text.lower() not in _KEYWORDS), f"{text!r} is no identity"
        return text

    def block(self, cluster: str | None) -> None:
        assert self.next() == ("mark", "{")
        while self.peek() != ("mark", "}"):
            self.statement(cluster)
            if self.peek() == ("mark", ";"):
                self.next()
        self.next()

    def statement(self, cluster: str | None) -> None:
        if self.peek() in (("name", "node"), ("name", "edge"), ("name", "graph")):
            self.next()
            self.attributes()
            return
        if self.peek() == ("name", "subgraph"):
            self.next()
            inner = self.identity()
            assert inner.startswith("cluster"), f"Graphviz draws no frame around {inner!r}"
            assert inner not in self.dot.clusters
            self.dot.clusters[inner] = ("", [])
            self.block(inner)
            return
        name = self.identity()
        if self.peek() == ("mark", "="):
            self.next()
            value = self.identity()
            if cluster is not None and name == "label":
                self.dot.clusters[cluster] = (value, self.dot.clusters[cluster][1])
        elif self.peek() == ("mark", "->"):
            self.next()
            self.dot.edges.append((name, self.identity()))
        else:
            assert name not in self.dot.nodes, f"node {name} is declared twice"
            self.dot.nodes[name] = self.attributes()
            if cluster is not None:
                self.dot.clusters[cluster][1].append(name)

    def attributes(self) -> dict[str, str]:
        assert self.next() == ("mark", "[")
        found: dict[str, str] = {}
        while self.peek() != ("mark", "]"):
            key = self.identity()
            assert self.next() == ("mark", "=")
            found[key] = self.identity()
            if self.peek() in (("mark", ","), ("mark", ";")):
                self.next()
        self.next()
        return found
