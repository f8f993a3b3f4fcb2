"""Programmatic dependent launch: a kernel starts while the one before it still runs.

On Hopper and newer GPUs a kernel launched with `launch_options` may start as soon as every program
of its predecessor has called `start_dependents` (or ended). It then warms the L2 cache with data
that no kernel writes, the weights, and calls `wait_for_producers` before it reads or writes
anything else. That hides the launch and the ramp, about 1.5 µs of a decode step's kernels.

Rules, for kernels that use this:
- `wait_for_producers` comes before every load of what a kernel may have written, and before every
  store (the memory may still be read by a kernel further back). It returns when the predecessor
  has ended; as that one waited too, everything before has ended as well.
- Every program waits, also one that finds nothing to do: the next kernel counts on it.
- Before the wait a kernel reads only what none writes while the engine serves (the weights), what
  the host has seen complete before the launch (an adapter's tables), or what a copy in the same
  stream wrote (its rows): copies start no dependents. Or what was written before the launch of a
  kernel that starts no dependents, if another one has been launched since (`reads_early` of the
  DeltaNet's step: a pass begins with such a kernel, and what its rows remember was written before).
  Or what was written before a predecessor that starts its dependents only after its own wait
  (`shows_producers` of the linear layers), past the L1 cache. Or it brings data nearer with
  `prefetch_to_l2`, which puts nothing into registers.
- A kernel launched the usual way after one that starts its dependents is safe: it waits for its end.

Source: CUDA programming guide, Programmatic Dependent Launch; PTX `griddepcontrol`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.dispatch import is_interpreted


@cache
def supports_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device may be launched before their predecessors end."""
    if device.type != "cuda" or is_interpreted():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(is_dependent: bool) -> dict[str, bool]:
    """Arguments of a kernel launch: its `DEPENDENT` constant and Triton's own switch."""
    return {"DEPENDENT": True, "launch_pdl": True} if is_dependent else {"DEPENDENT": False}


@triton.jit
def start_dependents():
    """Let the next kernel's programs start wherever there is room for them."""
    gdc_launch_dependents()


@triton.jit
def wait_for_producers():
    """Wait until the kernels before this one have ended and their writes can be seen."""
    gdc_wait()


@triton.jit
def prefetch_to_l2(ptrs, num_bytes):
    """Ask for `num_bytes` at each pointer; both are multiples of 16, none or less is no request."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.gt.s32 wanted, $2, 0;
        @wanted cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptrs.to(tl.int64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
