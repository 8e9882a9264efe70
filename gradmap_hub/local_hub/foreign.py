"""Foreign JSON and numbers, read in one place: what comes in can also go out again in an answer."""

import json
import math
from typing import Any

#: Levels of arrays and objects. Python's own encoder gives up at about 1000, later than its decoder.
_DEPTH_LIMIT = 100
#: Decimal digits that always fit into 64 bits; Python refuses to read numbers of more than 4300.
_DIGITS = 18


def load_json(raw: bytes, *, finite: bool = True) -> Any:
    """The value of a JSON document. `finite`: refuse NaN and infinite numbers, which an answer cannot carry.

    Raises:
        ValueError: it is not JSON in UTF-8, has numbers that are not finite, or is what :func:`check_value` refuses.
    """
    checks = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(raw.decode("utf-8"), **checks)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_value(value)
    return value


def check_value(value: object) -> None:
    """Check that a value made of JSON's types can be written as JSON in UTF-8.

    Raises:
        ValueError: it is nested too deeply, or a string has half of a surrogate pair, which UTF-8 cannot express.
    """
    level: list[object] = [value]
    for _ in range(_DEPTH_LIMIT):
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii():
                    item.encode()  # UnicodeEncodeError is a ValueError
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


def whole_number(text: str | None, default: int) -> int:
    """The number in a query; ``default`` for anything but at most 18 digits."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= _DIGITS else default


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond the numbers of JSON")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
