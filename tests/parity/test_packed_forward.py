"""The packed model's logits against transformers' Qwen3.5, one document at a time."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.packed_model import PackedModel
from tests.support.delta_inputs import relative_error
from tests.support.tiny_models import SHAPES, hf_model, make_checkpoint, read_tensors

TOLERANCE = 1e-4
LENGTHS = (90, 1, 70, 3)  # several chunks, shorter than the convolution, one token


def _documents(vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in LENGTHS]


def _cu_seqlens(documents: list[torch.Tensor]) -> tuple[int, ...]:
    return (0, *torch.tensor([len(document) for document in documents]).cumsum(0).tolist())


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(tmp_path, shape):
    config = make_checkpoint(tmp_path, **SHAPES[shape])
    oracle = hf_model(tmp_path)
    model = PackedModel(config, read_tensors(tmp_path))
    documents = _documents(config.vocab_size)
    with torch.no_grad():
        expected = torch.cat([oracle(input_ids=document[None]).logits[0] for document in documents])
        logits = model.logits(model.hidden_states(torch.cat(documents), _cu_seqlens(documents)))
    assert relative_error(logits, expected) < TOLERANCE
    worst_token = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert worst_token.max() < TOLERANCE


def test_the_comparison_sees_documents_that_were_not_reset(tmp_path):
    config = make_checkpoint(tmp_path)
    model = PackedModel(config, read_tensors(tmp_path))
    documents = _documents(config.vocab_size)
    with torch.no_grad():
        packed = model.hidden_states(torch.cat(documents), _cu_seqlens(documents))
        run_on = model.hidden_states(torch.cat(documents), (0, sum(LENGTHS)))
    assert relative_error(run_on[: LENGTHS[0]], packed[: LENGTHS[0]]) < 1e-5
    assert relative_error(run_on[LENGTHS[0] :], packed[LENGTHS[0] :]) > 0.05
