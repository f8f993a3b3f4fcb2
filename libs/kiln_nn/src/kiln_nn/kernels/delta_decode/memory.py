"""What a decode step of a DeltaNet layer reads and writes in place: one layer's slots.

Legend: `S` slots, `R` rows, `H`/`h` value and key heads, `K`/`V` key and value width, `P` ring
capacity, `C` convolution channels (q|k|v), `W` convolution width, `J` = W - 1 rows of tail,
`Q` = J + P convolution rows of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.gated_delta import DeltaRing, ring_mask

NO_SLOT = -1


@dataclass(frozen=True)
class DeltaMemory:
    """One layer's slots: committed states, the rings since, and the convolution's rows.

    Row `i` of a slot's convolution rows is the tail before its page boundary for `i < J`, then
    the ring. The ring's first dimension counts slots here. A row commits when its ring holds
    `page_tokens`.
    """

    state_SHKV: torch.Tensor
    ring: DeltaRing
    conv_rows_SQC: torch.Tensor
    page_tokens: int = 16

    def layer(self, index: int) -> DeltaMemory:
        """One layer of a memory whose tensors have all layers as their first dimension."""
        ring = DeltaRing(self.ring.k_RhPK[index], self.ring.u_RHPV[index], self.ring.log_decay_RHP[index])
        return DeltaMemory(self.state_SHKV[index], ring, self.conv_rows_SQC[index], self.page_tokens)

    def as_layers(self) -> DeltaMemory:
        """This one layer as a memory of layers."""
        ring = DeltaRing(self.ring.k_RhPK[None], self.ring.u_RHPV[None], self.ring.log_decay_RHP[None])
        return DeltaMemory(self.state_SHKV[None], ring, self.conv_rows_SQC[None], self.page_tokens)


@dataclass(frozen=True)
class DeltaDecodeWeights:
    """The layer's small parameters."""

    conv_CW: torch.Tensor
    A_log_H: torch.Tensor
    dt_bias_H: torch.Tensor
    norm_V: torch.Tensor
    norm_eps: float


@dataclass(frozen=True, eq=False)
class DeltaRows:
    """Where each decode row's memory lies, as int64 device tensors; the same for all layers of a step.

    A row reads the state committed in `read_slots`, keeps its ring of `lengths` tokens in
    `ring_slots`, and, where `commit_slots` is not NO_SLOT, folds the ring with this token into
    a new state there. A row whose ring slot is NO_SLOT pads the batch: it touches nothing and its
    output is zero.
    """

    read_slots_R: torch.Tensor
    ring_slots_R: torch.Tensor
    lengths_R: torch.Tensor
    commit_slots_R: torch.Tensor
    # What the reference derives from the above, once per step: by store shape.
    _indices: dict[tuple[int, ...], RowIndices] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return self.ring_slots_R.shape[0]

    def indices(self, memory: DeltaMemory) -> RowIndices:
        """Flat row numbers into tensors shaped like `memory`'s. Waits for the device."""
        num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
        num_heads, num_conv_rows = memory.state_SHKV.shape[1], memory.conv_rows_SQC.shape[1]
        key = (num_key_heads, num_heads, capacity, num_conv_rows)
        if key not in self._indices:
            self._indices[key] = _row_indices(self, *key)
        return self._indices[key]


@dataclass(frozen=True)
class RowIndices:
    """The reference's index tensors for the rows in use."""

    active: torch.Tensor | None  # rows that are no padding; None is all of them
    read_slots: torch.Tensor
    ring_slots: torch.Tensor
    mask_R1P: torch.Tensor
    key_entries: torch.Tensor  # [R * h] entries `(slot * h + head) * P + length`
    value_entries: torch.Tensor  # [R * H]
    conv_window: torch.Tensor  # [R * J] convolution rows before each token
    conv_targets: torch.Tensor
    commit: CommitIndices | None


@dataclass(frozen=True)
class CommitIndices:
    """Those among the rows in use whose state is committed."""

    rows: torch.Tensor
    read_slots: torch.Tensor
    ring_slots: torch.Tensor
    lengths: torch.Tensor  # this step's token included
    to_slots: torch.Tensor
    tail_sources: torch.Tensor
    tail_targets: torch.Tensor


def check_memory(memory: DeltaMemory, weights: DeltaDecodeWeights) -> None:
    """Compare the shapes of a layer's slots and parameters with each other.

    Raises:
        ShapeMismatch: one of them does not fit.
    """
    num_slots, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    num_channels = 2 * num_key_heads * key_dim + num_heads * value_dim
    num_tail_rows = weights.conv_CW.shape[1] - 1
    check_shape("ring.k", memory.ring.k_RhPK, (num_slots, num_key_heads, capacity, key_dim))
    check_shape("ring.u", memory.ring.u_RHPV, (num_slots, num_heads, capacity, value_dim))
    check_shape("ring.log_decay", memory.ring.log_decay_RHP, (num_slots, num_heads, capacity))
    check_shape("conv_rows", memory.conv_rows_SQC, (num_slots, num_tail_rows + capacity, num_channels))
    check_shape("conv", weights.conv_CW, (num_channels, None))
    check_shape("A_log", weights.A_log_H, (num_heads,))
    check_shape("dt_bias", weights.dt_bias_H, (num_heads,))
    check_shape("norm", weights.norm_V, (value_dim,))


def _row_indices(
    rows: DeltaRows, num_key_heads: int, num_heads: int, capacity: int, num_conv_rows: int
) -> RowIndices:
    is_active = rows.ring_slots_R >= 0
    active = None if bool(is_active.all()) else is_active.nonzero().flatten()
    reads, slots, lengths, commits = (
        numbers if active is None else numbers.index_select(0, active)
        for numbers in (rows.read_slots_R, rows.ring_slots_R, rows.lengths_R, rows.commit_slots_R)
    )
    num_tail_rows = num_conv_rows - capacity
    return RowIndices(
        active=active,
        read_slots=reads,
        ring_slots=slots,
        mask_R1P=ring_mask(lengths, capacity),
        key_entries=_ring_entries(slots, lengths, num_key_heads, capacity),
        value_entries=_ring_entries(slots, lengths, num_heads, capacity),
        conv_window=_conv_window(reads, slots, lengths, num_tail_rows, num_conv_rows),
        conv_targets=slots * num_conv_rows + num_tail_rows + lengths,
        commit=_commit_indices(reads, slots, lengths, commits, num_tail_rows, num_conv_rows),
    )


def _conv_window(
    reads: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    num_tail_rows: int,
    num_conv_rows: int,
) -> torch.Tensor:
    """Convolution rows of the J tokens before ring place `length`; the tail belongs to the state."""
    places = lengths[:, None] + torch.arange(num_tail_rows, device=lengths.device)
    window_slots = torch.where(places < num_tail_rows, reads[:, None], slots[:, None])
    return (window_slots * num_conv_rows + places).flatten()


def _commit_indices(
    reads: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    commits: torch.Tensor,
    num_tail_rows: int,
    num_conv_rows: int,
) -> CommitIndices | None:
    rows = (commits >= 0).nonzero().flatten()
    if not rows.numel():
        return None
    reads, slots, lengths, commits = (x.index_select(0, rows) for x in (reads, slots, lengths, commits))
    tail = torch.arange(num_tail_rows, device=rows.device)
    return CommitIndices(
        rows=rows,
        read_slots=reads,
        ring_slots=slots,
        lengths=lengths + 1,
        to_slots=commits,
        tail_sources=_conv_window(reads, slots, lengths + 1, num_tail_rows, num_conv_rows),
        tail_targets=((commits * num_conv_rows)[:, None] + tail).flatten(),
    )


def _ring_entries(slots: torch.Tensor, lengths: torch.Tensor, num_heads: int, capacity: int) -> torch.Tensor:
    heads = torch.arange(num_heads, device=slots.device) * capacity
    return ((slots * (num_heads * capacity) + lengths)[:, None] + heads).flatten()
