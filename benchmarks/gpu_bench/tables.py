"""Tables: what a run measured, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from gpu_bench.aims import Aim
from gpu_bench.budget import Stage
from gpu_bench.ceilings import Ceilings


def ceilings_table(ceilings: Ceilings) -> Table:
    """What the device can do at most."""
    table = Table(title="ceilings, measured in this run", show_header=False)
    table.add_row("copy, bytes read and written", f"{ceilings.copy_bytes_per_second / 1e9:.4g} GB/s")
    table.add_row("bf16 matrix product", f"{ceilings.matmul_flops / 1e12:.4g} TFLOP/s")
    return table


def cells_table(cells: Sequence[dict[str, Any]]) -> Table:
    """One line per cell."""
    table = Table(
        title="random weights: time real, agreement set",
        caption="Agreement was set by scaling the output projections of the skipped sub-layers in the target; the one "
        "shown was measured. Limit: weight and KV bytes of a pass over the copy bandwidth. Ideal: tokens per round and "
        "passes measured in isolation. Decoding without prefill.",
    )
    columns = ("", "rows x context", "agreement wanted", "measured", "gamma", "draft cost", "tokens/ round")
    figures = ("plain tokens/s", "of limit", "ours tokens/s", "speedup", "ideal", "efficiency", "distinct", "differing")
    for column in (*columns, *figures):
        table.add_column(column, justify="left" if not column else "right")
    for cell in cells:
        table.add_row(*_cells(cell))
    return table


def _cells(cell: dict[str, Any]) -> list[str]:
    judged = "" if cell["errors"] is None else f" ({cell['near_ties']} near-ties, {cell['errors']} errors)"
    return [
        f"{cell['shape']}, {cell['dtype']}",
        f"{cell['rows']} x {cell['context']}",
        f"{cell['agreement_wanted']:g}",
        f"{cell['agreement']:.3f}",
        str(cell["gamma"]),
        f"{cell['draft_cost']:.2f}",
        f"{cell['tokens_per_round']:.2f}",
        f"{cell['plain_tokens_per_second']:.1f}",
        f"{cell['share_of_limit']:.1%}",
        f"{cell['ours_tokens_per_second']:.1f}",
        f"{cell['speedup']:.2f}x",
        f"{cell['ideal_speedup']:.2f}x",
        f"{cell['efficiency']:.3f}",
        f"{cell['distinct_tokens']:.0%}",
        f"{cell['differing_tokens']}{judged if cell['differing_tokens'] else ''}",
    ]


def peers_table(peers: dict[str, Any]) -> Table:
    """Hugging Face's ways in one cell."""
    table = Table(title=f"{peers['cell']}: {peers['basis']}")
    for column in ("", "tokens/s", "ours over it"):
        table.add_column(column, justify="left" if not column else "right")
    for name, speed in peers["tokens_per_second"].items():
        table.add_row(name, f"{speed:.1f}", f"{peers['ours_over'][name]:.2f}x")
    table.caption = f"early exit: {peers['early_exit_settings']}, agreement {peers['early_exit_agreement']:.3f}"
    return table


def search_table(search: dict[str, Any]) -> Table:
    """Where the time of a search went."""
    size = f"{search['prompts']} prompts x {search['new_tokens']} tokens, drafts of up to {search['gamma_max']}"
    table = Table(title=f"search of {search['shape']}, {search['sublayers']} sub-layers: {size}", show_header=False)
    table.add_row("trials whole, ended early", f"{search['trials_whole']}, {search['trials_ended_early']}")
    for name, seconds in search["phases_s"].items():
        table.add_row(f"{name}, seconds", f"{seconds:.1f}")
    table.add_row("all, seconds", f"{search['seconds']:.1f}")
    return table


def aims_table(shape: str, aims: Sequence[Aim]) -> Table:
    """What was wanted, and what came of it."""
    table = Table(title=f"aims, {shape}, 1 x 512, agreement 0.9")
    for column in ("", "wanted", "measured", ""):
        table.add_column(column)
    for aim in aims:
        measured = "open" if aim.measured is None else f"{aim.measured:.3g}"
        table.add_row(aim.name, aim.wanted, measured, {True: "met", False: "missed", None: ""}[aim.met])
    return table


def stages_table(stages: Sequence[Stage]) -> Table:
    """What was measured, and what was not and why."""
    table = Table(title="stages")
    for column in ("", "", "seconds", "why"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for stage in stages:
        table.add_row(stage.name, stage.status, f"{stage.seconds:.1f}", stage.reason)
    return table
