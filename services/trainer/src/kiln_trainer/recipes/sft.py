"""Supervised fine-tuning: raise the probability of given tokens, each by its weight.

The loss of an optimiser step is its weighted cross-entropy divided by the step's total weight, so
that a token counts the same in a short document, a long one, and whichever micro-batch.
"""

from __future__ import annotations

import math

import torch

from kiln_common.pb import trainer_pb2
from kiln_trainer.data.documents import Document, PreparedJob
from kiln_trainer.recipes.errors import InvalidTrainingData, NoTrainableTokens


def prepare_sft(spec: trainer_pb2.SftSpec) -> PreparedJob:
    """Turn examples into documents; examples without a scored token are counted and left out.

    Raises:
        InvalidTrainingData: weights do not fit the tokens, or one is negative or not finite.
        NoTrainableTokens: no example has a weight after its first token.
    """
    documents = [_document(index, example) for index, example in enumerate(spec.examples)]
    kept = tuple(document for document in documents if document.num_scored)
    if not kept:
        raise NoTrainableTokens(f"none of {len(documents)} examples has a token with a weight")
    facts = {
        "num_examples": float(len(kept)),
        "num_examples_skipped": float(len(documents) - len(kept)),
    }
    return PreparedJob(documents=kept, objective=None, facts=facts)


def _document(index: int, example: trainer_pb2.SftExample) -> Document:
    if len(example.token_ids) != len(example.loss_weights):
        raise InvalidTrainingData(
            f"example {index} has {len(example.token_ids)} tokens and {len(example.loss_weights)} weights"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in example.loss_weights):
        raise InvalidTrainingData(f"example {index} has a weight that is negative or not finite")
    weights_n = torch.tensor(list(example.loss_weights), dtype=torch.float32)
    # The first token follows nothing that could predict it.
    scored_s = weights_n[1:].nonzero()[:, 0] + 1
    weight_s = weights_n[scored_s]
    return Document(
        token_ids_n=torch.tensor(list(example.token_ids), dtype=torch.int64),
        scored_s=scored_s,
        ce_weight_s=weight_s,
        policy_weight_s=torch.zeros_like(weight_s),
        advantage_s=torch.zeros_like(weight_s),
        sampler_logprob_s=torch.full_like(weight_s, math.nan),
        temperature=1.0,
        normaliser=float(weight_s.double().sum()),
    )
