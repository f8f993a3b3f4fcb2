"""What one document may be like, so that it fits the model and a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

from kiln_common.errors import InvalidTokenIds
from kiln_common.pb import common_pb2, trainer_pb2
from kiln_trainer.recipes.errors import DocumentTooLong
from kiln_trainer.recipes.options import RunOptions


class DocumentLimits:
    """What one document may be like."""

    def __init__(self, config: trainer_pb2.JobConfig, base_model: common_pb2.BaseModel | None) -> None:
        self._batch_tokens = RunOptions.from_proto(config).batch_tokens
        self._base_model = base_model

    def check(self, index: int, *token_ids: Sequence[int], num_more_tokens: int = 0) -> None:
        """Refuse document `index`, given as consecutive runs of token ids and what will follow them."""
        num_tokens = sum(len(ids) for ids in token_ids) + num_more_tokens
        if num_tokens > self._batch_tokens:
            raise DocumentTooLong(index, num_tokens, self._batch_tokens)
        lowest = min(min(ids) for ids in token_ids if ids)
        highest = max(max(ids) for ids in token_ids if ids)
        if lowest < 0:
            raise InvalidTokenIds(f"document {index} has the token id {lowest}")
        if self._base_model is None:
            return
        if highest >= self._base_model.vocab_size:
            raise InvalidTokenIds(
                f"document {index} has the token id {highest}, the vocabulary has {self._base_model.vocab_size}"
            )
        if num_tokens > self._base_model.max_model_len:
            raise DocumentTooLong(index, num_tokens, self._base_model.max_model_len)
