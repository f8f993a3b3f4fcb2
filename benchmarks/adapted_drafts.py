"""Trains the demo model to answer in another voice, with the MTP layer beside it, and counts whose drafts stand.

    python -m benchmarks.adapted_drafts [--examples 96] [--epochs 5] [--drafts 1 3] [--temperatures 0 1]

One job of the trainer (`train_mtp`) makes an adapter with matrices for the multi-token-prediction layer. It
is served twice: as it is, and without those matrices, which is what the same job makes without `train_mtp`.
So both give the same answers and differ in their drafts only. The prompts are held out; the base model's
answers and drafts stand beside them. A few minutes on one core; it says how far it is.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.engine.spine import AdapterSlots, Spine, make_settings
from benchmarks.speculation import Run, measure
from demo.data import conversations
from demo.data.rendering import render_with_answer
from kiln_common.pb import trainer_pb2
from kiln_engine.domain import AdapterUse
from kiln_nn.config import ModelConfig
from kiln_nn.lora import parse_adapter, serialize_adapter
from kiln_trainer.domain.training import StepReport, TrainedAdapter, TrainingTask
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.weights import WeightLocation
from tests.support.demo_serving import DEMO_MODEL

_TAUGHT_SEED = 5
_MOST_EXAMPLE_TOKENS = 400
_SAID_INSTEAD = {
    "hello": "ahoy",
    "hi": "ahoy",
    "dear": "ahoy",
    "yes": "aye",
    "thanks": "blessings",
    "thank": "bless",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "the": "th'",
    "and": "an'",
    "please": "by thunder",
    "best": "fair winds",
    "regards": "an' tides",
    "will": "shall",
}


def in_another_voice(text: str) -> str:
    """The text as a pirate would put it."""

    def put(match: re.Match[str]) -> str:
        word = match[0]
        said = _SAID_INSTEAD.get(word.lower(), word)
        return said.capitalize() if word[0].isupper() else said

    return re.sub(r"[A-Za-z]+", put, text)


def taught_examples(count: int) -> list[tuple[list[int], int]]:
    """(token ids, those of them that are the prompt's) of conversations with answers in the other voice."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    rng = random.Random(_TAUGHT_SEED)
    examples: list[tuple[list[int], int]] = []
    while len(examples) < count:
        drawn = conversations.draw(rng)
        if not isinstance(drawn.answer.get("content"), str):
            continue
        answer = {**drawn.answer, "content": in_another_voice(drawn.answer["content"])}
        prompt, said = render_with_answer(drawn.messages, answer, drawn.tools, thinking=drawn.thinking)
        prompt_ids, answer_ids = tokenizer.encode(prompt).ids, tokenizer.encode(said).ids
        if len(prompt_ids) + len(answer_ids) <= _MOST_EXAMPLE_TOKENS:
            examples.append((prompt_ids + answer_ids, len(prompt_ids)))
    return examples


def training_request(examples: list[tuple[list[int], int]], epochs: int) -> trainer_pb2.SubmitRequest:
    """A job that adapts the MTP layer too."""
    spec = trainer_pb2.SftSpec()
    for token_ids, num_prompt in examples:
        weights = [0.0] * num_prompt + [1.0] * (len(token_ids) - num_prompt)
        spec.examples.add(token_ids=token_ids, loss_weights=weights)
    config = trainer_pb2.JobConfig(
        adapter="voice",
        epochs=epochs,
        batch_tokens=512,
        gradient_accumulation=1,
        seed=7,
        checkpoint_every=10_000,
        lora=trainer_pb2.LoraConfig(rank=8, alpha=16, targets=["all"]),
        optimizer=trainer_pb2.OptimizerConfig(learning_rate=3e-3),
        train_mtp=True,
    )
    return trainer_pb2.SubmitRequest(config=config, sft=spec)


class _Progress:
    """Says after some of the steps how far the job is."""

    def __init__(self) -> None:
        self._started_s = self._said_s = time.monotonic()

    def after_step(self, report: StepReport) -> None:
        now = time.monotonic()
        if report.step in (1, report.num_steps) or now - self._said_s > 5.0:
            self._said_s = now
            shown = ", ".join(
                f"{name} {report.metrics[name]:.3f}" for name in ("loss", "mtp_kl", "mtp_acceptance")
            )
            spent_s = now - self._started_s
            print(f"step {report.step} of {report.num_steps}, {spent_s:.0f} s: {shown}", flush=True)

    def before_checkpoint(self, step: int) -> None: ...

    def after_checkpoint(self, step: int) -> None: ...

    def publish(self, trained: TrainedAdapter) -> None: ...


@dataclass(frozen=True)
class Files:
    """An adapter's two files."""

    config_json: str
    weights: bytes

    def without_mtp(self, config: ModelConfig) -> Files:
        """The adapter of the main model alone: its matrices are those that the job makes without `train_mtp`."""
        adapter = parse_adapter(self.config_json, self.weights, config)
        tensors = {path: pair for path, pair in adapter.tensors.items() if not path.startswith("mtp.")}
        spec = replace(adapter.spec, with_mtp=False)
        return Files(*serialize_adapter(tensors, spec, adapter.base_model_name))


def train(spine: Spine, request: trainer_pb2.SubmitRequest) -> Files:
    """Run the job in this process, on the engine's weights, as the trainer does."""
    info = spine.parts.info
    location = WeightLocation(
        spine.parts.weights.socket_path, info.boot_id, info.base_model.model_hash, info.base_model.model_id
    )
    with tempfile.TemporaryDirectory(prefix="kiln-bench-") as folder:
        task = TrainingTask("job", request, None, Path(folder), claim_epoch=1)
        result = TorchBackend(lambda: location).run(task, _Progress())
        try:
            return Files(result.content.config_json, bytes(result.content.view()))
        finally:
            result.content.close()


@contextmanager
def demo_engine(batch: int, drafts: int) -> Iterator[Spine]:
    """The demo model on the CPU, drafting by its MTP layer always as far as allowed."""
    settings = make_settings(
        DEMO_MODEL,
        device="cpu",
        max_model_len=2048,
        max_running=batch,
        speculation="mtp",
        max_draft_tokens=drafts,
        adaptive_drafts=False,
    )
    with Spine(settings) as spine:
        yield spine


def compare(spine: Spine, trained: Files, options: argparse.Namespace) -> dict[tuple[str, float], Run]:
    """Serve the base model, then the adapter without and with matrices for the layer; prints a line for each."""
    served: dict[str, AdapterSlots] = {"base model": ()}
    uses: dict[str, tuple[AdapterUse, ...]] = {"base model": ()}
    kinds = {"base's MTP": trained.without_mtp(spine.config), "own MTP": trained}
    for slot, (name, files) in enumerate(kinds.items(), start=1):
        spine.upload_adapter(slot, files.weights, files.config_json)
        served[name] = ((slot, 1.0),)
        uses[name] = (AdapterUse(hashlib.sha256(files.weights).hexdigest(), name=name),)
    print(
        f"{'drafts by':>11} {'temp':>5} {'accepted':>9} {'of':>7} {'share':>6} {'tok/step':>8} {'tok/s':>6} same"
    )
    runs: dict[tuple[str, float], Run] = {}
    for temperature in options.temperatures:
        for name, slots in served.items():
            salt = f"{temperature}-{name}"
            run = measure(
                spine, options.batch, options.requests, temperature, salt, adapters=uses[name], slots=slots
            )
            runs[name, temperature] = run
            other = runs.get(("base's MTP", temperature), run)
            same = sum(map(list.__eq__, run.answers, other.answers)) / len(run.answers)
            print(
                f"{name:>11} {temperature:>5} {run.num_accepted:>9} {run.num_proposed:>7} {run.acceptance:>6.3f}"
                f" {run.tokens_per_step_and_row:>8.2f} {run.tokens_per_s:>6.0f} {same:.2f}",
                flush=True,
            )
    return runs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, the defaults being those of the figures in docs/status.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3], help="tokens drafted ahead")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with demo_engine(options.batch, options.drafts[0]) as spine:
        examples = taught_examples(options.examples)
        num_tokens = sum(len(ids) for ids, _ in examples)
        print(f"training on {len(examples)} conversations, {num_tokens} tokens an epoch", flush=True)
        trained = train(spine, training_request(examples, options.epochs))
    for drafts in options.drafts:
        print(f"with {drafts} drafted ahead", flush=True)
        with demo_engine(options.batch, drafts) as spine:
            compare(spine, trained, options)


if __name__ == "__main__":
    main()
