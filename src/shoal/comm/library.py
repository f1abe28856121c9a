"""The compiled group as ctypes sees it (csrc/group.cpp).

Knows where the file lies and its functions; nothing of tensors.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from ctypes import c_double, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path

_ABI = 2
_FUNCTIONS = {
    "abi": (c_int32, ()),
    "bytes": (c_int64, (c_int32,)),
    "create": (c_void_p, (c_int32, c_int64, c_int32, c_int32, c_int64)),
    "destroy": (None, (c_void_p,)),
    "all_reduce": (c_int32, (c_void_p, c_void_p, c_int64)),
    "all_gather": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p)),
    "send_parts": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "take_parts": (c_int32, (c_void_p, c_void_p)),
    "abort": (None, (c_void_p,)),
    "reset": (None, (c_void_p, c_uint32)),
    "set_speed": (None, (c_void_p, c_double)),
    "pay": (None, (c_void_p,)),
    "waited_ns": (c_int64, (c_void_p,)),
}
_REMEDY = (
    "install g++ and run `pip install --force-reinstall --no-deps --no-cache-dir shoal`, or "
    "`make clean setup` in a clone"
)


def load_library() -> ctypes.CDLL:
    """The library, its functions typed. Every call lets go of the GIL.

    Raises:
        OSError: it was not built, or does not load here; the message says what to do.
    """
    path = Path(__file__).parent / f"_group{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.is_file():
        raise OSError(f"the compiled group is not built (it is for Linux): {_REMEDY}")
    library = ctypes.CDLL(os.fspath(path), use_errno=True)
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, f"shoal_group_{name}")
        except AttributeError as error:
            raise OSError(f"{path} is of another version of shoal: rebuild it") from error
        function.restype, function.argtypes = result, arguments
    if library.shoal_group_abi() != _ABI:
        raise OSError(f"{path} is of another version of shoal: rebuild it")
    return library
