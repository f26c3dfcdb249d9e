"""YAML text -> a tree in which every value knows where it was written.

Scalars follow YAML 1.2: `1e-4` is a number, `yes`, `on` and `12:30` are text. A mapping that names a key twice is an
error, tags (`!!python/...`) are refused, and a file cannot grow without bound through aliases.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

_MAX_NODES = 100_000
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = {"", "~", "null", "Null", "NULL"}
_TAG = "tag:yaml.org,2002:"

Scalar = str | int | float | bool | None


@dataclass
class Node:
    """One value of a config and its origin."""

    value: "Scalar | dict[str, Node] | list[Node]"
    where: str  # `file:line`, or `command line: key=value`
    base: Path  # folder that relative paths in this value start from
    text: str | None = None  # an unquoted value exactly as written
    shell: bool = False  # from the command line, where the shell has eaten the quotes


@dataclass
class Source:
    """What is being parsed, and what was found wrong with it."""

    name: str  # shown in messages
    base: Path
    problems: list[str] = field(default_factory=list)
    lines: bool = True  # whether values are placed by line, as in a file

    def where(self, line: int) -> str:
        """The place of a value in the given line, counted from 0."""
        return f"{self.name}:{line + 1}" if self.lines else self.name


class YamlError(Exception):
    """The text is no YAML that a config may contain; the message starts with where."""


class _Loader(yaml.SafeLoader):
    """Composes nodes; only merge keys are resolved here, scalars by `scalar`."""

    yaml_implicit_resolvers = {"<": [(_TAG + "merge", re.compile("^<<$"))]}  # noqa: RUF012 (PyYAML's own shape)


def scalar(text: str) -> Scalar:
    """The value that an unquoted scalar stands for."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        digits = text.replace("_", "")
        return int(digits, 0) if digits[:2] in ("0x", "0o") else int(digits)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def parse(text: str, source: Source) -> Node:
    """Parse one YAML document. Duplicate keys go to `source.problems`; what cannot be read raises `YamlError`."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Node(None, source.name, source.base, "")
        return _Converter(loader, source).convert(root)
    except yaml.MarkedYAMLError as error:
        mark = _mark(error)
        raise YamlError(f"{source.where(mark.line if mark else 0)}: not valid YAML: {_reason(error, text)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise YamlError(f"{source.where(line)}: not valid YAML: it holds the character {error.character!r}") from None
    except RecursionError:
        raise YamlError(f"{source.name}: nested too deeply, or it contains itself") from None
    finally:
        if loader is not None:
            loader.dispose()


def _mark(error: yaml.MarkedYAMLError) -> yaml.Mark | None:
    """Where the mistake is: where what is never closed begins, else where it was noticed."""
    late = any(words in (error.problem or "") for words in ("end of stream", "could not find expected")) or _open(error)
    return (late and error.context_mark) or error.problem_mark or error.context_mark


def _open(error: yaml.MarkedYAMLError) -> bool:
    """Whether a bracket or brace that was opened in an earlier line has no end."""
    marks = error.context_mark, error.problem_mark
    return "a flow " in (error.context or "") and None not in marks and marks[0].line < marks[1].line


def _reason(error: yaml.MarkedYAMLError, text: str) -> str:
    lines, mark = text.splitlines(), _mark(error)
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in (error.problem or ""):
        return "indent with spaces, not with tabs"
    if "${" in line and isinstance(error, yaml.parser.ParserError):
        return f"inside {{…}} and […] a reference needs quotes, \"${{a.b}}\": {line.strip()[:80]!r}"
    if _open(error):
        until = f"before line {error.problem_mark.line + 1}, or a comma is missing"
        return f"what is opened here is not closed {until}: {line.strip()[:80]!r}"
    if "could not find expected ':'" in (error.problem or ""):
        return f"a line is `key: value`, with a space behind the colon: {line.strip()[:80]!r}"
    if "end of stream" in (error.problem or ""):
        return f"the quote that begins here is never closed: {line.strip()[:80]!r}"
    if "scanning an alias" in (error.context or ""):
        return f"a text that begins with * needs quotes: {line.strip()[:80]!r}"
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    return f"{reason}: {line.strip()[:80]!r}" if line.strip() else reason


class _Converter:
    """Walks composed nodes; a class because the walk shares its node count and the mappings already checked."""

    def __init__(self, loader: _Loader, source: Source) -> None:
        self.loader, self.source = loader, source
        self.count, self.checked = 0, set()

    def _where(self, node: yaml.Node) -> str:
        return self.source.where(node.start_mark.line)

    def convert(self, node: yaml.Node) -> Node:
        self.count += 1
        where = self._where(node)
        if self.count > _MAX_NODES:
            raise YamlError(f"{where}: more than {_MAX_NODES:,} values; aliases multiply, write fewer")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Node(self._mapping(node), where, self.source.base)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return Node([self.convert(item) for item in node.value], where, self.source.base)
        if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
            if node.style is None:
                return Node(scalar(node.value), where, self.source.base, node.value)
            return Node(node.value, where, self.source.base)
        raise YamlError(f"{where}: the tag {node.tag.replace(_TAG, '!!')!r} is not allowed in a config")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        if id(node) not in self.checked:
            self.checked.add(id(node))
            self._check_keys(node)
            self.loader.flatten_mapping(node)  # `<<: *defaults`: the merged keys come first, so that own keys win
        result = {}
        for key, item in node.value:
            child = self.convert(item)
            child.where = self._where(key)
            result[key.value] = child
        return result

    def _check_keys(self, node: yaml.MappingNode) -> None:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"{self._where(key)}: a key must be a single word, not a list or a section")
            if key.tag == _TAG + "merge":
                continue
            if key.value in first:
                earlier = first[key.value].start_mark.line + 1
                self.source.problems.append(
                    f"{self._where(key)}: the key {key.value!r} is set twice, first in line {earlier}; keep one"
                )
            first.setdefault(key.value, key)


def plain(node: Node) -> object:
    """The tree without its origins."""
    if isinstance(node.value, dict):
        return {key: plain(item) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    return node.value


def from_plain(value: object, where: str, base: Path) -> Node:
    """The opposite of `plain`, with one origin for everything."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, where, base) for key, item in value.items()}, where, base)
    if isinstance(value, list):
        return Node([from_plain(item, where, base) for item in value], where, base)
    return Node(value, where, base)


def merge(lower: Node, upper: Node) -> Node:
    """`upper` laid over `lower`: sections merge key by key, everything else (lists too) is replaced."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    merged = dict(lower.value)
    for key, item in upper.value.items():
        merged[key] = merge(merged[key], item) if key in merged else item
    return Node(merged, lower.where, lower.base)
