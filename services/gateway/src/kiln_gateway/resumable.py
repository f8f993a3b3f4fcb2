"""An answer that outlives its engine: what was sent of it, and the request by which another goes on."""

from __future__ import annotations

from kiln_common.pb import common_pb2, engine_pb2

# A deadline that has passed; 0 would mean that there is none.
_NO_TIME_S = 0.001


class ResumableAnswer:
    """Follows a sequence's outputs. The next engine draws behind the last token, with the same seed.

    With the seed and the token's index a draw is what it would have been. What the engine before drew
    and did not send is drawn again.
    """

    def __init__(self, request: engine_pb2.GenerateRequest, now_s: float) -> None:
        self._request = request
        self._began_s = now_s
        self._token_ids: list[int] = []
        self._seed = 0
        self._moved_to: list[common_pb2.AdapterRef] = []
        self._num_prompt_logprobs = 0
        # Of the outputs to come: the engine tells them again, and the client has them.
        self._num_repeated_logprobs = 0

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def take(self, output: engine_pb2.SequenceOutput) -> None:
        """Note what an engine sent; what was sent before is taken out of it."""
        if not self._token_ids and output.token_ids:
            self._seed = output.seed
        self._token_ids.extend(output.token_ids)
        if output.moved_to:
            self._moved_to = list(output.moved_to)
        if output.prompt_logprobs:
            num_repeated = min(self._num_repeated_logprobs, len(output.prompt_logprobs))
            self._num_repeated_logprobs -= num_repeated
            del output.prompt_logprobs[:num_repeated]
            del output.top_prompt_logprobs[:num_repeated]
            self._num_prompt_logprobs += len(output.prompt_logprobs)

    def rest(self, now_s: float) -> engine_pb2.GenerateRequest:
        """What to ask of the engine that goes on."""
        request = engine_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        if request.timeout_s:
            request.timeout_s = max(request.timeout_s - (now_s - self._began_s), _NO_TIME_S)
        for use, version in zip(request.adapters, self._moved_to, strict=False):
            use.name, use.version, use.sha256 = version.name, version.version, version.sha256
        if self._token_ids:
            request.resumed_token_ids.extend(self._token_ids)
            request.sampling.seed = self._seed
            request.ClearField("num_prompt_logprobs")  # told before the first token
        self._num_repeated_logprobs = self._num_prompt_logprobs
        return request
