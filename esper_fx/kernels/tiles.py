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


def parts_for(steps: int, programs: int) -> tuple[int, int]:
    """Into how many parts to cut what each of ``programs`` programs goes over, so that there is enough to run at once.

    Args:
        steps: How many steps a program takes.
        programs: How many programs there are before anything is cut.

    Returns:
        The number of parts, at least 1, and how many steps each takes, but the last perhaps fewer.
    """
    steps = max(1, steps)
    parts = min(steps, max(1, PROGRAMS // max(1, programs)))
    part_steps = -(-steps // parts)
    return -(-steps // part_steps), part_steps
