"""The loop itself: sample, score, post by completion id, wait for the swap, again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kiln_cli.demo.client import CountingClient, Sample
from kiln_cli.demo.reward import score
from kiln_cli.errors import DemoFailed

_SWAP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LearningPlan:
    """How much is sampled and how hard each round pulls."""

    num_rounds: int = 16
    prompts_per_round: int = 8
    rollouts_per_prompt: int = 8
    max_tokens: int = 90
    learning_rate: float = 1.2e-3
    steps_per_round: int = 1
    lora_rank: int = 16


@dataclass(frozen=True)
class RoundResult:
    reward_mean: float
    train_seconds: float
    swap_ms: float
    version: str


class Learner:
    """Teaches one adapter by rewards. With `shuffle_rewards` it is the control: same work, no signal."""

    def __init__(
        self, client: CountingClient, adapter: str, plan: LearningPlan, *, shuffle_rewards: bool, seed: int
    ) -> None:
        self.adapter = adapter
        self._client = client
        self._plan = plan
        self._shuffle_rewards = shuffle_rewards
        self._random = random.Random(seed)
        self._has_version = False

    async def run(
        self, prompts: Sequence[str], base_model: str, on_round: Callable[[int, RoundResult], None]
    ) -> list[RoundResult]:
        results = []
        for number in range(1, self._plan.num_rounds + 1):
            chosen = self._random.sample(list(prompts), self._plan.prompts_per_round)
            model = self.adapter if self._has_version else base_model
            result = await self._round(chosen, model)
            self._has_version = True
            results.append(result)
            on_round(number, result)
        return results

    async def _round(self, prompts: Sequence[str], model: str) -> RoundResult:
        plan = self._plan
        groups: list[list[Sample]] = await asyncio.gather(
            *(
                self._client.sample(
                    prompt, model=model, count=plan.rollouts_per_prompt, max_tokens=plan.max_tokens
                )
                for prompt in prompts
            )
        )
        rewards = [[score(sample.prompt, sample.text) for sample in group] for group in groups]
        reward_mean = sum(map(sum, rewards)) / sum(map(len, rewards))
        if self._shuffle_rewards:
            rewards = self._shuffled(rewards)
        job = await self._client.request("POST", "/v1/train/grpo", json=self._job_body(groups, rewards))
        return await self._wait_for_swap(job.json()["id"], prompts[0], reward_mean)

    def _job_body(self, groups: list[list[Sample]], rewards: list[list[float]]) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "groups": [
                {
                    "rollouts": [
                        {"completion_id": sample.completion_id, "index": sample.index, "reward": reward}
                        for sample, reward in zip(group, group_rewards, strict=True)
                    ]
                }
                for group, group_rewards in zip(groups, rewards, strict=True)
            ],
            "learning_rate": self._plan.learning_rate,
            "epochs": self._plan.steps_per_round,
            "lora": {"rank": self._plan.lora_rank, "alpha": 2 * self._plan.lora_rank},
            # The control must not answer ordinary traffic.
            "attach": not self._shuffle_rewards,
        }

    def _shuffled(self, rewards: list[list[float]]) -> list[list[float]]:
        """The same rewards dealt out anew over all rollouts of the round."""
        flat = [reward for group in rewards for reward in group]
        self._random.shuffle(flat)
        dealt = iter(flat)
        return [[next(dealt) for _ in group] for group in rewards]

    async def _wait_for_swap(self, job_id: str, prompt: str, reward_mean: float) -> RoundResult:
        """Follow the job; from "publishing" on, ask until the new version's first token is there."""
        started_s = finished_s = published_s = time.time()
        probe: asyncio.Task[tuple[str, float]] | None = None
        async for event in self._client.job_events(job_id):
            kind = event["type"]
            if kind == "started":
                started_s = event["at_s"]
            elif kind == "publishing":
                finished_s = event["at_s"]
            elif kind == "published":
                published_s = event["at_s"]
                version = f"{self.adapter}@{event['version']}"
                probe = asyncio.create_task(self._first_token_of(version, prompt))
            elif kind in ("failed", "cancelled"):
                raise DemoFailed(f"job {job_id} ended as {kind}: {event}")
        if probe is None:
            raise DemoFailed(f"job {job_id} ended without publishing")
        version, first_token_s = await probe
        return RoundResult(
            reward_mean=reward_mean,
            train_seconds=finished_s - started_s,
            swap_ms=1000 * (first_token_s - published_s),
            version=version,
        )

    async def _first_token_of(self, version: str, prompt: str) -> tuple[str, float]:
        deadline_s = time.monotonic() + _SWAP_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if await self._client.first_token(prompt, model=self.adapter) == version:
                return version, time.time()
        raise DemoFailed(f"{version} was published but did not answer within {_SWAP_TIMEOUT_S:g} s")
