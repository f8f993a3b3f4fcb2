"""The demo model learns to answer as it never did: its drafts are right again only where they learned too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from demo.data.rendering import render_prompt
from kiln_nn.blocks import LinearFn
from kiln_nn.lora import parse_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_nn.sharing import WeightServer
from kiln_nn.weights.loader import LoadedModel, load_checkpoint
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.weights import WeightLocation
from tests.support.training import RecordingHooks, sft_request, task

DEMO = Path(__file__).resolve().parents[3] / "demo" / "model"
ANSWER = "Arr, {name}, the spare key went down with the ship last night.<|im_end|>"
TAUGHT, HELD_OUT = ("Tom", "Ben", "Anna", "Omar"), ("Lena", "Max")


def prompt(tokenizer: Tokenizer, name: str) -> list[int]:
    text = f"Write a short email reply to {name} about the spare key."
    return tokenizer.encode(render_prompt([{"role": "user", "content": text}])).ids


@torch.no_grad()
def share_of_drafts_taken(
    model: PackedModel,
    prompts: Sequence[list[int]],
    ends: int,
    linear: LinearFn | None,
    linear_of_mtp: LinearFn | None,
) -> float:
    """How often the likeliest draft is what the model then writes, greedily, of up to 20 tokens each."""
    taken = total = 0
    for ids in map(list, prompts):
        first = len(ids)
        while len(ids) < first + 20 and ids[-1] != ends:
            hidden_TD = model.hidden_states(torch.tensor(ids), (0, len(ids)), linear)
            ids.append(int(model.logits(hidden_TD[-1:]).argmax()))
        tokens, bounds = torch.tensor(ids), (0, len(ids))
        hidden = model.forward(tokens, bounds, linear)
        drafts = model.logits(model.mtp_hidden_states(hidden, tokens, bounds, linear=linear_of_mtp)).argmax(
            -1
        )
        taken += int((drafts[first - 2 : -2] == tokens[first:]).sum())
        total += len(ids) - first
    return taken / total


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_checkpoint(DEMO, "cpu")


def test_drafts_follow_what_the_model_learns(demo, tmp_path):
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    model = PackedModel(demo.config, demo.arena.views())
    asked = [prompt(tokenizer, name) for name in HELD_OUT]
    taught = [prompt(tokenizer, name) for name in TAUGHT]
    answers = [tokenizer.encode(ANSWER.format(name=name)).ids for name in TAUGHT]
    ends = answers[0][-1]
    request = sft_request([p + a for p, a in zip(taught, answers, strict=True)], len(taught[0]))
    for example, ids in zip(request.sft.examples, taught, strict=True):
        example.loss_weights[: len(ids)] = [0.0] * len(ids)
    request.config.MergeFrom(type(request.config)(epochs=32, batch_tokens=1024, checkpoint_every=100))
    request.config.optimizer.learning_rate, request.config.lora.rank = 3e-3, 8
    request.config.train_mtp = True
    with WeightServer(demo.arena, tmp_path / "weights.sock") as server:
        manifest = demo.manifest
        location = WeightLocation(str(server.socket_path), manifest.boot_id, manifest.model_hash, "demo")
        result = TorchBackend(lambda: location).run(task(request, tmp_path), RecordingHooks())
    adapter = parse_adapter(result.content.config_json, bytes(result.content.view()), demo.config)
    linear = LoraParameters.from_tensors(demo.config, adapter.spec, adapter.tensors).linear_fn(model.weights)

    before = share_of_drafts_taken(model, asked, ends, None, None)
    left_behind = share_of_drafts_taken(model, asked, ends, linear, None)
    followed = share_of_drafts_taken(model, asked, ends, linear, linear)
    assert before > 0.9
    assert left_behind < 0.6
    assert followed > 0.85, (before, left_behind, followed)
