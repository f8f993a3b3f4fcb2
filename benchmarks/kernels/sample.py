"""Times the sampler at the published vocabulary: rows of each kind, alone and many.

    python benchmarks/kernels/sample.py

The floor is one pass over the logits in float32; the error is the largest difference of a
log-probability from float64. Predicted at 4.3 TB/s: plain rows one to two passes (60-120 us at batch
256), rows with top-k and top-p one more small look at their best blocks (at most 25 us at batch 1, 80
at 64, 200 at 256). Rows whose top-p reaches thousands of tokens ("flat") take some five passes more.
"""

from __future__ import annotations

from functools import partial

import torch
from measure import ResultTable, time_calls

from kiln_nn.kernels.sample import draw_tokens, settings

VOCAB = 248_320
NUM_EDITS_PER_ROW = 8
# Together larger than the L2 cache, where memory allows.
SET_BYTES = 200e6

PLAIN = {"inverse": 1 / 0.8}
KINDS: dict[str, dict] = {
    "greedy": {"inverse": 0.0},
    "plain": PLAIN,
    "top-k 20, top-p 0.95": PLAIN | {"top_k": 20, "top_p": 0.95},
    "top-p 0.95": PLAIN | {"top_p": 0.95},
    "min-p 0.05": PLAIN | {"log_min_p": -2.9957},
    "top-p 0.95, flat": PLAIN | {"top_p": 0.95, "spread": 1.0},
    "plain, edited": PLAIN | {"edits": NUM_EDITS_PER_ROW},
    "top-k 20, top-p 0.95, edited": PLAIN | {"top_k": 20, "top_p": 0.95, "edits": NUM_EDITS_PER_ROW},
}


def inputs(
    num_rows: int,
    *,
    inverse: float,
    top_k: int = 0,
    top_p: float = 1.0,
    log_min_p: float = float("-inf"),
    spread: float = 4.0,
    edits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and tables of one kind; a spread of 4 leaves top-p some hundred tokens."""
    logits = torch.randn(num_rows, VOCAB, device="cuda") * spread
    rows = torch.zeros(num_rows, settings.NUM_ROW_FIELDS, dtype=torch.float64)
    rows[:, settings.INVERSE_TEMPERATURE] = inverse
    rows[:, settings.UNIFORM] = torch.rand(num_rows, dtype=torch.float64)
    rows[:, settings.TOP_K] = top_k
    rows[:, settings.TOP_P] = top_p
    rows[:, settings.LOG_MIN_P] = log_min_p
    rows[:, settings.FIRST_EDIT] = torch.arange(num_rows) * edits
    rows[:, settings.END_EDIT] = rows[:, settings.FIRST_EDIT] + edits
    table = torch.zeros(num_rows * NUM_EDITS_PER_ROW, settings.NUM_EDIT_FIELDS, dtype=torch.float64)
    table[:, settings.ROW] = torch.arange(num_rows).repeat_interleave(NUM_EDITS_PER_ROW)
    table[:, settings.TOKEN] = (
        (torch.rand(num_rows, NUM_EDITS_PER_ROW) * VOCAB).long().sort().values.flatten()
    )
    table[:, settings.PENALTY] = 1.1
    return logits, rows.cuda(), table.cuda()


def main() -> None:
    torch.manual_seed(0)
    table = ResultTable("sample")
    for num_rows in (1, 16, 64, 256):
        num_bytes = num_rows * VOCAB * 4
        for kind, options in KINDS.items():
            num_sets = max(1, min(8, int(SET_BYTES / num_bytes)))
            sets = [inputs(num_rows, **options) for _ in range(num_sets)]
            _, drawn = draw_tokens(*sets[0])
            logits = sets[0][0].double()
            exact = logits.gather(1, drawn[:, :1].long())[:, 0] - logits.logsumexp(dim=-1)
            error = float((drawn[:, settings.LOGPROB] - exact).abs().max())
            timing = time_calls([partial(draw_tokens, *arguments) for arguments in sets])
            table.add(f"sample {kind}, batch {num_rows}", timing, 1, num_bytes, error)


if __name__ == "__main__":
    main()
