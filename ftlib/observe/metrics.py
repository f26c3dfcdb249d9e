"""metrics.jsonl: one strict JSON object a line, written at once, never rounded."""

import json
import math
import os
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


class MetricsFile:
    """Rows of `<output_dir>/metrics.jsonl`, or of another file of rows with a `step`. With `enabled=False` (ranks other
    than 0) nothing is read or written."""

    def __init__(self, output_dir: Path, enabled: bool = True, name: str = NAME) -> None:
        self.path = Path(output_dir) / name
        self.enabled = enabled

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinities have no JSON: they become null, and `nonfinite` lists their keys."""
        if not self.enabled:
            return
        nonfinite: list[str] = []
        clean = {key: _clean(value, key, nonfinite) for key, value in row.items()}
        if nonfinite:
            clean["nonfinite"] = nonfinite
        line = json.dumps(clean, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows so far; a line torn by a kill is left out."""
        return [row for _, row in self._lines()]

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps and torn lines, as a resumed run writes them again; -1 drops all steps."""
        if not (self.enabled and self.path.exists()):
            return
        kept = [line for line, row in self._lines() if row.get("step", step) <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        if not (self.enabled and self.path.exists()):
            return []
        found = []
        for line in self.path.read_bytes().decode("utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append((line, row))
        return found


def _clean(value: Any, key: str, nonfinite: list[str]) -> Any:
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(key)
        return None
    if isinstance(value, dict):
        return {name: _clean(part, f"{key}.{name}", nonfinite) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(part, f"{key}.{index}", nonfinite) for index, part in enumerate(value)]
    return value
