"""In how many calls another sampler comes as near: what people compare with."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

MOST = 100  # calls that are tried


def calls_for(error: float, of_calls: Callable[[int], float], begin: int) -> int | None:
    """The fewest calls, from `begin` on, whose error is no larger; None if MOST do not suffice.

    `of_calls` measures an error in so many calls. Errors are taken to fall: few numbers of calls are tried.
    """
    low, high = begin - 1, begin
    while of_calls(high) > error:
        if high == MOST:
            return None
        low, high = high, min(2 * high, MOST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of_calls(middle) > error else (low, middle)
    return high


def calls_on(ladder: Sequence[tuple[int, float]], error: float) -> float:
    """The calls that take this error by a ladder of (calls, error); 0 below its first rung, infinity above its last.

    Between two rungs they are interpolated in the logarithms of both. A rung that is worse than the one before counts
    as that one: whoever has more calls may leave some.
    """
    best: list[tuple[int, float]] = []
    for calls, found in sorted(ladder):
        best.append((calls, min([found, *(one for _, one in best[-1:])])))
    if error >= best[0][1]:
        return 0.0 if error > best[0][1] else float(best[0][0])
    for (less, high), (more, low) in pairwise(best):
        if low <= error < high:
            if math.isinf(high):
                return float(more)
            part = math.log(high / error) / math.log(high / low)
            return math.exp(math.log(less) + part * math.log(more / less))
    return math.inf
