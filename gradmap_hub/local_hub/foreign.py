"""Numbers in query strings, which are untrusted."""

#: Decimal digits that always fit into 64 bits; Python refuses to parse more than 4300.
_DIGITS = 18


def whole_number(text: str | None, default: int) -> int:
    """The integer in a query parameter; ``default`` if it is missing or anything but 1 to 18 digits."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= _DIGITS else default
