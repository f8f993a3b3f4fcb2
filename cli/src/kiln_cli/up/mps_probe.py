"""`python -m kiln_cli.up.mps_probe`: whether this process reaches a GPU, and through an MPS server.

Ends with code 0 if so, else with one line that says what failed. It is a process of its own because
the driver decides about MPS once, when it is initialised.
"""

from __future__ import annotations

import ctypes
import sys

_MPS_ENABLED = 133  # CU_DEVICE_ATTRIBUTE_MPS_ENABLED


def why_not() -> str | None:
    """What keeps this process from a GPU under MPS; None if nothing does."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "libcuda.so.1 is not there"
    device, context, is_mps = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
    calls = (
        ("cuInit", ctypes.c_uint(0)),
        ("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0)),
        ("cuDeviceGetAttribute", ctypes.byref(is_mps), ctypes.c_int(_MPS_ENABLED), ctypes.c_int(0)),
        ("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(0)),
    )
    for name, *arguments in calls:
        code = getattr(driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            driver.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            return f"{name} failed with {(text.value or b'unknown').decode()} ({code})"
    driver.cuDevicePrimaryCtxRelease_v2(ctypes.c_int(0))
    return None if is_mps.value else "the driver does not use the MPS server"


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
    sys.exit(reason is not None)
