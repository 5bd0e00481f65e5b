"""How work is cut into tiles and parts. Sizes may be symbolic: only comparisons are asked of them."""

from __future__ import annotations

#: About how many programs fill a GPU, whatever the shape: more than any GPU runs at once with this little work each.
PROGRAMS = 2048


def power_of_two(size: int, most: int) -> int:
    """The smallest power of two that is not below ``size``, but at most ``most``, a power of two itself."""
    power = 1
    while power < size and power < most:
        power *= 2
    return power


def parts_for(length: int, step: int, programs: int) -> tuple[int, int]:
    """Into how many parts to cut what each of ``programs`` programs goes over, so that there is enough to run at once.

    Args:
        length: What a program goes over.
        step: How much of it at a time.
        programs: How many programs there are before anything is cut.

    Returns:
        The number of parts, at least 1, and the length of each but the last, a multiple of ``step``.
    """
    steps = max(1, -(-length // step))
    parts = min(steps, max(1, PROGRAMS // max(1, programs)))
    part_steps = -(-steps // parts)
    return -(-steps // part_steps), part_steps * step
