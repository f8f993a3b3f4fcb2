"""How two adapters differ, by the updates they make to each linear layer.

An update W = scaling * B @ A is never formed: its norm and inner products follow from products of
rank by rank, |B A|^2 = sum((B'B) * (A A')). The difference of two updates is an update of the summed
rank; its norm comes from QR factors, since sums of squares would cancel where the two nearly agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kiln_registry.adapter_file import AdapterFile, Matrix, Update


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """Frobenius norms of two updates of one layer and of their difference, and their inner product."""

    path: str
    norm_earlier: float
    norm_later: float
    norm_change: float
    inner_product: float


def compare_adapters(earlier: AdapterFile | None, later: AdapterFile) -> list[ModuleComparison]:
    """Every layer that one of the two changes, in the model's order; None changes nothing."""
    paths = {*later.module_paths, *(earlier.module_paths if earlier is not None else ())}
    return [
        _compare(path, earlier.read(path) if earlier is not None else None, later.read(path))
        for path in in_model_order(paths)
    ]


def _compare(path: str, earlier: Update | None, later: Update | None) -> ModuleComparison:
    return ModuleComparison(
        path=path,
        norm_earlier=_inner_product(earlier, earlier) ** 0.5,
        norm_later=_inner_product(later, later) ** 0.5,
        norm_change=_norm_of_difference(earlier, later),
        inner_product=_inner_product(earlier, later),
    )


def _inner_product(first: Update | None, second: Update | None) -> float:
    if first is None or second is None:
        return 0.0
    products = (first.b_Or.T @ second.b_Or) * (first.a_rI @ second.a_rI.T)
    found = float(products.sum()) * first.scaling * second.scaling
    return max(found, 0.0) if first is second else found


def _norm_of_difference(earlier: Update | None, later: Update | None) -> float:
    signed = [(1.0, later), (-1.0, earlier)]
    updates = [(sign * update.scaling, update) for sign, update in signed if update is not None]
    a_rI = np.concatenate([update.a_rI for _, update in updates])
    b_Or = np.concatenate([factor * update.b_Or for factor, update in updates], axis=1)
    return float(np.linalg.norm(_triangle(b_Or) @ _triangle(a_rI.T).T))


def _triangle(matrix: Matrix) -> Matrix:
    """R of its QR factors: as long as the matrix, whatever it is multiplied with."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def in_model_order(paths: Iterable[str]) -> list[str]:
    def place(path: str) -> tuple[int, str]:
        layer = re.search(r"\.layers\.(\d+)\.", path)
        return (int(layer[1]) if layer else -1, path)

    return sorted(paths, key=place)
