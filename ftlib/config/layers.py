"""Files and `key=value` overrides -> one tree: read, laid over each other, `${a.b}` filled in."""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ftlib.config.build import BROKEN
from ftlib.config.secrets import redact_override
from ftlib.config.suggest import option, unknown_key
from ftlib.config.tree import Node, Source, YamlError, from_plain, merge, parse, plain, scalar
from ftlib.errors import Problems

_KEY = re.compile(r"[^\s.\[\]=~]+(?:\.[^\s.\[\]=]+|\[\d+\])*")
_REFERENCE = re.compile(r"\$\{\s*(\.*[\w\-]+(?:\.[\w\-]+|\[\d+\])*)\s*\}")


@dataclass
class Arguments:
    """A recipe's command line."""

    files: list[str] = field(default_factory=list)  # of `--config`, in order: later ones win
    overrides: list[str] = field(default_factory=list)  # `key=value` and `~key`, in order
    options: list[str] = field(default_factory=list)  # other words that begin with `-`
    problems: list[str] = field(default_factory=list)  # what is none of these


def split_arguments(argv: Iterable[str]) -> Arguments:
    """Sort `--config a.yaml --config=b.yaml key=value ~key` into files and overrides."""
    result, rest = Arguments(), list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--config" and not rest:
            result.problems.append("command line: --config needs a file after it")
        elif word == "--config":
            result.files.append(rest.pop(0))
        elif word.startswith("--config="):
            result.files.append(word.removeprefix("--config="))
        elif word.startswith("-"):
            result.options.append(word)
        elif "=" in word or word.startswith("~"):
            result.overrides.append(word)
        else:
            what = "; a file is given as --config " + word if word.endswith((".yaml", ".yml")) else ""
            result.problems.append(f"command line: expected key=value, got {word!r}{what}")
    return result


def read_layers(arguments: Arguments, known: list[str]) -> tuple[Node, list[str]]:
    """The merged tree and the problems that do not prevent it. Files that cannot be read raise `Problems`."""
    problems, unreadable = list(arguments.problems), []
    for word in arguments.options:
        key = redact_override(option(word, known))
        problems.append(f"command line: unknown option {redact_override(word)!r}; keys are set as {key}")
    tree = Node({}, ", ".join(arguments.files) or "command line", Path.cwd())
    for name in arguments.files:
        try:
            tree = merge(tree, _read_file(name, problems))
        except YamlError as error:
            unreadable.append(str(error))
    for text in arguments.overrides:
        _override(tree, text, known, problems)
    if unreadable:  # what these files set is unknown, so nothing can be said about the keys
        raise Problems(unreadable + problems)
    _interpolate(tree, problems)
    return tree, problems


def _read_file(name: str, problems: list[str]) -> Node:
    path = Path(os.path.expanduser(name))
    source = Source(name, path.parent.resolve(), problems)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise YamlError(f"{name}: no such config file{_beside(path)}") from None
    except IsADirectoryError:
        raise YamlError(f"{name}: is a folder, not a config file{_beside(path / 'config.yaml')}") from None
    except UnicodeDecodeError as error:
        raise YamlError(f"{name}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise YamlError(f"{name}: cannot be read: {error.strerror}") from None
    node = parse(text, source)
    if node.value is None:
        return Node({}, name, source.base)
    if not isinstance(node.value, dict):
        raise YamlError(f"{node.where}: a config is made of `key: value` lines, this is {type(node.value).__name__}")
    return node


def _beside(path: Path) -> str:
    """The nearest thing that does exist: similar names in the folder, or the part of the path that is there."""
    folder = path.parent
    if folder.is_dir():
        names = sorted(item.name for item in folder.iterdir() if item.suffix in (".yaml", ".yml"))
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5) or names[:5]
        return f" (there is {', '.join(near)})" if near else f" (in {folder.resolve()})"
    return f" (there is no folder {folder}; the working directory is {Path.cwd()})"


def _parts(key: str) -> list[str | int]:
    return [int(index) if index else name for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]


def _override(tree: Node, text: str, known: list[str], problems: list[str]) -> None:
    """Apply one `key=value` or `~key` to the tree."""
    where = f"command line: {redact_override(text)}"
    key, sign, value = text.partition("=")
    delete = text.startswith("~")
    key = key.strip().removeprefix("~")
    if not _KEY.fullmatch(key) or (delete and sign):
        form = "~key takes no value" if delete and sign else "a key is words joined by dots, such as optim.lr=1e-4"
        problems.append(f"{where}: {form}")
    elif delete:
        generic = re.sub(r"\[\d+\]", "[]", key)
        if not _delete(tree, _parts(key)) and generic not in known:
            problems.append(f"{where}: {key}: {unknown_key(key, known, [k for k in known if '.' not in k])}")
    else:
        try:
            _set(tree, _parts(key), _override_value(value.strip(), where))
        except (YamlError, IndexError) as error:
            problems.append(str(error) if isinstance(error, YamlError) else f"{where}: {error}")


def _override_value(text: str, where: str) -> Node:
    """Lists, sections and quoted text are YAML; anything else is one scalar, whatever characters it holds."""
    if text[:1] not in ("[", "{", '"', "'"):
        return Node(scalar(text), where, Path.cwd(), text, shell=True)
    try:
        node = parse(text, Source(where, Path.cwd(), lines=False))
    except YamlError:
        if text[0] in "\"'":
            raise
        return Node(text, where, Path.cwd(), text, shell=True)  # `[:90%]` is a split, not a list
    node.text, node.shell = text, text[0] in "[{"
    return node


def _set(tree: Node, parts: list[str | int], value: Node) -> None:
    for position, (part, following) in enumerate(zip(parts, [*parts[1:], None], strict=True)):
        if isinstance(part, int):
            if part > len(tree.value):
                raise IndexError(f"the list has {len(tree.value)} items, so there is no [{part}]")
            if part == len(tree.value):
                tree.value.append(Node(None, value.where, value.base))
            child = tree.value[part]
        else:
            child = tree.value.setdefault(part, Node(None, value.where, value.base))
        if following is None:
            tree.value[part] = merge(child, value) if position or isinstance(value.value, dict) else value
            return
        shape = list if isinstance(following, int) else dict
        if not isinstance(child.value, shape):
            child = tree.value[part] = Node(shape(), value.where, value.base)
        tree = child


def _delete(tree: Node, parts: list[str | int]) -> bool:
    for part in parts[:-1]:
        try:
            tree = tree.value[part]
        except (KeyError, IndexError, TypeError):
            return False
    try:
        del tree.value[parts[-1]]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _interpolate(tree: Node, problems: list[str]) -> None:
    """Replace every `${a.b}`. A resolver (`${oc.env:…}`) would carry secrets into outputs and is refused."""
    found = [(path, node) for path, node in _walk(tree, ()) if isinstance(node.value, str) and "${" in node.value]
    refused = [(path, node) for path, node in found if "${" in _REFERENCE.sub("", node.value)]
    for path, node in refused:
        fix = "set the key on the command line: key=$NAME" if ":" in node.value else "write ${section.key}"
        problems.append(f"{node.where}: {_dotted(path)}: ${{…}} can only refer to another key; {fix}")
    if refused:  # nothing is resolved, because what is refused may be referred to
        for _, node in found:
            node.value = BROKEN
        return
    results = _resolve(tree, found, problems) if found else []
    for (_, node), result in zip(found, results, strict=True):
        node.value, node.base, node.text, node.shell = result.value, result.base, result.text, result.shell


def _resolve(tree: Node, found: list[tuple[tuple, Node]], problems: list[str]) -> list[Node]:
    """What each of the `found` nodes stands for."""
    from omegaconf import OmegaConf  # a tenth of a second, for the few configs that refer to other keys
    from omegaconf.errors import OmegaConfBaseException

    container, results = OmegaConf.create(plain(tree)), []
    for path, node in found:
        try:
            value = container
            for part in path:
                value = value[part]
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            origin = _origin(tree, node)
            is_text = isinstance(origin.value, str) and "${" in origin.value
            results.append(from_plain(value, node.where, origin.base) if is_text else origin)
        except (OmegaConfBaseException, RecursionError) as error:
            reason = "refers to itself" if isinstance(error, RecursionError) else str(error).split("\n")[0]
            problems.append(f"{node.where}: {_dotted(path)}: {reason} (keys that nothing sets cannot be referred to)")
            results.append(Node(BROKEN, node.where, node.base))
    return results


def _origin(tree: Node, node: Node) -> Node:
    """The node that a text which is nothing but one reference stands for: paths in it belong to its folder."""
    match = _REFERENCE.fullmatch(node.value) if isinstance(node.value, str) else None
    if match is None or match[1].startswith("."):
        return node
    target = tree
    for part in _parts(match[1]):
        if isinstance(target.value, str):  # a reference to a section, of which this is a part
            target = _origin(tree, target)
        target = target.value[int(part) if isinstance(target.value, list) else part]
    return _origin(tree, target)


def _walk(node: Node, path: tuple) -> Iterable[tuple[tuple, Node]]:
    yield path, node
    items = node.value.items() if isinstance(node.value, dict) else ()
    for key, item in enumerate(node.value) if isinstance(node.value, list) else items:
        yield from _walk(item, (*path, key))


def _dotted(path: tuple) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
