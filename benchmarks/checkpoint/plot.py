"""The picture: how long training stands still, and how long until a checkpoint is safe, way by way."""

from pathlib import Path
from statistics import median

Spread = dict[str, list[float]]  # way -> seconds, one a round


def prepare() -> None:
    """Fail now rather than after the measuring, if what draws is not there."""
    import matplotlib

    matplotlib.use("svg")


def draw(target: Path, stalls: Spread, durable: Spread, *, title: str) -> None:
    """Write an SVG with one bar a way (the median) and its rounds as dots."""
    prepare()
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "dtrain", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.42 * len(stalls) + 1.2), sharey=True, layout="constrained")
    for axis, found, what in zip(axes, (stalls, durable), ("training stands still", "safe on the disk"), strict=True):
        names = list(found)[::-1]
        colours = ["#1f6f54" if name.startswith("dtrain") else "#9aa5b1" for name in names]
        axis.barh(names, [median(found[name]) for name in names], color=colours)
        for name in names:
            axis.plot(found[name], [name] * len(found[name]), "o", color="#22303c", markersize=2.5)
        axis.set_xlabel(f"{what}, seconds")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
