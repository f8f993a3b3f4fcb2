"""A gateway with its real parts and fake leaves: scripted engine, registry and trainer in memory."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from kiln_common.errors import (
    AdapterNotFound,
    EngineUnavailable,
    KilnError,
    RegistryUnavailable,
)
from kiln_common.pb import common_pb2, engine_pb2, registry_pb2
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.app import create_app
from kiln_gateway.ports import Clients
from kiln_gateway.server import GatewayServer
from kiln_gateway.settings import GatewaySettings
from tests.support.evaluations import LocalEvaluations
from tests.support.fake_datasets import FakeDatasets
from tests.support.fake_trainer import FakeTrainer

REPOSITORY = Path(__file__).resolve().parents[2]
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
READABLE_TOKENS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
]
BASE_MODEL_ID = "kiln/tiny"
BASE_MODEL_HASH = "f" * 64
_TEXTS = ["Hello there, thank you for the friendly email reply!", "What is the answer to this question?"] * 4


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen's special tokens under other ids, and merges enough to matter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in READABLE_TOKENS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_model_folder(folder: Path) -> Path:
    """A folder with what the gateway reads of a checkpoint; the template is the demo model's."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    template = (REPOSITORY / "demo/model/chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


Script = Callable[[engine_pb2.GenerateRequest], str | Sequence[int]]


class FakeEngine:
    """Says what its script says, one token a step, then the turn's end mark; of a resumed answer the rest.

    `logprob_of` gives each token's log-probability from its position. `pause_after` tokens it waits
    for `go_on`; `fail_after` tokens it raises `failure`, `abort_after` tokens it gives the sequence up. `moves` are adapters that take over at a token.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, max_model_len: int = 512, address: str = "fake:1"
    ) -> None:
        self._tokenizer = tokenizer
        self.address = address
        self.boot_id = "boot-1" if address == "fake:1" else f"boot of {address}"
        self.script: Script = lambda request: "Hello there!"
        self.moves: dict[int, list[common_pb2.AdapterRef]] = {}
        self.requests: list[engine_pb2.GenerateRequest] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.pause_after: int | None = None
        self.go_on = asyncio.Event()
        self.paused = asyncio.Event()
        self.fail_after: int | None = None
        self.abort_after: int | None = None
        self.failure: KilnError = EngineUnavailable("the engine went away")
        self.is_up = True
        self.is_closed = asyncio.Event()
        self.session_ends: list[str] = []
        self.residents: list[common_pb2.AdapterRef] = []
        self.end_id = tokenizer.id_of("<|im_end|>")
        eos_ids = [tokenizer.id_of("<|endoftext|>"), self.end_id]
        self.base_model = common_pb2.BaseModel(
            model_id=BASE_MODEL_ID,
            model_hash=BASE_MODEL_HASH,
            vocab_size=tokenizer.num_tokens,
            max_model_len=max_model_len,
            eos_token_ids=eos_ids,
        )

    @staticmethod
    def logprob_of(position: int) -> float:
        return -0.25 * (1 + position % 4)

    async def generate(self, request: engine_pb2.GenerateRequest) -> AsyncIterator[engine_pb2.SequenceOutput]:
        if not self.is_up:
            raise EngineUnavailable("the engine is down")
        self.requests.append(request)
        try:
            for position, output in enumerate(self._outputs(request)):
                if self.fail_after == position:
                    raise self.failure
                if self.pause_after == position:
                    self.paused.set()
                    await self._wait_to_go_on()
                await asyncio.sleep(0)
                yield output
            self.finished.append(request.request_id)
        finally:
            if request.request_id not in self.finished:
                self.aborted.append(request.request_id)

    async def _wait_to_go_on(self) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self.go_on, self.is_closed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.is_closed.is_set():
            raise EngineUnavailable("the engine client was closed")

    def end_session(self, reason: str) -> None:
        self.session_ends.append(reason)

    async def close(self) -> None:
        self.is_closed.set()

    def _outputs(self, request: engine_pb2.GenerateRequest) -> Iterator[engine_pb2.SequenceOutput]:
        if request.wants_embedding or request.HasField("num_prompt_logprobs"):
            yield from self._readouts(request)
            if not request.sampling.max_tokens:
                return
        scripted = self.script(request)
        is_text = isinstance(scripted, str)
        token_ids = [*self._tokenizer.encode(scripted), self.end_id] if is_text else list(scripted)
        stops = {*request.sampling.stop_token_ids}
        if not request.sampling.ignore_eos:
            stops |= {*self.base_model.eos_token_ids}
        num_resumed = len(request.resumed_token_ids)
        assert token_ids[:num_resumed] == list(request.resumed_token_ids)
        for position, token_id in enumerate(token_ids[num_resumed:], num_resumed):
            output = engine_pb2.SequenceOutput(
                request_id=request.request_id,
                token_ids=[token_id],
                logprobs=[self.logprob_of(position)],
                sampled_logprobs=[self.logprob_of(position) / 2],
                moved_to=self.moves.get(position),
            )
            if request.sampling.num_top_logprobs:
                ids = range(request.sampling.num_top_logprobs)
                top = engine_pb2.TopLogprobs(token_ids=ids, logprobs=[-1.0 - i for i in ids])
                output.top_logprobs.append(top)
            if position == num_resumed:
                output.num_cached_tokens = len(request.prompt_token_ids) // 2
                output.seed = request.sampling.seed if request.sampling.HasField("seed") else 1234
            if position == self.abort_after:
                output.finish_reason = engine_pb2.FINISH_REASON_ABORT
            elif token_id in stops:
                output.finish_reason = engine_pb2.FINISH_REASON_STOP
            elif position + 1 >= min(request.sampling.max_tokens, len(token_ids)):
                output.finish_reason = engine_pb2.FINISH_REASON_LENGTH
            yield output
            if output.finish_reason:
                return

    def _readouts(self, request: engine_pb2.GenerateRequest) -> Iterator[engine_pb2.SequenceOutput]:
        """Log-probabilities in two pieces, as of two chunks; an embedding that names its prompt."""
        prompt = list(request.prompt_token_ids)
        middle = len(prompt) // 2
        for first, last in ((1, middle), (max(middle, 1), len(prompt))):
            output = engine_pb2.SequenceOutput(request_id=request.request_id)
            if request.HasField("num_prompt_logprobs"):
                output.prompt_logprobs.extend(self.logprob_of(position) for position in range(first, last))
            for _ in range(first, last) if request.num_prompt_logprobs else ():
                ids = range(request.num_prompt_logprobs)
                output.top_prompt_logprobs.add(token_ids=ids, logprobs=[-1.0 - i for i in ids])
            if last == len(prompt) and not request.sampling.max_tokens:
                output.finish_reason = engine_pb2.FINISH_REASON_LENGTH
            if last == len(prompt) and request.wants_embedding:
                output.embedding.extend(self.embedding_of(prompt))
            yield output

    @staticmethod
    def embedding_of(prompt: Sequence[int]) -> list[float]:
        """Of length 1, in four dimensions."""
        raw = [len(prompt), prompt[0], prompt[-1], 1.0]
        length = sum(value * value for value in raw) ** 0.5
        return [value / length for value in raw]

    async def get_info(self) -> engine_pb2.EngineInfo:
        if not self.is_up:
            raise EngineUnavailable("the engine is down")
        return engine_pb2.EngineInfo(base_model=self.base_model, boot_id=self.boot_id, device="cpu")

    async def get_stats(self) -> engine_pb2.EngineStats:
        if not self.is_up:
            raise EngineUnavailable("the engine is down")
        residents = [engine_pb2.ResidentAdapter(adapter=each) for each in self.residents]
        return engine_pb2.EngineStats(
            num_running=len(self.requests), num_pages_in_use=7, resident_adapters=residents
        )


class FakeRegistry:
    """Adapters in memory."""

    def __init__(self) -> None:
        self.adapters: dict[str, registry_pb2.Adapter] = {}
        self.blobs: dict[str, bytes] = {}
        self.default: registry_pb2.AdapterVersion | None = None
        self.is_up = True
        self.published: list[tuple[registry_pb2.PublishHeader, bytes]] = []
        self.publish_failure: KilnError | None = None

    def add(
        self, name: str, *, attach: bool = False, model_hash: str = BASE_MODEL_HASH, owner: str = ""
    ) -> registry_pb2.AdapterVersion:
        adapter = self.adapters.setdefault(name, registry_pb2.Adapter(name=name, owner=owner))
        number = len(adapter.versions) + 1
        version = adapter.versions.add(
            name=name,
            version=number,
            sha256=f"{name}{number}",
            config_json='{"r": 8}',
            created_at_s=1.0,
            base_model_hash=model_hash,
            owner=owner,
        )
        self.blobs[version.sha256] = f"bytes of {name}@{number}".encode()
        adapter.latest_version = number
        if attach:
            self.default = version
            adapter.attached_version = number
        return version

    def _check(self) -> None:
        if not self.is_up:
            raise RegistryUnavailable("the registry is down")

    async def resolve(self, reference: str) -> registry_pb2.AdapterVersion:
        self._check()
        name, _, number = reference.partition("@")
        adapter = self.adapters.get(name)
        wanted = int(number) if number else adapter.latest_version if adapter else 0
        for version in adapter.versions if adapter else ():
            if version.version == wanted:
                return version
        raise AdapterNotFound(f"no adapter {reference!r}")

    async def get(self, name: str) -> registry_pb2.Adapter:
        self._check()
        if name not in self.adapters:
            raise AdapterNotFound(f"no adapter {name!r}")
        return self.adapters[name]

    async def list(self) -> list[registry_pb2.Adapter]:
        self._check()
        return [self.adapters[name] for name in sorted(self.adapters)]

    async def get_default(self) -> registry_pb2.AdapterVersion | None:
        self._check()
        return self.default

    async def check_publish(self, name: str, owner: str) -> None:
        self._check()

    async def set_default(self, reference: str, *, actor: str = "") -> registry_pb2.AdapterVersion | None:
        self.default = await self.resolve(reference) if reference else None
        for adapter in self.adapters.values():
            is_attached = self.default is not None and self.default.name == adapter.name
            adapter.attached_version = self.default.version if self.default and is_attached else 0
        return self.default

    async def roll_back(
        self, name: str, version: int, *, may_move_default: bool, actor: str = ""
    ) -> registry_pb2.RollBackResponse:
        found = await self.resolve(f"{name}@{version}")
        self.adapters[name].latest_version = version
        moves = self.default is not None and self.default.name == name and self.default.version > version
        if moves:
            assert may_move_default
            self.default = found
        return registry_pb2.RollBackResponse(version=found, has_moved_default=moves)

    async def delete(self, name: str, version: int = 0, *, actor: str = "") -> int:
        adapter = await self.get(name)
        num_deleted = len(adapter.versions)
        del self.adapters[name]
        return num_deleted

    async def fetch(self, sha256: str) -> bytes:
        self._check()
        return self.blobs[sha256]

    async def publish(self, header: Any, safetensors: bytes | Path) -> registry_pb2.AdapterVersion:
        self._check()
        content = safetensors if isinstance(safetensors, bytes) else safetensors.read_bytes()
        if self.publish_failure is not None:
            raise self.publish_failure
        self.published.append((header, content))
        version = self.add(header.name, attach=header.attach)
        version.sha256 = header.sha256
        return version


@dataclass
class Rig:
    """A gateway and the leaves behind it."""

    app: Any
    tokenizer: TextTokenizer
    engine: FakeEngine
    registry: FakeRegistry
    trainer: FakeTrainer
    datasets: FakeDatasets
    settings: GatewaySettings
    redis: Any = None
    http: httpx.AsyncClient = field(init=False)

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def chat(self, **fields: Any) -> httpx.Response:
        """One user message unless `messages` says otherwise."""
        return await self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **fields}
        )

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The data of every event: parsed JSON, or "[DONE]"."""
        response = await self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        return parse_events(response.text)


def parse_events(text: str) -> list[Any]:
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def build_rig(
    folder: Path, *, redis: Any = None, registry: Any = None, max_model_len: int = 512, **settings: Any
) -> Rig:
    """Everything but the HTTP client; needs a running event loop. `registry` stands in for the fake one."""
    model_path = folder / "model"
    if not model_path.exists():
        write_model_folder(model_path)
    options = {"enable_thinking_default": False, **settings}
    gateway_settings = GatewaySettings(model_path=str(model_path), **options)
    tokenizer = TextTokenizer.load(model_path)
    engine, trainer = FakeEngine(tokenizer, max_model_len=max_model_len), FakeTrainer()
    registry = registry or FakeRegistry()
    datasets = FakeDatasets()
    clients = Clients(
        engines=[engine],
        registry=registry,
        trainer=trainer,
        datasets=datasets,
        evaluations=LocalEvaluations(folder / "evaluations"),
        redis=redis,
    )
    app = create_app(gateway_settings, clients)
    return Rig(app, tokenizer, engine, registry, trainer, datasets, gateway_settings, redis)


@asynccontextmanager
async def gateway_rig(folder: Path, **options: Any) -> AsyncIterator[Rig]:
    """A rig whose `http` client speaks to the app in this process."""
    rig = build_rig(folder, **options)
    transport = httpx.ASGITransport(app=rig.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as rig.http:
        yield rig


def served(rig: Rig, *, grace_s: int = 0) -> AbstractAsyncContextManager[str]:
    """The rig's app, as `served_app` has it."""
    return served_app(rig.app, grace_s=grace_s)


@asynccontextmanager
async def served_app(app: Any, *, grace_s: int = 0) -> AsyncIterator[str]:
    """An app on a real loopback port; yields its address. `grace_s`: see GatewayServer."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = GatewayServer(app, host="127.0.0.1", port=0, grace_s=grace_s)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
