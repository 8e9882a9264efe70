"""The recipes of the quantised formats. They are tried in order; the first that passes the gate is used."""

from __future__ import annotations

from dataclasses import dataclass

# The smallest block that ONNX Runtime's operators support.
LEAST_BLOCK = 16
# Matrices of an int4 graph that keep 8 bits, besides the head and the embedding.
NONE, MIXED, GATES_ONLY = "none", "mixed", "gates_only"
NEAREST, SEARCH, GPTQ, REGRID = "nearest", "search", "gptq", "regrid"


@dataclass(frozen=True)
class Recipe:
    """One way to quantise.

    `rounding`: how codes are chosen, see blockwise.py; without calibration sequences GPTQ becomes SEARCH. REGRID
    does not round: it is for models whose weights come from 4-bit quantisation; matrices that have been changed since
    are kept in 8 bits.
    `block`: inputs per scale; halved, down to 16, for a matrix whose inputs it does not divide.
    `head_bits`: of the language-modelling head and the token embedding, which share their codes if they are tied.
    `eight_bit`: MIXED is llama.cpp's choice (value and down projections of the outer eighths of the layers and of every
    third layer between); GATES_ONLY keeps only the gate and up projections, about half of all weights, in 4 bits."""

    name: str
    bits: int
    block: int = 32
    rounding: str = NEAREST
    symmetric: bool = True
    head_bits: int = 8
    eight_bit: str = NONE


# ONNX Runtime's kernels are faster with blocks of 64 than of 32, in 8 and in 4 bits; the zero recovers most of the
# accuracy that the larger block loses.
INT8 = (
    Recipe("int8, blocks of 64", 8, block=64, symmetric=False),
    Recipe("int8, blocks of 32", 8),
    Recipe("int8, blocks of 16, searched", 8, block=16, rounding=SEARCH, symmetric=False),
)
# From the smallest and fastest to the largest.
INT4 = (
    Recipe("int4, nearest, blocks of 32", 4),
    Recipe("int4, on the grid that the weights come from", 4, rounding=REGRID, symmetric=False),
    Recipe("int4, gptq", 4, block=64, rounding=GPTQ, symmetric=False),
    Recipe("int4, gptq, outer and every third layer in int8", 4, 64, GPTQ, symmetric=False, eight_bit=MIXED),
    Recipe("int4, gptq, all but gate and up projections in int8", 4, 64, GPTQ, symmetric=False, eight_bit=GATES_ONLY),
    Recipe("int4, gptq, all but gate and up in int8, blocks of 32", 4, 32, GPTQ, symmetric=False, eight_bit=GATES_ONLY),
)
LADDERS: dict[str, tuple[Recipe, ...]] = {"int8": INT8, "int4": INT4}
