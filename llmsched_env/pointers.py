"""Functions that compiled code calls by their address.

Where the engine calls what it is given, a policy's rule, a time model, a reward, another engine's scheduler, the caller
would have to be compiled again for each of them if the function were known to it. A call by address is compiled once,
whatever stands behind it; code that a run does not use is never compiled, and no module is optimised twice.

The functions take records (``llmsched_env.records``) and integers and return nothing, an ``int`` or a ``float``. Under
``NUMBA_DISABLE_JIT=1`` an address is a place in a list of functions.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from llmsched_env.compiled import Compiled
from llmsched_env.errors import ConfigError
from llmsched_env.records import Level, Record, Rows, record_type

_KEPT: dict[int, Any] = {}  # an address is good as long as its function lives
_ADDRESSES: dict[tuple[Any, Any], int] = {}

Argument = type[Record] | type[Rows] | tuple[type[Record] | type[Rows], Level] | type[int]


def _numba_type(argument: Argument) -> Any:
    if argument is int:
        return types.int64
    return record_type(*argument) if isinstance(argument, tuple) else record_type(argument)  # type: ignore[arg-type]


def address_of(function: Callable[..., Any], arguments: tuple[Argument, ...], result: type | None = None) -> int:
    """The address of a function decorated with ``llmsched_env.compiled.compiled``, compiled for these arguments.

    Args:
        arguments: for each argument ``int``, a record class, or (class, level): what the function is shown of it.
        result: None, int or float.

    Raises:
        TypeError: not a compiled function.
        numba.core.errors.NumbaError: the function cannot be compiled, for example because it reads what is hidden from it.
    """
    if not callable(function):
        raise TypeError(f"{function!r}: must be a function decorated with llmsched_env.compiled.compiled")
    key = (function, arguments)
    if key in _ADDRESSES:
        return _ADDRESSES[key]
    if numba.config.DISABLE_JIT:
        shown = tuple(a[1] if isinstance(a, tuple) else None for a in arguments)
        _ADDRESSES[key] = len(_KEPT) + 1
        _KEPT[_ADDRESSES[key]] = (function, shown)
        return _ADDRESSES[key]
    if not isinstance(function, Compiled):
        raise TypeError(f"{function!r}: must be a function decorated with llmsched_env.compiled.compiled")
    dispatcher = function.dispatcher
    returned = types.none if result is None else types.float64 if result is float else types.int64
    signature = returned(*map(_numba_type, arguments))
    dispatcher.compile(signature)
    found = dispatcher.overloads[tuple(signature.args)]
    address = int(found.library.get_pointer_to_function(found.fndesc.llvm_func_name))
    _KEPT[address] = function
    _ADDRESSES[key] = address
    return address


def given_address(owner: str, function: Callable[..., Any], arguments: tuple[Argument, ...], result: type | None = None) -> int:
    """``address_of`` a function that somebody gave.

    Args:
        owner: begins the message, such as ``rule 'mine'``.

    Raises:
        ConfigError: it cannot be compiled, for example because it reads what is hidden from it.
    """
    try:
        return address_of(function, arguments, result)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{owner}: {error}") from error
    except Exception as error:  # numba has several families of errors; all others pass
        if type(error).__module__.startswith("numba"):
            raise ConfigError(f"{owner} cannot be compiled: {error}") from error
        raise


def name_of(function: Any) -> str:
    """A function as errors name it."""
    return repr(getattr(function, "__name__", function))


class Callback:
    """A Python function without arguments that compiled code can call by ``call_back``; what it raises is kept for ``check``.

    Attributes:
        address: good as long as this object lives.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._error: BaseException | None = None
        if numba.config.DISABLE_JIT:
            self.address = id(self)
            own = weakref.ref(self)
            _KEPT[self.address] = (lambda *_: _run_if_alive(own), ())
            weakref.finalize(self, _KEPT.pop, self.address, None)
        else:
            self._entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._run)
            self.address = int(ctypes.cast(self._entry, ctypes.c_void_p).value or 0)

    def _run(self, *_: Any) -> None:
        try:
            self._function()
        except BaseException as error:  # nothing can be raised through machine code
            self._error = error

    def check(self) -> None:
        """Raise what the function raised in the last call, if it did."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def _run_if_alive(callback: weakref.ref[Callback]) -> None:
    alive = callback()
    if alive is not None:
        alive._run()


def _call(returned: Any) -> Any:
    def typed(typingctx: Any, address: Any, *arguments: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kinds = list(sig.args[1])
            pointer = builder.inttoptr(args[0], context.call_conv.get_function_type(returned, kinds).as_pointer())
            passed = cgutils.unpack_tuple(builder, args[1])
            status, called = context.call_conv.call_function(builder, pointer, returned, kinds, passed)
            with cgutils.if_unlikely(builder, status.is_error):  # what the function raises reaches Python
                context.call_conv.return_status_propagate(builder, status)
            return context.get_dummy_value() if returned is types.none else called

        wide = [types.int64 if isinstance(a, types.Integer | types.Boolean) else a for a in arguments]
        return returned(types.int64, types.BaseTuple.from_types(wide)), build

    return typed


def _called_back(typingctx: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [cgutils.get_null_value(cgutils.voidptr_t)])
        return context.get_dummy_value()

    return types.none(types.int64), build


def _python_call(address: int, *arguments: Any) -> Any:
    function, shown = _KEPT[address]
    levels = shown or (None,) * len(arguments)
    return function(*(a if level is None else a.at_level(level) for a, level in zip(arguments, levels, strict=True)))


if numba.config.DISABLE_JIT:
    call = call_int = call_float = call_back = _python_call
else:
    call = intrinsic(_call(types.none))
    call_int = intrinsic(_call(types.int64))
    call_float = intrinsic(_call(types.float64))
    call_back = intrinsic(_called_back)
