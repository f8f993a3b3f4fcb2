"""Adapters as tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kiln
from kiln_cli.status import duration

_MOST_NAME_COLUMNS = 40
_SHOWN_METRICS = ("reward_mean", "teacher_kl", "loss")


def show_adapters(console: Console, adapters: Sequence[kiln.Adapter]) -> None:
    if not adapters:
        console.print("no adapters yet; kiln train sft --help has an example")
        return
    table = _table("adapter", "latest", "versions", "answers", "rank", "size", "age")
    if console.is_terminal:  # a long name takes more lines, and not the room of all the others
        table.columns[0].max_width = _MOST_NAME_COLUMNS
    for adapter in adapters:
        newest = adapter.versions[-1] if adapter.versions else None
        attached = adapter.attached_version
        table.add_row(
            escape(adapter.name),
            f"@{adapter.latest_version}",
            str(len(adapter.versions)),
            f"[green]@{attached} by default[/green]" if attached else "when named",
            str(newest.rank) if newest else "",
            size(newest.num_bytes) if newest else "",
            _age(newest),
        )
    console.print(table)


def show_adapter(console: Console, adapter: kiln.Adapter) -> None:
    """Its versions, the newest first."""
    table = _table("version", "parent", "rank", "size", "age", "its job saw", "job")
    for version in reversed(adapter.versions):
        # The tick is the attached one's.
        mark = " [green]✓[/green]" if version.version == adapter.attached_version else ""
        table.add_row(
            f"{escape(version.id)}{mark}",
            escape(version.parent or "base"),
            str(version.rank),
            size(version.num_bytes),
            _age(version),
            next(
                (f"{name} {version.metrics[name]:.3g}" for name in _SHOWN_METRICS if name in version.metrics),
                "",
            ),
            escape(version.job_id or "uploaded"),
        )
    console.print(table)


def show_diff(console: Console, diff: dict[str, Any]) -> None:
    """Norms and cosines of the two updates, a row a layer; then what was measured of both."""
    console.print(f"{diff['from'] or 'base'} → {diff['to']}", markup=False, style="bold")
    table = _table("layer", "norm before", "norm after", "norm of change", "cosine")
    for row in [*diff["layers"], {"layer": "all", **diff["total"]}]:
        figures = (row[name] for name in ("norm_from", "norm_to", "norm_change", "cosine"))
        layer = "–" if row["layer"] is None else str(row["layer"])
        table.add_row(layer, *("–" if figure is None else f"{figure:.4g}" for figure in figures))
    console.print(table)
    for name, values in diff.get("metrics", {}).items():
        if values["delta"]:
            console.print(
                f"{name} {values['from']:.4g} → {values['to']:.4g} ({values['delta']:+.4g})", markup=False
            )
    for run in diff.get("evaluations", []):
        if run["delta"] is not None:
            before, after = run["from"]["mean"], run["to"]["mean"]
            console.print(f"{run['suite']} {before:.3f} → {after:.3f} ({run['delta']:+.3f})", markup=False)


def size(num_bytes: float) -> str:
    """Bytes as 512 B, 2.0 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _age(version: kiln.AdapterVersion | None) -> str:
    created = version.raw.get("created_at") if version else None
    return duration(max(time.time() - created, 0)) if created else ""


def _table(*names: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    return table
