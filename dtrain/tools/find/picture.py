"""A range test as a picture: PNG, SVG or PDF."""

from __future__ import annotations

import io

from dtrain.report.picture import COLOURS
from dtrain.tools.find.curve import Curve, Suggestion


def picture(curve: Curve, suggestion: Suggestion | None, *, kind: str) -> bytes:
    """Returns the picture of a curve.

    Args:
        curve: at least one step.
        suggestion: is marked, where there is one.
        kind: png, svg or pdf.
    """
    from matplotlib.figure import Figure

    rates, losses, smoothed = curve.points()
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color=COLOURS[0], linewidth=0.8, alpha=0.4, label="loss")
    axes.plot(rates, smoothed, color=COLOURS[0], linewidth=1.8, label="smoothed")
    if suggestion is not None:
        for rate, words, colour in (
            (suggestion.steepest, "steepest descent", COLOURS[1]),
            (suggestion.tenth, "lowest / 10", COLOURS[2]),
        ):
            axes.axvline(rate, color=colour, linestyle=(0, (4, 3)), linewidth=1.2, label=f"{words}: {rate:.2g}")
    axes.set_xscale("log")
    low, high = min(smoothed), curve.top()
    axes.set_ylim(low - 0.3 * (high - low), high)
    axes.set_xlabel("learning rate", fontsize="small")
    axes.set_ylabel("training loss", fontsize="small")
    axes.grid(visible=True, color="#e4e7ea", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=130)
    return out.getvalue()
