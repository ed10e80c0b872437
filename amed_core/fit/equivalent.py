"""In how many calls another sampler comes as near: what people compare with."""

from collections.abc import Callable

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
