"""Measures one engine in this process: `python -m benchmarks.engine --model FOLDER --parts decode waves`.

One process measures one set of settings; `--set state_dtype=bfloat16` overrides any field of
EngineSettings, and a field this engine does not have skips the run. Rows go to
benchmarks/results/engine.csv. What the figures mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.floor import ModelCosts, Yardsticks
from benchmarks.engine.parts import PARTS, Bench
from benchmarks.engine.results import ResultFile, device_name
from benchmarks.engine.spine import Spine, UnknownSetting, make_settings
from benchmarks.engine.workloads import TABLE, TINY, Sizes
from kiln_common.logs import configure_logs

# The trainer has no part in these measurements.
_GPU_MEMORY_FRACTION = 0.85


def main() -> None:
    options = _options()
    sizes = TINY if options.tiny else TABLE
    if options.repeats:
        sizes = dataclasses.replace(sizes, repeats=options.repeats)
    if options.batches:
        kept = tuple(pair for pair in sizes.decode_batches if pair[1] in options.batches)
        counts = tuple(count for count in sizes.wave_counts if count in options.batches)
        sizes = dataclasses.replace(sizes, decode_batches=kept, wave_counts=counts)
    overrides = dict(pair.split("=", 1) for pair in options.set)
    if options.cap_gib:
        overrides["gpu_memory_fraction"] = cap_gpu_memory(options.model, options.cap_gib)
    try:
        settings = make_settings(options.model, **_fields(sizes, overrides))
    except UnknownSetting as error:
        print(f"skipped: this engine has no setting {error}")
        return
    torch.set_grad_enabled(False)
    configure_logs("bench", as_json=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yardsticks = Yardsticks.measure(device)
    with Spine(settings) as spine:
        costs = model_costs(spine)
        label = spine.label(overrides)
        print(
            f"{label} on {device_name()}: a large copy moves {yardsticks.copy_bytes_per_s / 1e12:.3f} TB/s, a matmul"
            f" does {yardsticks.matmul_flops_per_s / 1e12:.1f} TFLOP/s; device side in {spine.loaded_s:.1f} s;"
            f" {costs.weight_bytes / 1e9:.2f} GB of weights; {spine.parts.limits}",
            flush=True,
        )
        bench = Bench(spine, sizes, costs, yardsticks, ResultFile("engine", device_name()), label)
        failed = []
        for part in options.parts:
            try:
                PARTS[part](bench)
            except Exception as error:  # noqa: BLE001 the other parts can still be measured
                failed.append(part)
                print(f"{part} failed: {type(error).__name__}: {error}", flush=True)
            if not spine.loop.is_healthy:
                break
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            print(f"GPU memory in use on this card: {(total - free) / 2**30:.2f} GiB")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def cap_gpu_memory(model: Path, cap_gib: float) -> str:
    """Hold torch's allocator to what the cap leaves beside weights and context; returns the engine's share.

    The weights lie outside torch's allocator, in an arena of their own.
    """
    total_bytes = torch.cuda.mem_get_info()[1]
    weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    context_bytes = total_bytes - torch.cuda.mem_get_info()[0]
    left_bytes = cap_gib * 2**30 - weight_bytes - context_bytes
    torch.cuda.set_per_process_memory_fraction(left_bytes / total_bytes)
    return f"{(cap_gib * 2**30 - context_bytes) / total_bytes:.4f}"


def model_costs(spine: Spine) -> ModelCosts:
    """Sizes of what the engine holds, read from its stores."""
    config, runner = spine.config, spine.runner
    weight_bytes = spine.parts.weights.num_bytes
    if not config.tie_word_embeddings:  # the embedding's rows are looked up, not read through
        weight_bytes -= config.vocab_size * config.hidden_size * _weight_itemsize(spine)
    layer = runner.states.layer(0)
    return ModelCosts(
        config,
        weight_bytes,
        kv_itemsize=runner.kv.layer(0)[0].element_size(),
        state_itemsize=layer.state_SHKV.element_size(),
        ring_itemsize=layer.ring.u_RHPV.element_size(),
        activation_itemsize=_weight_itemsize(spine),
    )


def _weight_itemsize(spine: Spine) -> int:
    return getattr(torch, spine.parts.info.dtype).itemsize


def _fields(sizes: Sizes, overrides: dict[str, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_running": sizes.most_running}
    if torch.cuda.is_available():
        fields["gpu_memory_fraction"] = _GPU_MEMORY_FRACTION
    return fields | overrides


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EngineSettings")
    parser.add_argument("--batches", nargs="+", type=int, help="only these batch sizes of decode and waves")
    parser.add_argument("--repeats", type=int, default=0, help="0: three, or one when tiny")
    parser.add_argument("--cap-gib", type=float, help="let the whole engine have this much GPU memory")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
