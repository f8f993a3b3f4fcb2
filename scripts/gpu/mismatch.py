"""How far the sampler's log-probabilities are from the trainer's, for the same tokens and weights.

    python scripts/gpu/mismatch.py --model /tmp/random-4b [--tiny] [--set kv_dtype=fp8]

The engine draws through scheduler, loop and runner as it serves; the trainer maps its weights and scores
the very tokens, packed, as a job does. Tokens come from plain decoding, after prompts that were cut into
chunks, after prompts whose start came from the prefix cache, and with an adapter; first at temperature 1,
then at the one at which the entropy is 1.5 nats. Dividing the logits is scaling the head: random weights
draw from nearly flat distributions, which hide what matters to a trained model. KL(sampler || trainer)
is the k3 estimate, the mean over the tokens. The exit status is 1 where it is not below 0.005.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.engine.adapters import random_adapter_files
from benchmarks.engine.requests import make_request, random_prompt
from benchmarks.engine.spine import Spine, make_settings
from kiln_common.logs import configure_logs
from kiln_common.pb import trainer_pb2
from kiln_engine.domain import GenerationRequest
from kiln_nn.lora import parse_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.packing import first_fit, pack
from kiln_trainer.recipes.losses import k3_estimate
from kiln_trainer.recipes.opd import prepare_opd
from kiln_trainer.recipes.opd_options import DistillationObjective
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.weights import WeightLocation, WeightSession

MOST_KL = 0.005
_ENTROPY_NATS = 1.5
_RANK = 16
_SLOT = 1  # of the adapter


@dataclass(frozen=True)
class Sizes:
    """How much is drawn; a chunk is `step_token_budget` tokens of a prompt."""

    num_rows: int = 32
    num_long_rows: int = 4
    prompt_tokens: int = 64
    output_tokens: int = 256
    prefix_tokens: int = 4096
    step_token_budget: int = 2048
    batch_tokens: int = 16_384


TINY = Sizes(4, 2, 12, 16, 64, 64, 1024)


@dataclass(frozen=True)
class Drawn:
    """Completions of one kind with the sampler's log-probability of each token, at one temperature."""

    name: str
    temperature: float
    rollouts: list[trainer_pb2.OpdRollout]
    num_cached_tokens: int


class Sampler:
    """Draws the four kinds of completions from one engine."""

    def __init__(self, spine: Spine, sizes: Sizes) -> None:
        self._spine = spine
        self._sizes = sizes

    def draw(self, temperature: float) -> list[Drawn]:
        sizes, chunked = self._sizes, 3 * self._sizes.step_token_budget + 5
        shared = self._prompt(sizes.prefix_tokens, "shared", temperature)
        first = [make_request(shared, 1)]
        after_prefix = [shared + self._prompt(9, row, temperature) for row in range(sizes.num_rows)]
        short = [self._prompt(sizes.prompt_tokens, row, temperature) for row in range(sizes.num_rows)]
        long = [self._prompt(chunked, row, temperature) for row in range(sizes.num_long_rows)]
        plain = self._run("decode", short, temperature)
        in_chunks = self._run("chunked prefill", long, temperature)
        self._spine.run(first)
        cached = self._run("prefix hits", after_prefix, temperature)
        assert cached.num_cached_tokens > 0, "nothing came from the prefix cache"
        assert in_chunks.num_cached_tokens == plain.num_cached_tokens == 0
        return [plain, in_chunks, cached, self._run("with an adapter", short, temperature, ((_SLOT, 1.0),))]

    def _prompt(self, num_tokens: int, *seed: object) -> tuple[int, ...]:
        return random_prompt(num_tokens, self._spine.config.vocab_size, (num_tokens, *seed))

    def _run(
        self,
        name: str,
        prompts: Sequence[tuple[int, ...]],
        temperature: float,
        slots: tuple[tuple[int, float], ...] = (),
    ) -> Drawn:
        requests = [
            # What an adapter computed is no other's prefix.
            make_request(
                prompt, self._sizes.output_tokens, seed=row, temperature=temperature, salt="a" * len(slots)
            )
            for row, prompt in enumerate(prompts)
        ]
        recording = self._spine.run(requests, [slots] * len(requests))
        events = recording.tokens_by_request()
        rollouts = [_rollout(request, events[request.request_id]) for request in requests]
        return Drawn(name, temperature, rollouts, min(recording.num_cached_tokens))


def _rollout(request: GenerationRequest, events: Sequence) -> trainer_pb2.OpdRollout:
    rows = [event.row for event in events]
    return trainer_pb2.OpdRollout(
        prompt_token_ids=request.prompt_token_ids,
        completion_token_ids=[row.token_id for row in rows],
        logprobs=[row.sampled_logprob for row in rows],
    )


class Scorer:
    """The trainer's side, on weights it maps from the engine."""

    def __init__(self, session: WeightSession, lora: LoraParameters, batch_tokens: int) -> None:
        self._policy = Policy(PackedModel(session.config, session.weights), lora, session.device)
        self._batch_tokens = batch_tokens

    @torch.no_grad()
    def score(self, drawn: Drawn, temperature: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The sampler's and the trainer's log-probability of each token, and the mean entropy in nats."""
        documents = prepare_opd(drawn.rollouts, DistillationObjective()).documents
        parts = []
        for chosen in first_fit(range(len(documents)), [d.num_tokens for d in documents], self._batch_tokens):
            batch = pack([documents[index] for index in chosen]).to(self._policy.device)
            batch.temperature_S.fill_(temperature)
            hidden = self._policy.run(batch, with_adapter=drawn.name == "with an adapter")
            found = self._policy.score(batch, hidden)
            parts.append((batch.sampler_logprob_S, found.logprobs_T, found.entropies_T))
        sampler_S, trainer_S, entropy_S = (torch.cat(column).double() for column in zip(*parts, strict=True))
        return sampler_S, trainer_S, float(entropy_S.mean())

    def temperature_for(self, drawn: Drawn, entropy_nats: float) -> float:
        """The temperature at which tokens like these have that entropy; it rises with the temperature."""
        low, high = 0.01, 10.0
        for _ in range(12):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.score(drawn, middle)[2] < entropy_nats else (low, middle)
        return round(high, 4)


def report(drawn: Drawn, scorer: Scorer) -> float:
    """Print a row of the table; returns the KL."""
    sampler_S, trainer_S, entropy = scorer.score(drawn, drawn.temperature)
    distance_S = trainer_S - sampler_S
    kl = float(k3_estimate(distance_S).mean())
    print(
        f"{drawn.name:16s} {drawn.temperature:11.4g} {entropy:8.3f} {len(distance_S):7d} {kl:10.2e}"
        f" {float(distance_S.abs().mean()):10.2e} {float(distance_S.abs().max()):10.2e}",
        flush=True,
    )
    return kl


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EngineSettings")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    options = parser.parse_args()
    configure_logs("mismatch", "WARNING")
    sizes = TINY if options.tiny else Sizes()
    # The trainer's activations lie in the rest of the card.
    fields = {"step_token_budget": sizes.step_token_budget, "gpu_memory_fraction": 0.5}
    settings = make_settings(options.model, **fields, **dict(pair.split("=", 1) for pair in options.set))
    with Spine(settings) as spine:
        info = spine.parts.info
        ((adapter_bytes, config_json),) = random_adapter_files(spine.config, 1, _RANK)
        spine.upload_adapter(_SLOT, adapter_bytes, config_json)
        location = WeightLocation(
            spine.parts.weights.socket_path,
            info.boot_id,
            info.base_model.model_hash,
            info.base_model.model_id,
        )
        session = WeightSession.open(lambda: location)
        parsed = parse_adapter(config_json, adapter_bytes, spine.config)
        lora = LoraParameters.from_tensors(spine.config, parsed.spec, parsed.tensors, device=session.device)
        scorer, sampler = Scorer(session, lora, sizes.batch_tokens), Sampler(spine, sizes)
        print(f"{spine.label({})}, {info.device}, {info.dtype}")
        print(f"{'tokens from':16s} temperature  entropy  tokens         KL   mean |d|    max |d|")
        flat = sampler.draw(1.0)
        kls = [report(drawn, scorer) for drawn in flat]
        sharp = sampler.draw(scorer.temperature_for(flat[0], _ENTROPY_NATS))
        kls += [report(drawn, scorer) for drawn in sharp]
        session.close()
    print(f"largest KL {max(kls):.2e}, at most {MOST_KL} is wanted")
    sys.exit(not max(kls) < MOST_KL)


if __name__ == "__main__":
    main()
