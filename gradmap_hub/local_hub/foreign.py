"""Foreign numbers of queries."""

#: Decimal digits that always fit into 64 bits; Python refuses to read numbers of more than 4300.
_DIGITS = 18


def whole_number(text: str | None, default: int) -> int:
    """The number in a query; ``default`` for anything but at most 18 digits."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= _DIGITS else default
