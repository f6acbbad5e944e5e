"""Tables in words and figures."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row: the first column to the left, the others to the right, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def over_seeds(seeds: int) -> str:
    """What figures over so many seeds are: of one seed they have no spread."""
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
