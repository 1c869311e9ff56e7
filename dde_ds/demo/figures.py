"""Draw the demo's two pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS, ROWS = 12, 2


def comparison(captions: list[str], drawn: dict[str, Tensor], real: Tensor, path: Path) -> None:
    """Draw the images of the base and the aligned model beside the real preferred ones, for the first captions of the file.

    The captions are not a selection.

    Args:
        drawn: images by model, each (captions, images a caption, 3,H,W) uint8.
        real: the real preferred images, (captions,3,H,W) in [-1,1].
    """
    sources = {"base": drawn["base"][:, 0], "aligned": drawn["aligned"][:, 0], "real": ((real + 1) * 127.5).byte()}
    figure, axes = plt.subplots(ROWS * len(sources), COLUMNS, figsize=(COLUMNS, ROWS * len(sources) * 1.06), dpi=100)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for number, caption in enumerate(captions[: ROWS * COLUMNS]):
        block, column = divmod(number, COLUMNS)
        for line, (name, images) in enumerate(sources.items()):
            axis = axes[block * len(sources) + line, column]
            axis.imshow(images[number].permute(1, 2, 0).numpy())
            if line == 0:
                axis.set_title(caption if len(caption) < 17 else caption[:15] + "…", fontsize=6.5)
            if column == 0:
                axis.set_ylabel(name, fontsize=8)
    figure.subplots_adjust(left=0.025, right=0.995, top=0.97, bottom=0.005, wspace=0.05, hspace=0.12)
    figure.savefig(path)
    plt.close(figure)


def curves(rows: list[dict], path: Path) -> None:
    """Draw loss, accuracy, rewards and the drift of the errors over the run."""
    rows = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in rows]
    panels = {
        "loss": {"loss": "loss"},
        "accuracy": {"rewards/accuracies": "share of pairs with z > 0, of z = 0 one half"},
        "rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        "error drift: policy - reference": {"drift/chosen": "chosen", "drift/rejected": "rejected"},
        "errors": {"error/policy_chosen": "policy, chosen", "error/policy_rejected": "policy, rejected"},
    }
    # An objective without a reference has no rewards and no drift. Where there is a drift, it says more than the errors.
    panels = {title: lines for title, lines in panels.items() if all(key in rows[0] for key in lines)}
    if len(panels) > 2:
        del panels["errors"]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), dpi=100)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for key, label in lines.items():
            axis.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
        axis.set_title(title)
    for axis in axes:
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
