"""The settings that are tried for a quantised format, in order: the first that passes the gate wins."""

from __future__ import annotations

from dataclasses import dataclass

# Which matrices of an int4 graph are kept in 8 bits, beside the head and the embedding.
NONE, MIXED, GATES_ONLY = "none", "mixed", "gates_only"
NEAREST, SEARCH, GPTQ, REGRID = "nearest", "search", "gptq", "regrid"


@dataclass(frozen=True)
class Recipe:
    """`rounding`: how codes are chosen, see blockwise.py; without calibration rows GPTQ becomes SEARCH. REGRID rounds
    nothing: it is for models whose weights come from 4 bits, and keeps in 8 bits those that have changed since.
    `head_bits`: of the language-modelling head and the token embedding, which share their codes if they are tied.
    `eight_bit`: MIXED is llama.cpp's choice (value and down projections of the outer eighths and of every third layer
    between), GATES_ONLY leaves the gate and up projections in 4 bits, about half of all weights, and nothing else."""

    name: str
    bits: int
    block: int = 32
    rounding: str = NEAREST
    symmetric: bool = True
    head_bits: int = 8
    eight_bit: str = NONE


INT8 = (
    Recipe("int8, blocks of 32", 8),
    Recipe("int8, blocks of 16, searched", 8, block=16, rounding=SEARCH, symmetric=False),
)
# From the smallest and fastest up. On the 23-layer SmolLM2 without its grid, perplexity rose by 36, 24, 17 and 2 %;
# blocks of 16 (12 % with MIXED, 3 % with GATES_ONLY) cost more bytes than they are worth.
INT4 = (
    Recipe("int4, nearest, blocks of 32", 4),
    Recipe("int4, on the grid that the weights come from", 4, rounding=REGRID, symmetric=False),
    Recipe("int4, gptq, blocks of 32", 4, rounding=GPTQ, symmetric=False),
    Recipe("int4, gptq, outer and every third layer in int8", 4, rounding=GPTQ, symmetric=False, eight_bit=MIXED),
    Recipe(
        "int4, gptq, all but gate and up projections in int8", 4, rounding=GPTQ, symmetric=False, eight_bit=GATES_ONLY
    ),
)
LADDERS: dict[str, tuple[Recipe, ...]] = {"int8": INT8, "int4": INT4}
