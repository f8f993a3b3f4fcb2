"""What quantising costs in quality: divergence from the unquantised model, and perplexity.

    python -m benchmarks.quality [--model FOLDER] [--device cuda] [--ways fp8 int4 gptq] [--tokens N]

The demo model unless another is named; conversations of the kind it was trained on, but none that it was
trained on, are read in the checkpoint's own tokens. `fp8` and `int4` are rounded to nearest at load, as
`kiln up --quantization` does; `gptq` is `kiln quantize` on other conversations. `fp8-x` is `fp8` with
every product's x rounded to E4M3 too, `fp8-norm-x` only where a norm makes x, as an engine on Hopper
may do it (kernels/linear/choice_quantised.py); so are `int4-x` and `int4-norm-x`. For each way: the mean
and the 99th percentile of the divergence KL(unquantised, quantised) in nats per token over the whole
vocabulary, how often the likeliest token is the same, and the perplexities. A model with random
weights has a divergence, but no perplexity worth looking at. Rows go to benchmarks/results/quality.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch

from benchmarks.engine.results import ResultFile, device_name
from demo.data.corpus import make_shard
from demo.train_model import HELD_OUT_SHARD
from kiln_nn.blocks.linear import LinearFn, Weights
from kiln_nn.kernels.quantised import QuantisedMatrix, frozen_linear, round_rows
from kiln_nn.packed_model import PackedModel
from kiln_nn.quantise import quantise_checkpoint
from kiln_nn.weights import LoadedModel, load_checkpoint

DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
WAYS = ("fp8", "fp8-norm-x", "fp8-x", "int4", "int4-norm-x", "int4-x", "gptq")
_BEHIND_NORMS = ("in_proj_qkv", "in_proj_z", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = (
    *("commit", "gpu", "torch", "triton", "workload", "settings", "num_tokens", "num_calibration_tokens"),
    *("weights_mib", "kl_mean", "kl_p99", "same_likeliest", "perplexity", "perplexity_unquantised", "note"),
)
_BATCH_TOKENS = 2048
_HEAD_TOKENS = 512  # whose logits over the whole vocabulary are there at once


@dataclass(frozen=True)
class Quality:
    """Of a quantised model beside the unquantised one, over the same tokens."""

    num_tokens: int
    kl_mean: float
    kl_p99: float
    same_likeliest: float
    perplexity: float
    perplexity_unquantised: float


def documents(tokenizer_path: Path, shard: int, num_tokens: int) -> list[list[int]]:
    """Conversations of about so many tokens together; a shard holds what no other does."""
    corpus = make_shard(str(tokenizer_path), 0, shard, max(8, num_tokens // 60))
    found: list[list[int]] = []
    start = 0
    for length in corpus.lengths:
        if start >= num_tokens:
            break
        found.append(corpus.ids[start : start + length].tolist())
        start += length
    return found


@torch.no_grad()
def compare(
    exact: LoadedModel,
    quantised: LoadedModel,
    texts: Sequence[Sequence[int]],
    *,
    rounds_x: Callable[[str], bool] = lambda path: False,
) -> Quality:
    """Both models on the same texts; the quantised one rounds x of the layers at the paths that `rounds_x`."""
    models = [PackedModel(one.config, one.arena.views()) for one in (exact, quantised)]
    linear = rounding_linear(quantised.arena.views(), rounds_x)
    rows = [_compare_batch(models[0], models[1], batch, linear) for batch in _batches(texts)]
    kl, same, exact_logprobs, logprobs = (torch.cat(column) for column in zip(*rows, strict=True))
    return Quality(
        num_tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        same_likeliest=float(same.float().mean()),
        perplexity=math.exp(-float(logprobs.mean())),
        perplexity_unquantised=math.exp(-float(exact_logprobs.mean())),
    )


def rounding_linear(weights: Weights, rounds_x: Callable[[str], bool]) -> LinearFn:
    """The base model's linear layers; x is rounded to E4M3 where it meets a quantised matrix and is to be."""

    def linear(module_paths: Sequence[str], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        matrices = {path: weights[f"{path}.weight"] for path in module_paths}
        return tuple(
            frozen_linear(
                _rounded(x) if rounds_x(path) and isinstance(matrix, QuantisedMatrix) else x, matrix
            )
            for path, matrix in matrices.items()
        )

    return linear


def _rounded(x_TI: torch.Tensor) -> torch.Tensor:
    """What E4M3 keeps of each row."""
    rows = round_rows(x_TI)
    return rows.dequantise().to(x_TI.dtype)


def _is_behind_a_norm(path: str) -> bool:
    return path.endswith(_BEHIND_NORMS)


def _rounds_x(way: str) -> Callable[[str], bool]:
    """Whether x of the layer at a path is rounded."""
    if way.endswith("-norm-x"):
        return _is_behind_a_norm
    return lambda path: way.endswith("-x")


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def _compare_batch(
    exact: PackedModel, quantised: PackedModel, batch: Sequence[Sequence[int]], linear: LinearFn
) -> tuple[torch.Tensor, ...]:
    """Divergence, same likeliest token, and both log-probabilities of the token that follows."""
    device = exact.head_weight.device
    ids = torch.tensor([token for text in batch for token in text], device=device)
    bounds = (0, *accumulate(map(len, batch)))
    hidden = [exact.hidden_states(ids, bounds), quantised.hidden_states(ids, bounds, linear)]
    has_next = torch.ones(len(ids), dtype=torch.bool, device=device)
    has_next[torch.tensor(bounds[1:], device=device) - 1] = False
    columns: list[tuple[torch.Tensor, ...]] = []
    for places in has_next.nonzero()[:, 0].split(_HEAD_TOKENS):
        p, q = (
            model.logits(states[places]).float().log_softmax(-1)
            for model, states in zip((exact, quantised), hidden, strict=True)
        )
        following = ids[places + 1][:, None]
        kl = (p.exp() * (p - q)).sum(-1)
        same = p.argmax(-1) == q.argmax(-1)
        columns.append((kl, same, p.gather(1, following)[:, 0], q.gather(1, following)[:, 0]))
    return tuple(torch.cat(column).cpu() for column in zip(*columns, strict=True))


@contextmanager
def quantised_model(
    folder: Path, way: str, device: str, calibration: Sequence[Sequence[int]]
) -> Iterator[LoadedModel]:
    """The model quantised in one of the ways."""
    with tempfile.TemporaryDirectory(prefix="kiln-quality-") as temporary:
        if way == "gptq":
            out = Path(temporary) / "model"
            quantise_checkpoint(folder, out, "int4", "gptq", calibration, device, _show_layers)
            loaded = load_checkpoint(out, device)
        else:
            loaded = load_checkpoint(folder, device, quantization=way.partition("-")[0])
        yield loaded
        loaded.arena.close()


def _show_layers(num_done: int, num_layers: int) -> None:
    print(f"\rlayer {num_done} of {num_layers}", end="" if num_done < num_layers else "\n", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--tokens", type=int, default=60_000, help="of text that is measured on")
    parser.add_argument("--calibration-tokens", type=int, default=60_000)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    device = device_name() if options.device.startswith("cuda") else "cpu"
    results = ResultFile("quality", device, _COLUMNS)
    exact = load_checkpoint(options.model, options.device)
    tokenizer_path = DEMO_MODEL / "tokenizer.json"
    texts = documents(tokenizer_path, HELD_OUT_SHARD, options.tokens)
    calibration = documents(tokenizer_path, 0, options.calibration_tokens)
    name = "demo" if options.model == DEMO_MODEL else options.model.name
    for way in options.ways:
        with quantised_model(options.model, way, options.device, calibration) as loaded:
            quality = compare(exact, loaded, texts, rounds_x=_rounds_x(way))
            weights_mib = loaded.manifest.nbytes / 2**20
        figures: dict[str, object] = {field: f"{value:.5g}" for field, value in asdict(quality).items()}
        figures |= {"num_tokens": quality.num_tokens, "weights_mib": round(weights_mib, 1)}
        if way == "gptq":
            figures["num_calibration_tokens"] = sum(map(len, calibration))
        results.add(name, way, **figures, note=options.note)


if __name__ == "__main__":
    main()
