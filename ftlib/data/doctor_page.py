"""`tune doctor --out`: the findings as a table of rows and a page to look at."""

import csv
import html
from pathlib import Path

import numpy as np

from ftlib.data.doctor_findings import Findings, Row

COLUMNS = ("where", "tokens", "trained", "weight", "state", "repeat_of", "held_out")


def write(found: Findings, folder: Path) -> Path:
    """rows.csv and report.html (no other file, no script, no network) into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, name) for name in COLUMNS] for row in found.rows)
    page = folder / "report.html"
    page.write_text(_page(found), encoding="utf-8")
    return page


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:1rem}mark{background:#bfe8c5}.weighted{background:#fbe3a2}"
    ".bar{background:#4a7fb5;height:1rem;min-width:1px}"
)


def _page(found: Findings) -> str:
    facts = "".join(f"<tr><th>{html.escape(n)}<td>{html.escape(v)}" for n, v in found.facts())
    parts = [f"<h1>{html.escape(found.path)}</h1><table>{facts}</table>"]
    lengths = [row.tokens for row in found.rows if row.tokens]
    parts += [f"<h2>Lengths in tokens</h2>{_histogram(lengths)}"] if lengths else []
    bad = [row for row in found.rows if row.state != "ok" or row.repeat_of or row.held_out][:1000]
    if bad:
        cells = "".join(
            f"<tr><td>{html.escape(row.where)}<td>{html.escape(_complaint(row))}" for row in bad
        )
        parts.append(f"<h2>Rows to look at</h2><table><tr><th>row<th>what{cells}</table>")
    if found.samples:
        other = ", those with a weight other than 1 <mark class=weighted>so</mark>" if found.weights else ""
        parts.append(f"<h2>Samples</h2><p>Trained tokens are <mark>marked</mark>{other}.</p>")
    for where, pieces in found.samples:
        text = "".join(_marked(html.escape(t), trained) if trained else html.escape(t) for t, trained in pieces)
        parts.append(f"<h3>{html.escape(where)}</h3><pre>{text}</pre>")
    head = f"<meta charset=utf-8><title>{html.escape(found.path)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _marked(text: str, weight: bool | float) -> str:
    return f"<mark>{text}</mark>" if weight == 1 else f'<mark class=weighted title="weight {weight:.6g}">{text}</mark>'


def _complaint(row: Row) -> str:
    said = [row.state] if row.state != "ok" else []
    said += [f"repeats {row.repeat_of}"] if row.repeat_of else []
    return "; ".join([*said, *(["held out as well"] if row.held_out else [])])


def _histogram(lengths: list[int]) -> str:
    edges = [2**n for n in range(int(np.log2(max(lengths))) + 2)]
    counts, _ = np.histogram(lengths, edges)
    rows = [
        f"<tr><td>{low:,} to {high - 1:,}<td>{count:,}<td style='width:60%'>"
        f"<div class=bar style='width:{100 * count / max(counts):.1f}%'></div>"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return f"<table><tr><th>tokens<th>rows<th>{''.join(rows)}</table>"
