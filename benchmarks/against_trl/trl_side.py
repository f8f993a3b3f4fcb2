"""TRL's half of the comparison: one run described by a JSON file, in an environment of its own.

    python benchmarks/against_trl/trl_side.py spec.json result.json

Needs trl, peft, transformers and datasets, and nothing of Kiln. Rows are token ids and are taken in the
order they come in; losses, gradient norms and seconds of every optimiser step are written down.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}

import torch
import trl.trainer.grpo_trainer as grpo_module
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, Qwen3_5ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

Spec = dict[str, Any]


class Recording:
    """Mixed into a trainer: keeps the order of the rows, and every step's loss and time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step_losses: list[float] = []
        self.step_s: list[float] = []
        self._loss = 0.0
        self._began_s = 0.0
        self._num_micro_batches = 0

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        if self._num_micro_batches % self.args.gradient_accumulation_steps == 0:
            self._finish_step()
        self._num_micro_batches += 1
        loss = super().training_step(*args, **options)
        self._loss += float(loss)
        return loss

    def train(self, *args: Any, **options: Any) -> Any:
        result = super().train(*args, **options)
        self._finish_step()
        return result

    def _finish_step(self) -> None:
        """From one step's first micro-batch to the next one's: optimiser and data loader included."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now_s = time.perf_counter()
        if self._began_s:
            self.step_losses.append(self._loss)
            self.step_s.append(now_s - self._began_s)
        self._loss, self._began_s = 0.0, now_s


class InOrder(Recording):
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


class RecordingSft(InOrder, SFTTrainer):
    pass


class RecordingGkd(InOrder, GKDTrainer):
    pass


class RecordingGrpo(Recording, GRPOTrainer):
    pass


def load_model(spec: Spec) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, spec["dtype"])
    return Qwen3_5ForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation="sdpa").to(
        device
    )


def common(spec: Spec, num_steps: int) -> dict[str, Any]:
    """Arguments of every trainer: AdamW, a constant rate, gradients clipped to norm 1."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="against-trl-"),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": num_steps,
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": spec["micro_rows"],
        "gradient_accumulation_steps": spec["rows_per_step"] // spec["micro_rows"],
        "bf16": spec["dtype"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": spec["gradient_checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
    }


def labels_of(row: Spec) -> list[int]:
    return [-100] * len(row["prompt"]) + row["completion"]


def padded(rows: list[list[int]], value: int, *, on_the_left: bool = False) -> torch.Tensor:
    longest = max(map(len, rows))
    filled = [([value] * (longest - len(row)), row) for row in rows]
    return torch.tensor([pad + row if on_the_left else row + pad for pad, row in filled])


def sft_trainer(spec: Spec, model: Any, tokenizer: Any) -> Any:
    rows = [
        {"input_ids": row["prompt"] + row["completion"], "labels": labels_of(row)} for row in spec["rows"]
    ]
    num_steps = len(rows) // spec["rows_per_step"]
    args = SFTConfig(max_length=None, packing=False, shuffle_dataset=False, **common(spec, num_steps))
    return RecordingSft(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def grpo_trainer(spec: Spec, model: Any, tokenizer: Any) -> Any:
    """All rows are one generation, which `epochs` steps learn from; the ratio's old policy is its start."""
    grpo_module.shuffle_sequence_dict = lambda batch: batch
    rows = spec["rows"]

    def rollouts(prompts: Any, trainer: Any) -> dict[str, Any]:
        assert len(prompts) == len(rows), (len(prompts), len(rows))
        return {
            "prompt_ids": [row["prompt"] for row in rows],
            "completion_ids": [row["completion"] for row in rows],
            "logprobs": [[-1.0] * len(row["completion"]) for row in rows],
        }

    def reward(completions: Any, **fields: Any) -> list[float]:
        return [row["reward"] for row in rows]

    num_micro_batches = len(rows) // spec["micro_rows"]
    args = GRPOConfig(
        num_generations=spec["group_rows"],
        max_completion_length=max(len(row["completion"]) for row in rows),
        steps_per_generation=num_micro_batches,
        num_iterations=spec["epochs"],
        beta=0.0,
        loss_type="grpo",
        scale_rewards="none",
        temperature=1.0,
        shuffle_dataset=False,
        **common(spec, spec["epochs"]),
    )
    prompts = [{"prompt": "x"} for _ in range(len(rows) // spec["group_rows"])]
    return RecordingGrpo(
        model,
        reward,
        args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        rollout_func=rollouts,
    )


def opd_trainer(spec: Spec, model: Any, tokenizer: Any) -> Any:
    """Towards the base model by reverse KL, on given completions or, with `is_sampled`, on its own."""

    def collate(rows: list[Spec]) -> dict[str, torch.Tensor]:
        ids = [row["prompt"] + row["completion"] for row in rows]
        prompts = [row["prompt"] for row in rows]
        return {
            "input_ids": padded(ids, 0),
            "attention_mask": padded([[1] * len(i) for i in ids], 0),
            "labels": padded([labels_of(row) for row in rows], -100),
            "prompts": padded(prompts, 0, on_the_left=True),
            "prompt_attention_mask": padded([[1] * len(i) for i in prompts], 0, on_the_left=True),
        }

    num_steps = len(spec["rows"]) // spec["rows_per_step"]
    args = GKDConfig(
        lmbda=1.0 if spec["is_sampled"] else 0.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=max(len(row["completion"]) for row in spec["rows"]),
        remove_unused_columns=False,
        **common(spec, num_steps),
    )
    return RecordingGkd(
        model=model,
        args=args,
        teacher_model=load_model(spec),
        train_dataset=Dataset.from_list(spec["rows"]),
        processing_class=tokenizer,
        data_collator=collate,
    )


def main(spec_file: str, result_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    torch.manual_seed(0)
    torch.set_num_threads(spec["num_threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    model = PeftModel.from_pretrained(load_model(spec), spec["adapter"], is_trainable=True)
    make = {"sft": sft_trainer, "grpo": grpo_trainer, "opd": opd_trainer}[spec["recipe"]]
    trainer = make(spec, model, tokenizer)
    trainer.train()
    packages = ("trl", "torch", "transformers", "peft", "datasets", "accelerate")
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    result = {
        "losses": trainer.step_losses,
        "grad_norms": [float(entry["grad_norm"]) for entry in logged],
        "step_s": trainer.step_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
