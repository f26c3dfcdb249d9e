"""Which of the recipes that ship a config was written for, told by its keys."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MOST = 3  # recipes to name
_SCHEMA = re.compile(r"(?m)^# yaml-language-server: \$schema=\S*?(\w+)\.json")


def recipes_of(tree: object, files: Sequence[str] = ()) -> list[str]:
    """`recipes/….py` that have every key of a config (plain dicts and lists): the one whose schema a file of it names
    for the editor, else those with the fewest other keys first."""
    package = Path(__file__).parents[1]
    folders = (package.parent / "configs" / "schema", package / "configs" / "schema")  # a source tree, a wheel
    shipped = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    schemas = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in shipped}
    keys = tree if isinstance(tree, dict) else {}
    fits = [name for name, schema in schemas.items() if keys and _has(schema, schema["$defs"], keys)]
    named = [name for file in files for name in _SCHEMA.findall(Path(file).expanduser().read_text(encoding="utf-8"))]
    fits = [name for name in fits if name in named] or fits
    nearest = sorted(fits, key=lambda name: len(schemas[name]["properties"]))
    return [f"recipes/{name}.py" for name in nearest[:MOST]]


def recipe_of_run(folder: Path) -> str | None:
    """The recipe whose run left its config.yaml in `folder`; None where that cannot be told."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return next(iter(recipes_of(tree)), None)


def _has(schema: dict[str, Any], definitions: dict[str, Any], value: object) -> bool:
    """Whether a schema has every key of a value; what the keys hold is another question."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return any(_has(option, definitions, value) for option in schema["anyOf"])
    if isinstance(value, list):
        return all(_has(schema["items"], definitions, item) for item in value) if "items" in schema else True
    if not isinstance(value, dict):
        return True
    if (known := schema.get("properties")) is None:
        return "object" in schema.get("type", "object")  # one whose keys are anyone's
    return all(key in known and _has(known[key], definitions, item) for key, item in value.items())
