"""How much of what: the sizes of the published table, and tiny ones that run anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Tokens, requests and repeats of every part."""

    single_prompt: int
    single_output: int
    # (context tokens, sequences) of the decode steps that are timed, and how many steps.
    decode_batches: tuple[tuple[int, int], ...]
    decode_steps: int
    wave_counts: tuple[int, ...]
    wave_prompt: int
    wave_output: int
    num_clients: int
    client_requests: int
    prefill_lengths: tuple[int, ...]
    shared_prefix: int
    after_prefix: int
    adapter_batch: tuple[int, int]
    num_adapters: int
    adapter_rank: int
    idle_s: float
    repeats: int

    @property
    def most_running(self) -> int:
        batches = [batch for _, batch in self.decode_batches]
        return max(*batches, *self.wave_counts, self.adapter_batch[1], self.num_clients)


TABLE = Sizes(
    single_prompt=512,
    single_output=128,
    decode_batches=((1024, 16), (1024, 64), (1024, 256), (4096, 64)),
    decode_steps=96,
    wave_counts=(16, 64, 256),
    wave_prompt=1024,
    wave_output=256,
    num_clients=64,
    client_requests=256,
    prefill_lengths=(8192, 32768),
    shared_prefix=4096,
    after_prefix=64,
    adapter_batch=(1024, 64),
    num_adapters=8,
    adapter_rank=16,
    idle_s=5.0,
    repeats=3,
)

TINY = Sizes(
    single_prompt=20,
    single_output=40,
    decode_batches=((64, 2),),
    decode_steps=16,
    wave_counts=(2, 3),
    wave_prompt=24,
    wave_output=6,
    num_clients=2,
    client_requests=5,
    prefill_lengths=(40,),
    shared_prefix=48,
    after_prefix=8,
    adapter_batch=(64, 3),
    num_adapters=2,
    adapter_rank=4,
    idle_s=0.2,
    repeats=1,
)
