"""Sizes that tiles and batches are rounded to."""


def ceil_power_of_two(x: int) -> int:
    """The least power of two that is not below x."""
    return 1 << (x - 1).bit_length()


def floor_power_of_two(x: int) -> int:
    """The greatest power of two that is not above x; 1 for anything below."""
    return 1 << (max(x, 1).bit_length() - 1)


def ceil_multiple(x: int, of: int) -> int:
    """The least multiple that is not below x."""
    return -(-x // of) * of
