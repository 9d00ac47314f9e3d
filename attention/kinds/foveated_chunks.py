"""What some tiles of queries see in foveated attention: lists of tokens and means, and their tensors gathered."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..specs import FoveatedSpec
from .foveated_cells import CellTable, accepted_cells, ids_of, mask_of


class Inputs(NamedTuple):
    """What gradients flow to: q, k, v, keys and values all tiles share, means, their bias, the first-order matrix."""

    query: Tensor
    key: Tensor
    value: Tensor
    shared_key: Tensor
    shared_value: Tensor
    mean_key: Tensor
    mean_value: Tensor
    bias: Tensor
    slope: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What all chunks of a call share: spec, table, the tiles chosen by content (B, H, U, K), the factor on q . k."""

    spec: FoveatedSpec
    table: CellTable
    choice: Tensor
    scale: float

    @property
    def num_shared(self) -> int:
        """Means that all tiles share."""
        return len(self.table.sizes) if self.spec.levels == 1 else 0


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """What some tiles of queries see; -1 fills lists that are short.

    Args:
        queries: (T, n) tokens.
        tokens: (b, h, T, K) exact tokens, b and h the batch and heads or 1.
        means: (b, h, T, L) means that are listed, None where all tiles share them.
        held: (b, h, T, M) bool, which shared means a tile does not see, for it sees their tokens; None shares none.
    """

    queries: Tensor
    tokens: Tensor
    means: Tensor | None
    held: Tensor | None


def chunk_of(rows: slice, plan: Plan) -> Chunk:
    """Return what some tiles see; `rows` are theirs in the table and in the choice."""
    table, spec = plan.table, plan.spec
    cells, means = lists_of(rows, table, spec, plan.choice)
    held = mask_of(cells, plan.num_shared) if spec.levels == 1 else None
    tokens = F.pad(table.cells, (0, 0, 0, 1), value=-1)[cells].flatten(-2)
    return Chunk(table.tiles[rows], tokens, means, held)


def lists_of(rows: slice, table: CellTable, spec: FoveatedSpec, choice: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what some tiles of queries see: (b, h, T, K) smallest cells exactly, and (b, h, T, L) means; -1 fills.

    b and h are the batch and heads, or 1 where all see the same. None stands for the means of all other cells.
    """
    near, chosen = table.exact[None, None, rows], choice[:, :, rows].long()
    if spec.levels == 1:
        return (torch.cat([near.expand(*chosen.shape[:3], -1), chosen], -1) if chosen.shape[-1] else near), None
    if table.means is None:
        return _lists_beside(chosen, rows, table)
    return near, table.means[None, None, rows]


def most_listed(plan: Plan) -> int:
    """Return how many tokens and means the lists of one tile hold at most."""
    table, spec, num_chosen = plan.table, plan.spec, plan.choice.shape[-1]
    cells = table.exact.shape[1] + num_chosen * (spec.tile // spec.cell_side) ** 2
    tokens = min(cells, len(table.cells)) * table.cells.shape[1]
    if spec.levels == 1:
        return tokens
    if table.means is not None:
        return tokens + table.means.shape[1]
    standing = int(table.standing.max()) if len(table.standing) else 0
    # each larger cell around a chosen tile gives way to its parts, of which the others stand
    return tokens + min(len(table.sizes), standing + 3 * num_chosen * (spec.levels - 2))


def _lists_beside(chosen: Tensor, rows: slice, table: CellTable) -> tuple[Tensor, Tensor]:
    """Return exact cells and means where means of several levels stand beside chosen tiles: none holds a chosen one."""
    held = mask_of(chosen, len(table.tiles))
    fit = [table.far[0][rows] & ~held[..., table.parents[0]]]
    for level, far in enumerate(table.far[1:]):
        if level:  # the cells of level 1 are the tiles
            up = table.parents[level].expand(held.shape)
            held = torch.zeros(*held.shape[:3], far.shape[-1], device=held.device).scatter_add(-1, up, held.float()) > 0
        fit.append(far[rows] & ~held)
    return ids_of(~fit[0]), ids_of(torch.cat(accepted_cells(fit, table.parents), -1))


def gather(inputs: Inputs, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the queries (B, H, T, n, D), shared keys and values, own ones (B, H, T, K, D), bias and slope."""
    query = inputs.query.index_select(2, chunk.queries.clamp_min(0).flatten()).unflatten(2, chunk.queries.shape)
    own = [rows_of(tensor, chunk.tokens) for tensor in (inputs.key, inputs.value)]
    if chunk.means is not None:
        means = [rows_of(tensor, chunk.means) for tensor in (inputs.mean_key, inputs.mean_value)]
        own = [torch.cat(pair, 3) for pair in zip(own, means, strict=True)]
    return query, inputs.shared_key, inputs.shared_value, own[0], own[1], inputs.bias, inputs.slope


def rows_of(tensor: Tensor, ids: Tensor) -> Tensor:
    """Return tensor[b, h, ids[b, h]] for (B, H, N, D) and (B or 1, H or 1, T, K); -1 gives any row."""
    batch, heads, tokens, head_dim = tensor.shape
    ids = ids.clamp_min(0)
    if ids.shape[:2] == (1, 1):
        return tensor.index_select(2, ids.flatten()).reshape(batch, heads, *ids.shape[2:], head_dim)
    first = torch.arange(batch * heads, device=ids.device).reshape(batch, heads, 1, 1) * tokens
    flat = tensor.reshape(-1, head_dim).index_select(0, (first + ids).flatten())
    return flat.reshape(batch, heads, *ids.shape[2:], head_dim)


def shared_bias(bias: Tensor, chunk: Chunk, num_globals: int) -> Tensor:
    """Return (b, h, T or 1, S): 0 for global tokens, that of each shared mean, -inf for those a tile does not see."""
    if chunk.held is None:
        return bias.new_zeros(1, 1, 1, num_globals)
    means = torch.where(chunk.held, -torch.inf, bias[None, :, None])
    return torch.cat([bias.new_zeros(*means.shape[:3], num_globals), means], -1)


def own_bias(bias: Tensor, chunk: Chunk) -> Tensor:
    """Return (b, h, T, K + L): that of each listed key, 0 for tokens, -inf for what only fills a list."""
    tokens = torch.where(chunk.tokens < 0, -torch.inf, 0.0).to(bias.dtype)
    if chunk.means is None:
        return tokens
    batch, heads, tiles, listed = chunk.means.shape
    heads = max(heads, len(bias))
    ids = chunk.means.clamp_min(0).flatten(2).expand(-1, heads, -1)
    means = bias.expand(batch, heads, -1).gather(-1, ids).unflatten(-1, (tiles, listed))
    means = means.masked_fill(chunk.means < 0, -torch.inf)
    return torch.cat([tokens.expand(*means.shape[:3], -1), means], -1)


def add_rows(total: Tensor, ids: Tensor, part: Tensor) -> None:
    """Add (B, H, T, K, D) into total[b, h, ids[b, h]]; what -1 marks has no gradient."""
    batch, heads, tokens, head_dim = total.shape
    first = torch.arange(batch * heads, device=ids.device).reshape(batch, heads, 1, 1) * tokens
    flat = (first + ids.clamp_min(0)).flatten()
    total.view(-1, head_dim).index_add_(0, flat, part.reshape(-1, head_dim).to(total.dtype))
