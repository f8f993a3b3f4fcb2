"""The exported folder loads in peft itself, on transformers' model, and says the same."""

from __future__ import annotations

import torch

from kiln_nn.lora import read_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.torch_backend.backend import TorchBackend
from tests.support.tiny_models import hf_model
from tests.support.training import RecordingHooks, peft_folder, sft_request, task


def test_a_trained_adapter_gives_the_same_logits_in_peft(served, tmp_path):
    from peft import PeftModel

    token_ids = torch.tensor([5, 201, 17, 88, 240, 3, 150, 42, 42, 7])
    request = sft_request([token_ids.tolist()], epochs=10, rank=3, alpha=5)
    result = TorchBackend(served.locate).run(task(request, tmp_path), RecordingHooks())
    folder = peft_folder(result, tmp_path / "adapter")

    base = hf_model(served.folder)
    adapted = PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        theirs = adapted(input_ids=token_ids[None]).logits[0]
        with adapted.disable_adapter():
            without = adapted(input_ids=token_ids[None]).logits[0]
        model = PackedModel(served.loaded.config, served.loaded.arena.views())
        adapter = read_adapter(folder, served.loaded.config)
        linear = LoraParameters(adapter.spec, adapter.tensors).linear_fn(model.weights)
        ours = model.logits(model.hidden_states(token_ids, [0, len(token_ids)], linear))
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() / scale < 1e-4
    assert (without - theirs).abs().max() / scale > 0.1
