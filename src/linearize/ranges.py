"""Numbers as people list them: "0-7,16"."""

from collections.abc import Iterable
from itertools import groupby


def numbers(text: str, most: int) -> list[int]:
    """What `text` lists, each once, in order; of a range that goes past `most` its ends, which tell that it does.

    Raises ValueError where a part is neither a number nor a range upwards.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        start, end = int(first), int(last if dash else first)
        if end < start:
            raise ValueError(part)
        found.update((start, *range(start, min(end, most) + 1), end))
    return sorted(found)


def spans(given: Iterable[int]) -> str:
    """Numbers in order, each once, as `numbers` reads them: "0-4,6,8-29"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(given), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
