"""Which norms of a forward pass round their rows, and for whom."""

from __future__ import annotations

import torch

from kiln_engine.model.linears import Linears
from tests.support.engine_plans import EngineRig, token_ids
from tests.support.tiny_models import make_checkpoint


def test_norms_round_for_the_layers_that_read_rounded_rows(tmp_path, monkeypatch):
    """References read rounded rows as they were, so that nothing else may change."""
    config = make_checkpoint(tmp_path)
    expected = _logits(EngineRig(tmp_path))
    asked: list[str] = []

    def is_read(linears: Linears, path: str, x_TI: torch.Tensor) -> str:
        assert x_TI.shape[1:] == (config.hidden_size,)
        asked.append(path)
        return "plain"

    monkeypatch.setattr(Linears, "reads_rounded", is_read)
    assert torch.equal(_logits(EngineRig(tmp_path)), expected)
    mixers = {"linear_attention": "linear_attn.in_proj", "full_attention": "self_attn.qkv_proj"}
    assert asked == [
        f"model.layers.{index}.{name}"
        for index, kind in enumerate(config.layer_types)
        for name in (mixers[kind], "mlp.gate_up_proj")
    ]


def _logits(rig: EngineRig) -> torch.Tensor:
    return rig.prefill(rig.sequence(), token_ids(20))
