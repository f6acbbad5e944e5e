"""Draws minings.svg: which negatives each mining takes for one anchor, as kdfast's own definitions have it.

python docs/minings.py
"""

from pathlib import Path

import torch

from kdfast._ops.triplet import reference

POSITIVES, NEGATIVES = (0.66, 0.95), (0.42, 0.56, 0.72, 0.81, 1.0, 1.11, 1.3, 1.46)
MARGIN, WIDTH = 0.2, 5  # WIDTH of the rows: the drawn minings depend on it
LEFT, SCALE, STEP, TOP = 190, 420, 26, 44  # pixels: of distance 0.35, of one unit of distance, between lines, above the first
LINES = {  # mining -> positives it has a line for
    "batch_hard": (1,),
    "easy_positive": (0,),
    "easy_semihard": (0,),
    "hard_semihard": (1,),
    "batch_all": (0, 1),
    "semi_hard": (0, 1),
    "semi_hard_facenet": (0, 1),
    "multi_similarity": (0, 1),
    "distance_weighted": (1,),
    "focal": (1,),
}


def taken() -> dict[str, torch.Tensor]:
    """How much of each negative a pair takes, 0 ... 1: [positives, negatives] by mining."""
    d = torch.tensor([[*POSITIVES, *NEGATIVES]], dtype=torch.float64)
    count = len(POSITIVES)
    positive = torch.arange(d.shape[1])[None] < count
    shares = {}
    for mining in LINES:
        if mining in ("distance_weighted", "focal"):
            weights = reference.negative_weights(d, ~positive, mining, WIDTH, "drop")[0, count:]
            shares[mining] = (weights / weights.max()).expand(count, -1)
        else:
            settings = (MARGIN,) if mining == "semi_hard" else ()
            shares[mining] = getattr(reference, mining)(d, positive, ~positive, *settings)[0, :count, count:].double()
    return shares


def x(distance: float) -> float:
    return LEFT + SCALE * (distance - 0.35)


def line(mining: str, which: int, y: int, shares: torch.Tensor) -> list[str]:
    first = which == LINES[mining][0]
    drawn = [f'<text x="8" y="{y + 4}">{mining}</text>'] if first else []
    d = POSITIVES[which]
    drawn.append(f'<rect x="{x(d):.0f}" y="{y - 8}" width="{SCALE * MARGIN:.0f}" height="16" class="margin"/>')
    drawn.append(f'<line x1="{x(0.37):.0f}" y1="{y}" x2="{x(1.55):.0f}" y2="{y}"/>')
    for k, p in enumerate(POSITIVES):
        drawn.append(f'<rect x="{x(p) - 5:.0f}" y="{y - 5}" width="10" height="10" class="{"positive" if k == which else "other"}"/>')
    for n, share in zip(NEGATIVES, shares[which].tolist(), strict=True):
        circle = f'<circle cx="{x(n):.0f}" cy="{y}" r="5"'
        drawn.append(f'{circle} fill="#fff"/>{circle} class="negative" fill-opacity="{share:.2f}"/>')
    return drawn


def main() -> None:
    shares, rows = taken(), [(mining, which) for mining, pairs in LINES.items() for which in pairs]
    height = TOP + STEP * len(rows) + 8
    style = (
        "text{font:13px sans-serif;fill:#222}line{stroke:#999}.margin{fill:#cfe3f7}.positive{fill:#1f6fb2}"
        ".other{fill:#fff;stroke:#1f6fb2}.negative{fill:#c0392b;stroke:#c0392b}"
    )
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x(1.58):.0f} {height}" width="{x(1.58):.0f}" height="{height}">',
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="18">distance from the anchor, to the right; squares: positives, circles: negatives</text>',
    ]
    for k, (mining, which) in enumerate(rows):
        body += line(mining, which, TOP + STEP * k, shares[mining])
    Path(__file__).with_suffix(".svg").write_text("\n".join([*body, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
