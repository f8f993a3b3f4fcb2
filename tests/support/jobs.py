"""Builders for training jobs: requests, a backend without torch, a publisher without a network."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kiln_common.errors import AdapterNotFound
from kiln_common.pb import engine_pb2, evaluations_pb2, registry_pb2, trainer_pb2
from kiln_registry.domain import AdapterInUse, VersionDeleted
from kiln_trainer.domain.capacity import Capacity
from kiln_trainer.domain.training import (
    AdapterContent,
    StartingPoint,
    StepHooks,
    StepReport,
    TrainedAdapter,
    TrainingTask,
)
from kiln_trainer.jobs.ports import Audience, LiveReport
from kiln_trainer.recipes.opd_options import TeacherModel
from tests.support.registry import MODEL_HASH, adapter_bytes, peft_config

WAIT_S = 60.0


def grpo_request(adapter: str = "helper", **config: object) -> trainer_pb2.SubmitRequest:
    """A valid GRPO job of one group with two rollouts."""
    rollouts = [
        trainer_pb2.GrpoRollout(
            prompt_token_ids=[1, 2, 3],
            completion_token_ids=[4, 5],
            reward=reward,
            behaviour_logprobs=[-0.5, -1.5],
            temperature=1.0,
            source="rollout",
        )
        for reward in (0.0, 1.0)
    ]
    return trainer_pb2.SubmitRequest(
        config=job_config(adapter, **config),
        grpo=trainer_pb2.GrpoSpec(
            groups=[trainer_pb2.GrpoGroup(rollouts=rollouts)],
            loss=trainer_pb2.GrpoLoss(type="grpo", clip_low=0.2, clip_high=0.2),
        ),
        base_model_hash=MODEL_HASH,
    )


def sft_request(adapter: str = "helper", **config: object) -> trainer_pb2.SubmitRequest:
    """A valid supervised job of one document."""
    example = trainer_pb2.SftExample(token_ids=[1, 2, 3], loss_weights=[0, 1, 1])
    return trainer_pb2.SubmitRequest(
        config=job_config(adapter, **config),
        sft=trainer_pb2.SftSpec(examples=[example]),
        base_model_hash=MODEL_HASH,
    )


def opd_request(
    adapter: str = "helper", teacher: str = "base", **config: object
) -> trainer_pb2.SubmitRequest:
    """A valid distillation job of two prompts, one to a step."""
    sampling = engine_pb2.SamplingParams(max_tokens=4, temperature=1, top_p=1, repetition_penalty=1)
    settings = trainer_pb2.OpdSettings(teacher=teacher, sampling=sampling, prompts_per_step=1)
    prompts = [trainer_pb2.OpdPrompt(token_ids=ids) for ids in ([1, 2, 3], [4])]
    return trainer_pb2.SubmitRequest(
        config=job_config(adapter, **config),
        opd=trainer_pb2.OpdSpec(settings=settings, prompts=prompts),
        base_model_hash=MODEL_HASH,
    )


def job_config(adapter: str, **fields: object) -> trainer_pb2.JobConfig:
    defaults = {
        "lora": trainer_pb2.LoraConfig(rank=2, alpha=4, targets=["all"]),
        "optimizer": trainer_pb2.OptimizerConfig(learning_rate=1e-3),
        "epochs": 1,
        "batch_tokens": 64,
        "checkpoint_every": 2,
    }
    return trainer_pb2.JobConfig(adapter=adapter, **{**defaults, **fields})  # type: ignore[arg-type]


def wait_until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Return once the condition holds; fail the test if it never does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never held"
        time.sleep(0.01)


@dataclass(frozen=True)
class NothingMapped:
    engine_boot_id: str = "boot"
    model_hash: str = MODEL_HASH
    num_borrowed_bytes: int = 0
    num_allocated_base_bytes: int = 0


@dataclass(frozen=True)
class NothingShared:
    mode: str = "none"
    share: float = 1.0
    num_sms: int = 0


@dataclass
class MemoryContent:
    """An adapter's bytes that no engine can map."""

    content: bytes
    config_json: str = field(default_factory=peft_config)

    def view(self) -> memoryview:
        return memoryview(self.content)

    def hand_over(self, socket_path: str, name: str, timeout_s: float) -> str:
        raise OSError("these bytes are not in shared memory")

    def close(self) -> None:
        pass


@dataclass
class ChainBackend:
    """A TrainingBackend whose result depends on every step: each hashes the state before it.

    `before_step(step)` runs on the worker thread before a step; it may raise or wait.
    """

    num_steps: int = 4
    before_step: Callable[[int], None] = lambda step: None
    tasks: list[TrainingTask] = field(default_factory=list)
    steps_taken: list[int] = field(default_factory=list)
    mapped_model: NothingMapped = NothingMapped()
    gpu_use: NothingShared = NothingShared()
    num_idle_calls: int = 0
    capacity: Capacity | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: {"kiln": "test"})

    def run(self, task: TrainingTask, hooks: StepHooks) -> TrainedAdapter:
        self.tasks.append(task)
        checkpoint = task.checkpoint_dir / "checkpoint.json"
        step, state = 0, hashlib.sha256(task.request.SerializeToString(deterministic=True)).hexdigest()
        if checkpoint.exists():
            step, state = json.loads(checkpoint.read_text())
        publish = task.request.config.publish
        while step < self.num_steps:
            self.before_step(step + 1)
            step, state = step + 1, hashlib.sha256(f"{state}{step}".encode()).hexdigest()
            self.steps_taken.append(step)
            hooks.after_step(StepReport(step, self.num_steps, 10 * step, {"loss": 1 / step}))
            if publish.isdecimal() and step % int(publish) == 0 and step < self.num_steps:
                hooks.publish(self._trained(step, state))
            if step % task.request.config.checkpoint_every == 0 or step == self.num_steps:
                hooks.before_checkpoint(step)
                partial = checkpoint.with_suffix(".partial")
                partial.write_text(json.dumps([step, state]))
                partial.replace(checkpoint)
                hooks.after_checkpoint(step)
        return self._trained(step, state)

    @staticmethod
    def _trained(step: int, state: str) -> TrainedAdapter:
        content = MemoryContent(adapter_bytes(seed=int(state[:8], 16)))
        return TrainedAdapter(content, {"loss": 1 / step}, step)

    def keep_mapped(self) -> None:
        self.num_idle_calls += 1

    def close(self) -> None:
        pass


class MemoryPublisher:
    """A Publisher that keeps versions in memory, idempotent by publish key like the registry.

    Its engine answers each request with the tokens 7 and 8, and `finish_reason`; `before_generate`
    runs on the worker thread before that and may raise.
    """

    def __init__(self) -> None:
        self.headers: list[registry_pb2.PublishHeader] = []
        self.audiences: list[Audience] = []
        self.known: dict[str, list[registry_pb2.AdapterVersion]] = {}
        self.default = ""
        self.num_publish_calls = 0
        self.before_publish: Callable[[], None] = lambda: None
        self.before_live: Callable[[], None] = lambda: None
        self.not_live: tuple[str, ...] = ()
        self.max_rank = 0
        self.before_generate: Callable[[], None] = lambda: None
        self.finish_reason = engine_pb2.FINISH_REASON_STOP
        self.generated: list[engine_pb2.GenerateRequest] = []
        self.taught: list[tuple[TeacherModel, engine_pb2.GenerateRequest]] = []
        self.before_teaching: Callable[[], None] = lambda: None
        self.withdrawn: list[str] = []
        self.evaluation_requests: list[evaluations_pb2.SubmitRunRequest] = []
        self.evaluate: Callable[[evaluations_pb2.EvalRun], evaluations_pb2.EvalRun] = lambda run: run
        self._last_number: dict[str, int] = {}
        self._by_key: dict[str, registry_pb2.AdapterVersion] = {}
        self._lock = threading.Lock()

    def resolve(self, reference: str) -> registry_pb2.AdapterVersion:
        name, _, number = reference.partition("@")
        for version in reversed(self.known.get(name, [])):
            if not number or version.version == int(number):
                return version
        raise AdapterNotFound(f"there is no adapter {reference}")

    def download(self, version: registry_pb2.AdapterVersion, folder: Path) -> StartingPoint:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "adapter_model.safetensors"
        path.write_bytes(b"bytes of " + version.sha256.encode())
        return StartingPoint(f"{version.name}@{version.version}", version.config_json, path)

    def publish(
        self, header: registry_pb2.PublishHeader, content: AdapterContent, audience: Audience = "all"
    ) -> registry_pb2.AdapterVersion:
        self.before_publish()
        with self._lock:
            self.num_publish_calls += 1
            if header.publish_key and header.publish_key in self._by_key:
                made = self._by_key[header.publish_key]
                if made not in self.known.get(header.name, []):
                    raise VersionDeleted(f"{header.publish_key} made a version that is deleted")
                return made
            known = self.known.setdefault(header.name, [])
            self._last_number[header.name] = number = self._last_number.get(header.name, len(known)) + 1
            version = registry_pb2.AdapterVersion(
                name=header.name,
                version=number,
                sha256=hashlib.sha256(content.view()).hexdigest(),
                base_model_hash=header.base_model_hash,
                config_json=header.config_json,
                job_id=header.job_id,
            )
            if header.attach:
                self.default = f"{version.name}@{version.version}"
            known.append(version)
            self.headers.append(header)
            self.audiences.append(audience)
            self._by_key[header.publish_key] = version
            return version

    def max_adapter_rank(self) -> int:
        return self.max_rank

    def make_live(self, version: registry_pb2.AdapterVersion) -> LiveReport:
        self.before_live()
        return LiveReport(self.not_live, 0.01)

    def generate(
        self,
        requests: Sequence[engine_pb2.GenerateRequest],
        check: Callable[[], None],
        teacher: TeacherModel | None = None,
    ) -> list[list[engine_pb2.SequenceOutput]]:
        if teacher is not None:
            return self._teach(requests, teacher)
        self.generated += requests
        self.before_generate()
        check()
        first = engine_pb2.SequenceOutput(token_ids=[7], logprobs=[-0.5])
        last = engine_pb2.SequenceOutput(token_ids=[8], logprobs=[-1.5], finish_reason=self.finish_reason)
        return [[first, last] for _ in requests]

    def _teach(
        self, requests: Sequence[engine_pb2.GenerateRequest], teacher: TeacherModel
    ) -> list[list[engine_pb2.SequenceOutput]]:
        """Each token's alternatives are the tokens 1, 2, …, less and less likely, told in two parts."""
        self.taught += [(teacher, request) for request in requests]
        self.before_teaching()
        answers = []
        for request in requests:
            num_top = request.num_prompt_logprobs
            num_tokens = len(request.prompt_token_ids) - request.first_prompt_logprob
            ids = array("i", range(1, num_top + 1)) * num_tokens
            logprobs = array("f", [-1.0 - place for place in range(num_top)]) * num_tokens
            cut = num_top * (num_tokens // 2)
            answers.append(
                [
                    engine_pb2.SequenceOutput(
                        packed_top_token_ids=ids[part].tobytes(), packed_top_logprobs=logprobs[part].tobytes()
                    )
                    for part in (slice(cut), slice(cut, None))
                ]
            )
        return answers

    def start_evaluation(self, request: evaluations_pb2.SubmitRunRequest) -> evaluations_pb2.EvalRun:
        """The run of this key, as in the registry."""
        self.evaluation_requests.append(request)
        known = [*dict.fromkeys(each.idempotency_key for each in self.evaluation_requests)]
        run_id = f"evalrun_{known.index(request.idempotency_key) + 1}"
        return evaluations_pb2.EvalRun(id=run_id, status="queued")

    def evaluation(self, run_id: str, owner: str) -> evaluations_pb2.EvalRun:
        """What `evaluate`, which runs on the worker thread and may raise, makes of a run that goes on."""
        return self.evaluate(evaluations_pb2.EvalRun(id=run_id, status="running"))

    def withdraw(self, name: str, version: int = 0) -> None:
        if self.default in [f"{name}@{v.version}" for v in self.known.get(name, [])]:
            attached = int(self.default.partition("@")[2])
            if version in (0, attached):
                raise AdapterInUse(f"{self.default} is attached as the default")
        self.withdrawn.append(f"{name}@{version}" if version else name)
        kept = [v for v in self.known.pop(name, []) if version not in (0, v.version)]
        if kept:
            self.known[name] = kept

    def versions(self, name: str) -> list[registry_pb2.AdapterVersion]:
        return [*self.known.get(name, ())]

    def default_adapter(self) -> str:
        return self.default

    def attach(self, reference: str) -> None:
        if reference:
            self.resolve(reference)
        self.default = reference
