"""POST /v1/train/sft and /v1/train/grpo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from kiln_common.pb import trainer_pb2
from kiln_gateway.schemas.base import Body, Reference, TokenIds
from kiln_gateway.schemas.chat import Messages, Tool
from kiln_gateway.schemas.gate import GateFields

PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
Ratio = Annotated[float, Field(ge=0, le=1)]


def _to_reward(value: Any) -> float:
    """A reward as one number; the numbers of an object add up."""
    parts = value.values() if isinstance(value, dict) and value else [value]
    if value is None:
        raise PydanticCustomError("missing_rewards", "a reward is missing")
    try:
        reward = float(sum(parts))
    except (TypeError, OverflowError):  # text, lists, integers beyond any float
        reward = math.nan
    if not math.isfinite(reward):
        raise PydanticCustomError("invalid_reward", "{value} is not a reward", {"value": repr(value)[:60]})
    return reward


def _to_rewards(value: Any) -> Any:
    if not isinstance(value, list):
        raise PydanticCustomError("missing_rewards", "`rewards` is not a list")
    return value


def _refuse_empty_text(value: str) -> str:
    if not value:
        raise PydanticCustomError("empty_prompt", "`prompt` is empty")
    return value


Reward = Annotated[float, BeforeValidator(_to_reward)]
DatasetId = Annotated[str, Field(min_length=1, max_length=64, description="id of an uploaded dataset")]
CorrectionId = Annotated[str, Field(pattern=r"^corr_[0-9a-f]{32}$")]
PromptText = Annotated[str, AfterValidator(_refuse_empty_text)]


class LoraFields(Body):
    rank: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: PositiveFloat = 32.0
    targets: Literal["all", "attention", "mlp"] | Annotated[list[str], Field(min_length=1)] = "all"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class WebhookFields(Body):
    """Who is told that the job has ended."""

    url: Annotated[str, Field(min_length=1, max_length=2048)] = Field(description="http or https")
    secret: Annotated[SecretStr, Field(min_length=16, max_length=256)] = Field(
        description="signs each message, as Standard Webhooks has it"
    )

    def to_proto(self) -> trainer_pb2.Webhook:
        return trainer_pb2.Webhook(url=self.url, secret=self.secret.get_secret_value())


class JobFields(Body):
    """What every recipe shares. None means the recipe's default, shown in effective_config."""

    adapter: Reference
    base_adapter: Reference | None = Field(
        None,
        description="start from a name or name@version; left out: from the adapter's latest version, if there is"
        " one; null: from the bare base model",
    )
    lora: LoraFields = Field(default_factory=LoraFields)
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_tokens: Annotated[int, Field(ge=16, le=2**20)] | None = None
    gradient_accumulation: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    warmup_ratio: Ratio = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    train_mtp: bool = Field(
        False,
        description="adapt the checkpoint's multi-token-prediction layer too: its drafts follow what is learned",
    )
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    checkpoint_every: PositiveInt = 10
    publish: Literal["end", "never"] | Annotated[int, Field(ge=1, lt=10**9)] = Field(
        "end", description="a number N publishes a version every N steps, and at the end"
    )
    attach: bool | None = Field(None, description="true unless the key may not attach")
    priority: Annotated[int, Field(ge=-10, le=10)] = Field(
        0, description="lower numbers run first; below 0 takes the scope admin"
    )
    gate: GateFields | None = None
    webhook: WebhookFields | None = None
    metadata: dict[str, Any] | None = None

    @property
    def starts_fresh(self) -> bool:
        """Whether the request says `base_adapter: null`."""
        return self.base_adapter is None and "base_adapter" in self.model_fields_set

    @model_validator(mode="after")
    def _publishes_what_the_gate_judges(self) -> JobFields:
        if self.gate is not None and self.publish != "end":
            raise ValueError('gate needs publish: "end"')
        return self


class RetryBody(JobFields):
    """The settings to change; what is left out stays as it was, with the version the job started from."""

    adapter: Reference | None = None  # type: ignore[assignment]


class CancelBody(Body):
    published: Literal["keep", "discard"] = Field(
        "keep", description="what to do with versions that the job published on its way"
    )


class SftExampleFields(Body):
    messages: Messages | None = None
    tools: list[Tool] | None = None
    prompt: PromptText | None = None
    completion: str | None = None
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0

    @model_validator(mode="after")
    def _has_one_form(self) -> SftExampleFields:
        is_pair = self.prompt is not None or self.completion is not None
        if is_pair == (self.messages is not None) or (
            is_pair and (self.prompt is None or self.completion is None)
        ):
            raise PydanticCustomError(
                "conflicting_fields", "an example is either `messages` or `prompt` and `completion`"
            )
        return self


def _refuse_no_examples(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("empty_examples", "`examples` is empty")
    return value


class SftBody(JobFields):
    examples: Annotated[list[SftExampleFields], BeforeValidator(_refuse_no_examples)] | None = None
    dataset: DatasetId | None = None
    corrections: Literal["unused"] | Annotated[list[CorrectionId], Field(min_length=1)] | None = Field(
        None, description="corrections to learn as well, by id or all that no job has: each is learned once"
    )
    train_on: Literal["assistant", "all"] = "assistant"

    @model_validator(mode="after")
    def _has_data(self) -> SftBody:
        if self.examples is None and self.dataset is None and self.corrections is None:
            raise PydanticCustomError("missing_field", "`examples` is missing", {"param": "examples"})
        if self.examples is not None and self.dataset is not None:
            raise PydanticCustomError(
                "conflicting_fields", "send `examples` or `dataset`, not both", {"param": "dataset"}
            )
        return self


class ScoredCompletion(Body):
    text: str
    reward: Reward


FinishReason = Literal["stop", "length", "tool_calls"]


class GivenRollout(Body):
    """A completion by reference (`completion_id`), or with explicit tokens."""

    completion_id: Annotated[str, Field(max_length=128)] | None = None
    index: Annotated[int, Field(ge=0, lt=2**31)] = 0
    prompt_token_ids: TokenIds | None = None
    token_ids: TokenIds | None = None
    logprobs: list[Annotated[float, Field(le=1e-3)]] | None = None
    finish_reason: FinishReason | None = Field(
        None, description="`length` is a truncated completion; a kept rollout knows its own"
    )
    adapter_version: str | None = Field(
        None, description="what drew it, name@version or base; a kept rollout knows its own"
    )

    @model_validator(mode="after")
    def _has_one_form(self) -> GivenRollout:
        if (self.completion_id is None) == (self.token_ids is None):
            raise PydanticCustomError(
                "conflicting_fields", "a rollout has either `completion_id` or `token_ids`"
            )
        if self.completion_id is not None and (self.logprobs or self.prompt_token_ids or self.finish_reason):
            raise PydanticCustomError(
                "conflicting_fields", "a rollout with `completion_id` brings its own tokens"
            )
        if self.token_ids is not None and not self.token_ids:
            raise PydanticCustomError("empty_text", "`token_ids` is empty")
        if self.token_ids and self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise PydanticCustomError(
                "length_mismatch",
                "there are {tokens} token_ids and {logprobs} logprobs",
                {"tokens": len(self.token_ids), "logprobs": len(self.logprobs)},
            )
        return self


class RolloutFields(GivenRollout):
    """A scored completion by reference (`completion_id`), or with explicit tokens."""

    reward: Reward
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0


def check_is_one_group(
    prompt: object, messages: object, completions: object, rollouts: Sequence[GivenRollout] | None
) -> None:
    """That a group says what it is about once, and as much as its answers need.

    Raises:
        PydanticCustomError: `conflicting_fields` or `missing_field`.
    """
    if (completions is None) == (rollouts is None):
        raise PydanticCustomError("conflicting_fields", "a group has either `completions` or `rollouts`")
    if prompt is not None and messages is not None:
        raise PydanticCustomError("conflicting_fields", "a group has either `prompt` or `messages`")
    needs_prompt = completions is not None or any(
        rollout.token_ids is not None and rollout.prompt_token_ids is None for rollout in rollouts or ()
    )
    if needs_prompt and prompt is None and messages is None:
        raise PydanticCustomError("missing_field", "the group's `prompt` or `messages` is missing")


class GroupFields(Body):
    """Completions of one prompt."""

    prompt: PromptText | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None
    completions: list[ScoredCompletion] | None = None
    rollouts: list[RolloutFields] | None = None

    @property
    def rewards(self) -> list[float]:
        return [item.reward for item in [*(self.completions or ()), *(self.rollouts or ())]]

    @model_validator(mode="after")
    def _is_one_group(self) -> GroupFields:
        check_is_one_group(self.prompt, self.messages, self.completions, self.rollouts)
        if len(self.rewards) < 2:
            raise PydanticCustomError(
                "group_too_small", "the group has {count} completions", {"count": len(self.rewards)}
            )
        return self


class KlFields(Body):
    coef: Annotated[float, Field(ge=0, le=100)] = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k3"


class ImportanceFields(Body):
    mode: Literal["none", "token", "sequence"] = "token"
    cap: PositiveFloat = 2.0


class LossFields(Body):
    """The policy loss; docs/training.md has each type's defaults, effective_config those of a job."""

    type: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="the ratio's lower bound is 1 - clip_low; null takes the type's own"
    )
    clip_high: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None, description="the ratio's upper bound is 1 + clip_high; null takes the type's own"
    )
    kl: KlFields = Field(default_factory=KlFields)
    importance: ImportanceFields = Field(default_factory=ImportanceFields)
    scale_rewards: Literal["group", "batch", "none"] | None = Field(
        default=None, description="which deviation divides advantages; null takes the type's own"
    )
    mask_truncated_completions: bool = Field(
        default=False, description="learn nothing from completions that ended at max_tokens; rewards count"
    )


def _refuse_no_groups(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("empty_groups", "`groups` is empty")
    return value


class GrpoBody(JobFields):
    prompt: PromptText | None = None
    completions: list[str] | None = None
    rewards: Annotated[list[Reward], BeforeValidator(_to_rewards)] | None = None
    groups: Annotated[list[GroupFields], BeforeValidator(_refuse_no_groups)] | None = None
    dataset: DatasetId | None = None
    loss: LossFields = Field(default_factory=LossFields)

    def all_groups(self) -> list[GroupFields]:
        """The groups, the short form being one of them."""
        if self.groups is not None:
            return self.groups
        scored = [
            ScoredCompletion(text=text, reward=reward)
            for text, reward in zip(self.completions or (), self.rewards or (), strict=True)
        ]
        return [GroupFields(prompt=self.prompt, completions=scored)]

    @model_validator(mode="after")
    def _has_a_signal(self) -> GrpoBody:
        short = [name for name in ("prompt", "completions", "rewards") if getattr(self, name) is not None]
        if self.dataset is not None:
            if short or self.groups is not None:
                raise PydanticCustomError(
                    "conflicting_fields", "send `dataset` or the groups themselves", {"param": "dataset"}
                )
            return self  # the trainer looks for a signal in it
        if self.groups is not None and short:
            raise PydanticCustomError(
                "conflicting_fields",
                "send `groups` or `{name}`, not both",
                {"name": short[0], "param": short[0]},
            )
        if self.groups is None:
            self._check_short_form()
        rewards = [group.rewards for group in self.groups or ()] or [self.rewards or []]
        if all(len(set(group)) == 1 for group in rewards):
            where = f"within each of the {len(rewards)} groups" if len(rewards) > 1 else "within the group"
            raise PydanticCustomError(
                "no_learning_signal",
                "the rewards are equal {where}",
                {"where": where, "param": "groups" if self.groups is not None else "rewards"},
            )
        return self

    def _check_short_form(self) -> None:
        for name in ("prompt", "completions"):
            if getattr(self, name) is None:
                raise PydanticCustomError("missing_field", f"`{name}` is missing", {"param": name})
        if self.rewards is None:
            raise PydanticCustomError("missing_rewards", "`rewards` is missing", {"param": "rewards"})
        num_completions, num_rewards = len(self.completions or ()), len(self.rewards)
        if num_completions != num_rewards:
            raise PydanticCustomError(
                "length_mismatch",
                "there are {completions} completions and {rewards} rewards",
                {"completions": num_completions, "rewards": num_rewards, "param": "rewards"},
            )
        if num_completions < 2:
            raise PydanticCustomError(
                "group_too_small",
                "there are {count} completions",
                {"count": num_completions, "param": "completions"},
            )
