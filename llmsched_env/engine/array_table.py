"""Many arrays as one argument of a compiled call.

numba wraps every array argument anew at each call, some 60 ns each, which for the twenty arrays of an
engine is a fifth of a step of the scalar environment. So the arrays are told once an episode by their
addresses and shapes, and the compiled function puts them together again for nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from llmsched_env.compiled import inlined


@intrinsic
def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), build


class ArrayTable:
    """Addresses and shapes of arrays, which it keeps alive. A copy of it is a table of the copied arrays.

    Args:
        arrays: C-contiguous, of one or two dimensions.

    Attributes:
        table: (arrays, 3) int64, address, rows and columns (0 for one dimension).

    Raises:
        ValueError: an array of another layout.
    """

    def __init__(self, arrays: tuple[npt.NDArray[Any], ...]) -> None:
        self.arrays = arrays
        self.table = np.zeros((len(arrays), 3), dtype=np.int64)
        for row, array in zip(self.table, arrays, strict=True):
            if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable and 1 <= array.ndim <= 2):
                raise ValueError(f"array of shape {array.shape}: must be a C-contiguous writeable array of one or two dimensions")
            row[0] = array.ctypes.data
            row[1 : 1 + array.ndim] = array.shape

    def __getstate__(self) -> tuple[npt.NDArray[Any], ...]:
        return self.arrays

    def __setstate__(self, arrays: tuple[npt.NDArray[Any], ...]) -> None:
        self.__init__(arrays)  # type: ignore[misc]  # addresses do not outlive their arrays


@inlined
def ints(table, i):  # type: ignore[no-untyped-def]
    """Array i, (n,) int64."""
    return carray(_pointer(table[i, 0]), (table[i, 1],), np.int64)


@inlined
def small_ints(table, i):  # type: ignore[no-untyped-def]
    """Array i, (n,) int32."""
    return carray(_pointer(table[i, 0]), (table[i, 1],), np.int32)


@inlined
def floats(table, i):  # type: ignore[no-untyped-def]
    """Array i, (n,) float64."""
    return carray(_pointer(table[i, 0]), (table[i, 1],), np.float64)


@inlined
def int_rows(table, i):  # type: ignore[no-untyped-def]
    """Array i, (rows, columns) int32."""
    return carray(_pointer(table[i, 0]), (table[i, 1], table[i, 2]), np.int32)


@inlined
def float_rows(table, i):  # type: ignore[no-untyped-def]
    """Array i, (rows, columns) float64."""
    return carray(_pointer(table[i, 0]), (table[i, 1], table[i, 2]), np.float64)
