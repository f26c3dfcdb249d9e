"""Where the values of a config were written, so that an error that names a key can say in which line it is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ftlib.config.tree import Node
from ftlib.errors import Problems, UserError

_KEY = re.compile(r"(?<![\w./\[\]-])[A-Za-z_][\w-]*(?:\.[\w-]+|\[\d+\])*(?![\w./\[\]-]|:\d| \()")
_WHERE = re.compile(r"(?m)^(\s*where: )(.*)$")
COMMAND = "command line"


class Places(dict[str, str]):
    """Dotted key -> `file:line` or `command line`, of every key that a file or the command line set."""

    @classmethod
    def of(cls, tree: Node) -> "Places":
        """The places of a whole config; a section has its own and those of keys that were written elsewhere."""
        found = cls()
        for path, node in _walk(tree, ""):
            found[path] = ", ".join(_origins(node))
        found.pop("")
        return found

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise what is raised inside, with its place behind each key that the `where` of a `UserError` names."""
        try:
            yield
        except Problems as error:
            error.problems = [_WHERE.sub(lambda m: m[1] + self._behind_keys(m[2]), text) for text in error.problems]
            error.what = "\n".join(error.problems)
            raise
        except UserError as error:
            error.where = error.where and self._behind_keys(error.where)
            raise

    def _behind_keys(self, where: str) -> str:
        return _KEY.sub(lambda m: f"{m[0]} ({self[m[0]]})" if m[0] in self else m[0], where)


def _walk(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    yield path, node
    if isinstance(node.value, dict):
        for key, item in node.value.items():
            yield from _walk(item, f"{path}.{key}" if path else key)
    elif isinstance(node.value, list):
        for i, item in enumerate(node.value):
            yield from _walk(item, f"{path}[{i}]")


def _origins(node: Node) -> list[str]:
    """The place of a value, and one for every other file, or the command line, that holds a part of it."""
    found: dict[str, str] = {}
    for _, part in _walk(node, ""):
        where = COMMAND if part.where.startswith(f"{COMMAND}: ") else part.where
        found.setdefault(re.sub(r":\d+$", "", where), where)
    return list(found.values())
