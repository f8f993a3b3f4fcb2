"""Temporary: configurations of the verify kernels beside the kernel before and plain decode, us per layer."""

from __future__ import annotations

import sys

import delta_decode as bench
import torch
from measure import time_calls
from torch.profiler import ProfilerActivity, profile

from kiln_nn.kernels.delta_decode import before_verify, triton_fold


def per_layer(steps) -> str:
    return f"{time_calls(steps, 30).p50_ms * 1e3 / bench.LAYERS:7.2f}"


def profiled(steps) -> None:
    for step in steps[:2]:
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for step in steps[:4]:
            step()
        torch.cuda.synchronize()
    for event in trace.key_averages():
        if event.device_time_total > 0:
            print(f"    {event.key[:60]:60s} {event.device_time_total / event.count:9.2f} us x {event.count}")


def main() -> None:
    torch.manual_seed(0)
    full = "--short" not in sys.argv
    for dtype in (torch.bfloat16, torch.float32) if full else (torch.bfloat16,):
        inputs = bench.Inputs(dtype, 3)
        print(dtype, "us per layer at rows", bench.BATCHES)
        print("plain decode", *(per_layer(inputs.mixed(n, None)) for n in bench.BATCHES), flush=True)
        for lines in (4, 2):
            for config in [None, *(bench.VERIFY_TUNE[dtype] if lines == 4 else [])]:
                times = [per_layer(inputs.lines(n, lines, config)) for n in bench.BATCHES]
                print(lines, "lines", *times, config or "", flush=True)
            fold = triton_fold.delta_fold
            bench.delta_fold = lambda *_: None
            times = [per_layer(inputs.lines(n, lines, None)) for n in bench.BATCHES]
            print(lines, "lines without folding", *times, flush=True)
            bench.delta_fold = fold
            if full:
                old = before_verify.delta_verify
                times = [per_layer(inputs.lines(n, lines, None, old)) for n in bench.BATCHES[:3]]
                print(lines, "lines before", *times, flush=True)
        for n in bench.BATCHES:
            print("  profile, 4 lines, rows", n)
            profiled(inputs.lines(n, 4, None))
        del inputs
        torch.cuda.empty_cache()


main()
