"""The reference's half of the correctness twins: transformers scores what the engine drew.

    python scripts/gpu/twins_reference.py --model FOLDER --traces a.json b.json --out scores.json

For every token of every trace, given all tokens before it (teacher forcing): its log-probability
and the most likely token, in float32 and in the checkpoint's own bfloat16.

Legend: `N` traces of a batch, `T` tokens of the longest, `P` positions scored, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Logits of so many positions exist at a time, and so many tokens go through the model.
_POSITIONS_AT_ONCE = 1024
_TOKENS_AT_ONCE = 16_384


def load_reference(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """transformers' Qwen3_5ForCausalLM with the folder's weights, without Kiln's loader."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    raw = json.loads((folder / "config.json").read_text())
    config = Qwen3_5TextConfig(**raw.get("text_config", raw))
    config._attn_implementation = "sdpa"
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path, device=device).items():
            state[name.replace("model.language_model.", "model.", 1)] = tensor
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("mtp.", "model.visual."))}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3_5ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.inference_mode()
def score(model: Any, traces: Sequence[dict[str, Any]], device: str) -> list[dict[str, list[float]]]:
    """For each trace `logprobs`, `top_ids` and `margins` (best minus second) at its drawn tokens."""
    scores: list[dict[str, list[float]]] = [{} for _ in traces]
    for batch in _batches(traces):
        inputs = [traces[index]["prompt"] + traces[index]["tokens"][:-1] for index in batch]
        longest = max(map(len, inputs))
        # Padding behind: every layer is causal, so nothing before it can see it.
        ids_NT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in inputs], device=device)
        hidden_NTD = model.model(input_ids=ids_NT, use_cache=False).last_hidden_state
        for row, index in enumerate(batch):
            first = len(traces[index]["prompt"]) - 1
            drawn = torch.tensor(traces[index]["tokens"], device=device)
            scores[index] = _score_positions(model, hidden_NTD[row, first : first + len(drawn)], drawn)
    return scores


def _score_positions(model: Any, hidden_PD: torch.Tensor, drawn_P: torch.Tensor) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {"logprobs": [], "top_ids": [], "margins": []}
    for hidden, drawn in zip(
        hidden_PD.split(_POSITIONS_AT_ONCE), drawn_P.split(_POSITIONS_AT_ONCE), strict=True
    ):
        logits_PV = model.lm_head(hidden).float()
        best = logits_PV.topk(2, dim=-1)
        picked = logits_PV.gather(1, drawn[:, None])[:, 0] - logits_PV.logsumexp(dim=-1)
        result["logprobs"] += picked.tolist()
        result["top_ids"] += best.indices[:, 0].tolist()
        result["margins"] += (best.values[:, 0] - best.values[:, 1]).tolist()
    return result


def _batches(traces: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
    """Indices of traces of like length, as many as may go through the model together."""
    lengths = [len(trace["prompt"]) + len(trace["tokens"]) for trace in traces]
    batch: list[int] = []
    for index in sorted(range(len(traces)), key=lambda index: lengths[index]):
        if batch and lengths[index] * (len(batch) + 1) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--traces", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reports = [json.loads(path.read_text()) for path in options.traces]
    traces = [trace for report in reports for trace in report["traces"]]
    scores = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_reference(options.model, dtype, device)
        scores[name] = score(model, traces, device)
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    options.out.write_text(json.dumps({"reports": reports, "scores": scores}))


if __name__ == "__main__":
    main()
