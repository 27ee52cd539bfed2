"""Tables of shapes on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.tables import figures_table, interval, pairs_table
from rich.table import Table

from selfspec.utils.sizes import in_words
from shapes.ceilings import Ceilings


def ceilings_table(ceilings: Ceilings) -> Table:
    """The device's ceilings."""
    return pairs_table(
        "ceilings, measured in this run",
        {
            "copy, bytes read and written": f"{ceilings.copy_bytes_per_second / 1e9:.4g} GB/s",
            "bf16 matrix product": f"{ceilings.matmul_flops / 1e12:.4g} TFLOP/s",
        },
    )


def skip_cells_table(cells: Sequence[dict[str, Any]]) -> Table:
    """One line for each cell of drafts that skip."""
    columns = ("", "rows x context", "agreement wanted", "measured", "gamma", "draft cost", "tokens/ round")
    figures = ("plain tokens/s", "of limit", "ours tokens/s", "speedup", "ideal", "efficiency", "distinct", "differing")
    return figures_table(
        "random weights: time real, agreement set",
        (*columns, *figures),
        map(_skip_cell, cells),
        "Agreement was set by scaling the output projections of the skipped sub-layers in the target, then measured. "
        "Limit: weight and KV bytes of a pass over the copy bandwidth. Ideal: from tokens per round and passes "
        "measured in isolation. Decoding without prefill.",
    )


def _skip_cell(cell: dict[str, Any]) -> list[str]:
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
    """Hugging Face's decoders in one cell."""
    speeds = peers["tokens_per_second"].items()
    return figures_table(
        f"{peers['cell']}: {peers['basis']}",
        ("", "tokens/s", "ours over it"),
        ([name, f"{speed:.1f}", f"{peers['ours_over'][name]:.2f}x"] for name, speed in speeds),
        f"early exit: {peers['early_exit_settings']}, agreement {peers['early_exit_agreement']:.3f}",
    )


def search_table(search: dict[str, Any]) -> Table:
    """The phases of a search."""
    size = f"{search['prompts']} prompts x {search['new_tokens']} tokens, drafts of up to {search['gamma_max']}"
    return pairs_table(
        f"search of {search['shape']}, {search['sublayers']} sub-layers: {size}",
        {
            "trials complete, pruned": f"{search['trials_whole']}, {search['trials_ended_early']}",
            **{f"{name}, seconds": f"{seconds:.1f}" for name, seconds in search["phases_s"].items()},
            "all, seconds": f"{search['seconds']:.1f}",
        },
    )


def target_table(result: dict[str, Any]) -> Table:
    """The target's passes by length."""
    passes = result["passes"]
    table = figures_table(
        f"{result['shape']}, {result['dtype']}: a pass of the target reads {in_words(result['bytes_a_pass_reads'])}",
        ("tokens", "ms", "over one token (least-greatest)", "padded to"),
    )
    padded = (passes["pass_lengths"] or {"target": []})["target"]
    for t, milliseconds in passes["target_ms"].items():
        longer = padded[t - 1] if t <= len(padded) and padded[t - 1] > t else None
        table.add_row(str(t), f"{milliseconds:.1f}", interval(passes["target_over_one_token"][t]), str(longer or ""))
    return table


def drafts_table(result: dict[str, Any]) -> Table:
    """The drafts' passes over one token."""
    table = figures_table(
        f"{result['shape']}: a pass of the draft, one token",
        ("draft", "padded to", "ms", "over the target (least-greatest)", "over the better plain pass", "memory"),
    )
    for name, draft in result["passes"]["drafts"].items():
        shares = (interval(draft[key]) for key in ("share_of_target", "share_of_better_plain"))
        padded = str(draft["tokens"]) if draft["tokens"] > 1 else ""
        memory = in_words(draft["bytes"]) if draft["bytes"] else "none"
        table.add_row(name, padded, f"{draft['ms']:.1f}", *shares, memory)
    return table


def quantised_cell_table(cell: dict[str, Any]) -> Table:
    """The contenders of one cell of a quantised draft."""
    missed = " (out of reach)" if cell["out_of_reach"] else ""
    table = figures_table(
        f"{cell['draft']}, gamma {cell['gamma']}: agreement {cell['agreement']:.3f} of {cell['agreement_wanted']:g} "
        f"wanted{missed}",
        ("", "tokens/s", f"over {cell['better_plain']} (95 %)", "tokens per round", "differing from plain"),
        caption=f"s = {cell['scale']:.3g}; a new copy would be {cell['requantised']:.3f} times as far from the "
        f"target; {cell['distinct_tokens']:.0%} of a text's tokens are distinct",
    )
    for score in cell["contenders"]:
        per_round = score["tokens_per_round"]
        table.add_row(
            score["name"],
            f"{score['tokens_per_second']:.1f}",
            interval(score["ratios"].get(cell["better_plain"])),
            f"{per_round:.2f}" if per_round else "",
            f"{score['differing_tokens']} ({score['near_ties']} near-ties, {score['errors']} errors)",
        )
    return table


def quantised_ceilings_table(result: dict[str, Any], agreements: Sequence[float]) -> Table:
    """The ceiling of each draft at each agreement, and the measured speedup."""
    ends = result["agreement"]
    table = figures_table(
        f"{result['shape']}: speedup over the better plain decoding, time real, agreement set",
        ("draft", *(f"{what} at {a:g}" for a in agreements for what in ("gamma", "ceiling", "measured"))),
        caption=f"agreement: {ends['highest']:.3f} at s = 0; {ends['as_drawn']:.3f} at s = 1, as drawn" if ends else "",
    )
    found = {(cell["draft"], cell["agreement_wanted"]): cell for cell in result["cells"]}
    ceilings = {(one["draft"], one["agreement"]): one for one in result["ceilings"]}
    for draft in result["passes"]["drafts"]:
        cells = []
        for agreement in agreements:
            one, cell = ceilings[draft, agreement], found.get((draft, agreement))
            cells += [str(one["gamma"]), f"{one['speedup']:.2f}x", interval(cell["speedup"]) if cell else ""]
        table.add_row(draft, *cells)
    return table


def rightness_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Agreement and tokens per round of drafts."""
    depths = range(1, 1 + len(rows[0]["agreement_by_depth"]))
    columns = ("of the weights read", "agreement", *(f"at depth {depth}" for depth in depths), "acceptance")
    table = figures_table(title, ("draft", *columns, "tokens per round"))
    for row in rows:
        by_depth = (f"{share:.3f}" for share in row["agreement_by_depth"])
        figures = (f"{row['agreement']:.3f}", *by_depth, f"{row['acceptance_rate']:.3f}")
        table.add_row(row["draft"], f"{row['read']:.1%}", *figures, f"{row['tokens_per_round']:.2f}")
    return table
