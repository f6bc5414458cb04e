"""Plots of metrics over training. matplotlib is imported when something is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[tuple[int, float]]


def plot_curves(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draws one panel for each metric, one line for each series.

    Args:
      panels: title -> series name -> (step, value) pairs. Empty series are left out.
      path: the PNG to write; folders on the way are made.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {title: {n: c for n, c in series.items() if c} for title, series in panels.items()}
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        for name, curve in series.items():
            steps, values = zip(*curve, strict=True)
            axis.plot(steps, values, label=name, linewidth=1.4, marker="." if len(steps) < 30 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
