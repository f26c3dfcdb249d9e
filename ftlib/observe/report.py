"""report.html: one page about a finished run that opens anywhere, with no script and nothing to load."""

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftlib.observe.charts import Line, chart, finite, number, smoothed
from ftlib.observe.progress import duration

NAME = "report.html"
STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #66707e; --line: #dfe3e8; --page: #f6f7f9; --card: #fff;
  --main: #2563c9; --dots: #d9480f; --thin: #a9c1ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebef; --soft: #98a2b0; --line: #323a45; --page: #14181d;
  --card: #1c2128; --main: #6ea2f5; --dots: #ff9a62; --thin: #3b5480; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 34px 0 10px; }
.sub { color: var(--soft); margin: 2px 0 20px; overflow-wrap: anywhere; }
.tiles, .charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(185px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }
.tile, .charts > svg, table, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 10px 14px; } .tile b { display: block; font-size: 18px; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; box-sizing: border-box; padding: 8px; }
svg text { fill: var(--ink); font: 600 13px system-ui, sans-serif; }
svg text.tick { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-linejoin: round; }
polyline.main { stroke: var(--main); stroke-width: 2; } polyline.thin { stroke: var(--thin); stroke-width: 1; }
polyline.join { stroke: var(--dots); stroke-width: 1.5; } circle.dots { fill: var(--dots); }
circle.main, circle.thin { fill: var(--main); } .key.main { fill: var(--main); } .key.thin { fill: var(--thin); }
.key.dots { fill: var(--dots); }
table { border-collapse: separate; border-spacing: 0; width: 100%; }
td, th { text-align: left; padding: 6px 12px; border-bottom: 1px solid var(--line); vertical-align: top;
  font-weight: 400; overflow-wrap: anywhere; }
th { color: var(--soft); width: 92px; } tr:last-child > * { border-bottom: 0; }
pre { padding: 12px 14px; overflow-x: auto; font: 13px/1.45 ui-monospace, monospace; margin: 0; }
pre.said { white-space: pre-wrap; border: 0; padding: 0; background: none; }
"""


def write(
    path: Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
    config: str,
    environment: dict[str, Any],
    notes: Sequence[str] = (),
    kept: int | None = None,
) -> None:
    """Write the page. `rows` of metrics.jsonl, `samples` of samples.jsonl (`step`, `prompt`, `answer`, …), `config` as
    YAML without secrets, `notes`: what else happened, a line each; `kept`: the step whose model is the result, if not
    the last."""
    trained = [row for row in rows if "loss" in row]
    scored = [row for row in rows if "loss" not in row]
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{escape(_machine(environment))}</p>',
        f'<div class="tiles">{"".join(_tiles(trained, scored, kept))}</div>',
        *(f"<p>{escape(note)}</p>" for note in notes),
        f'<h2>Curves</h2><div class="charts">{"".join(_charts(trained, scored))}</div>',
        _samples(samples),
        f"<h2>Config</h2><pre>{escape(config)}</pre>",
        f"<h2>Made with</h2>{_table(_flat(environment))}",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _tiles(trained: list[dict[str, Any]], scored: list[dict[str, Any]], kept: int | None) -> list[str]:
    found = []
    if trained:
        last = trained[-1]
        speeds = [row["tokens_per_s"] for row in trained if row.get("tokens_per_s")]
        steps, tokens = [row["step"] for row in trained], [0] + [row["tokens"] for row in trained]
        took = sum((b - a) / row["tokens_per_s"] for a, b, row in zip(tokens, tokens[1:], trained, strict=False)
                   if row.get("tokens_per_s"))  # fmt: skip
        found += [("steps", f"{steps[-1]:,}"), ("tokens", number(last["tokens"])), ("training time", duration(took))]
        losses = [y for _, y in smoothed(_points(trained, "loss"), len(trained) // 20)]
        if losses:
            found.append(("training loss", f"{losses[-1]:.4f}"))
        if speeds:
            found.append(("tokens/s, median", f"{statistics.median(speeds):,.0f}"))
        for key, label, form in (("mfu", "MFU, median", "{:.0%}"), ("peak_memory_gib", "peak GiB", "{:.1f}")):
            values = [row[key] for row in trained if row.get(key) is not None]
            if values:
                found.append((label, form.format(statistics.median(values) if key == "mfu" else max(values))))
    scored = [row for row in scored if kept is None or row["step"] <= kept]
    for key in scored[-1] if scored else ():
        values = [y for _, y in finite(_points(scored, key))]
        if key != "step" and values:
            form = "{:.1%}" if key == "exact_match" else "{:.4f}"
            text = " → ".join(form.format(value) for value in dict.fromkeys((values[0], values[-1])))
            found.append((key.replace("_", " "), text))
    return [f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in found]


def _charts(trained: list[dict[str, Any]], scored: list[dict[str, Any]]) -> list[str]:
    loss = _points(trained, "loss")
    lines = [Line("each step", loss, "thin"), Line("smoothed", smoothed(loss, len(loss) // 20))]
    drawn = [chart("Loss", [*lines, Line("held out", _points(scored, "eval_loss"), "dots")])]
    keys = dict.fromkeys(key for row in scored for key in row if key not in ("step", "eval_loss", "nonfinite"))
    drawn += [chart(_title(key), [Line(key, _points(scored, key), "dots")]) for key in keys]
    known = {"lr": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_s": "Tokens/s", "mfu": "MFU",
             "peak_memory_gib": "Peak memory, GiB"}  # fmt: skip
    more = dict.fromkeys(key for row in trained for key in row if key not in {"step", "loss", "tokens", "nonfinite"})
    for key in [*known, *(key for key in more if key not in known)]:
        drawn.append(chart(known.get(key, _title(key)), [Line(key, _points(trained, key))]))
    return drawn


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    kinds = (int, float)
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), kinds)]


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    if not samples:
        return ""
    steps = list(dict.fromkeys(one["step"] for one in samples))
    shown = steps if len(steps) <= 6 else [steps[0], *steps[-5:]]
    rows = {f"step {step}": "\n".join(_answer(one) for one in samples if one["step"] == step) for step in shown}
    return f"<h2>Answers</h2>{_table(rows)}"


def _answer(one: dict[str, Any]) -> str:
    expected, answer = one.get("reference"), one["answer"].strip()
    more = f"  (expected {expected!r})" if expected is not None and expected.strip() != answer else ""
    more += f"  (reward {one['reward']:.3g})" if one.get("reward") is not None else ""
    return f"{one['prompt']!r} -> {answer!r}{more}"


def _table(rows: dict[str, Any]) -> str:
    cells = (f'<tr><th>{escape(k)}</th><td><pre class="said">{escape(str(v))}</pre></td></tr>' for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    packages = environment.get("packages", {})
    found = {k: v for k, v in environment.items() if k not in ("packages", "gpus") and v is not None}
    if environment.get("gpus"):
        found["GPUs"] = ", ".join(environment["gpus"])
    found["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return found


def _machine(environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    hardware = f"{len(gpus)} x {gpus[0]}" if gpus else f"{environment.get('cpus')} CPU cores"
    return f"ftlib {environment.get('ftlib')}, torch {environment.get('torch')}, {hardware}"
