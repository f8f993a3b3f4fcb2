"""Whether the model can read the documents."""

from __future__ import annotations

from collections.abc import Sequence

from kiln_common.errors import InvalidRequest, InvalidTokenIds
from kiln_nn.config import ModelConfig
from kiln_trainer.data.documents import Document


def check_documents(documents: Sequence[Document], config: ModelConfig) -> None:
    """Check that the model can read every document.

    Raises:
        InvalidTokenIds: a token id is outside the vocabulary.
        InvalidRequest: a document has more tokens than the model has positions.
    """
    for index, document in enumerate(documents):
        lowest, highest = document.token_ids_n.aminmax()
        if lowest < 0 or highest >= config.vocab_size:
            worst = int(lowest if lowest < 0 else highest)
            raise InvalidTokenIds(
                f"document {index} has token id {worst}, the vocabulary has {config.vocab_size}"
            )
        if document.num_tokens > config.max_position_embeddings:
            raise InvalidRequest(
                f"document {index} has {document.num_tokens} tokens,"
                f" the model has {config.max_position_embeddings} positions"
            )
