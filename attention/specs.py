"""Kinds of attention as data: one frozen dataclass per kind, checked on construction.

Nothing here computes attention. `attention/runtime/registry.py` says what does, and enters each kind in `SPECS`.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from .checks import MOST_TOKENS, check_boolean, check_choice, check_number, check_whole
from .shown import quote

STABILIZERS = ("max", "lse", "common")
MOST_DOWN_FACTOR = 256  # a site's pooling weights have its square
MOST_FEATURES = 1024  # a map has up to the square of them per head
MOST_HEADS = 1024
MOST_TILE = 64
MOST_LEVELS = 16
MOST_FRAMES = 2**20
TRAINING_TOKENS = 4608  # CLEAR was distilled on 64 x 64 image tokens and 512 text tokens
FEATURE_MAPS: dict[str, type] = {}  # by name; `kinds/feature_maps.py` registers them


@dataclass(frozen=True, slots=True)
class Spec:
    """A kind with its parameters; a kind that answers one of these questions otherwise says so itself."""

    kind: ClassVar[str]
    told: ClassVar[tuple[str, ...]] = ()  # the parameters that are told even at their defaults
    is_dense: ClassVar[bool] = False  # left as the host runs it

    @property
    def feature_map(self) -> str:
        """One of FEATURE_MAPS where the kind has such maps, on all heads of a site; a field there."""
        return ""

    @property
    def feature_dim(self) -> int:
        """Features per head, a field where there are some; 0 takes the map's own number."""
        return 0

    @property
    def has_maps(self) -> bool:
        """Whether a site has feature maps."""
        return bool(self.feature_map)

    def learned_shapes(self, num_heads: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what a site learns beside feature maps and matrices, by the names `Learned` has."""
        return {}

    @property
    def parts(self) -> "tuple[Spec, ...]":
        """The specs of a site's heads: this one."""
        return (self,)


@dataclass(frozen=True, slots=True)
class DenseSpec(Spec):
    """Softmax attention over every token: the site is left as the host runs it."""

    kind: ClassVar[str] = "dense"
    is_dense: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClearSpec(Spec):
    """CLEAR: a grid token sees the global tokens and the grid tokens inside a disc around it.

    visible(i, j) = dy^2 + dx^2 < radius^2, and for several frames (dt * radius / temporal_radius)^2 + dy^2 + dx^2 <
    radius^2. Global tokens see, and are seen by, everything.

    Args:
        radius: in tokens (one FLUX token is 16 pixels), at least 1; the comparison is strict, so 1 is the token alone.
        temporal_radius: in latent frames; 0 lets a token see the disc of every frame.
        down_factor: side of the squares of grid tokens that are averaged into one pooled token each, which every grid
            token of that grid sees; 1 makes none.
        proportional: scale the logits by sqrt(log_4608(number of keys)), CLEAR's correction for sizes above the one it
            was distilled at (with pooled tokens: of ten times the number).

    Raises:
        ValueError: a value is out of range; the sentence names it.

    Source: CLEAR (arXiv 2412.16112) and its attention processors, github.com/Huage001/CLEAR.
    """

    kind: ClassVar[str] = "clear"
    told: ClassVar[tuple[str, ...]] = ("radius",)
    radius: int = 16
    temporal_radius: int = 0
    down_factor: int = 1
    proportional: bool = False

    def __post_init__(self) -> None:
        check_whole(
            "radius",
            self.radius,
            1,
            MOST_TOKENS,
            "a token sees at least itself; use kind dense to switch the window off",
        )
        check_whole("temporal_radius", self.temporal_radius, 0, MOST_TOKENS, "0 means every frame")
        check_whole("down_factor", self.down_factor, 1, MOST_DOWN_FACTOR, "1 means no pooled tokens")
        check_boolean("proportional", self.proportional)

    def learned_shapes(self, num_heads: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of the pooling weights, which all heads share, where there are pooled tokens."""
        return {"pool": (self.down_factor, self.down_factor)} if self.down_factor > 1 else {}

    def scale(self, head_dim: int, num_tokens: int) -> float:
        """Return the factor on q . k for `num_tokens` keys (global and grid tokens, pooled ones not counted)."""
        base = head_dim**-0.5
        if not self.proportional:
            return base
        keys = max(10 * num_tokens if self.down_factor > 1 else num_tokens, 1)
        return base * math.sqrt(math.log(keys, TRAINING_TOKENS))


@dataclass(frozen=True, slots=True)
class LinearSpec(Spec):
    """Linear attention: phi_q(q) S / (phi_q(q) z) with S = sum phi_k(k) v and z = sum phi_k(k).

    Args:
        feature_map: one of FEATURE_MAPS.
        feature_dim: features per head; 0 takes the map's own number.
    """

    kind: ClassVar[str] = "linear"
    rate: ClassVar[None] = None  # no key on a grid is exact
    stabilizer: ClassVar[str] = "max"
    feature_map: str = "polynomial"
    feature_dim: int = 0

    def __post_init__(self) -> None:
        _feature_map(self)


@dataclass(frozen=True, slots=True)
class HybridSpec(Spec):
    """Every `rate`-th token as an exact key, the others through a feature map, under one denominator.

    Args:
        rate: distance between exact keys in each grid, at least 1 (1 is dense attention).
        feature_map: one of FEATURE_MAPS.
        feature_dim: features per head; 0 takes the map's own number.
        stabilizer: how a learned map's keys are weighed against exact ones, which count exp(s - c). "max": c is the
            largest score of a query's exact keys, as in Attention Surgery; "lse": the log of the sum of their
            exponents; linear keys count phi_q(q) . phi_k(k). "common": those count phi_q(q) . phi_k(k) exp(-c), so
            that c cancels and the map learns exp(s) itself. Maps without parameters always count like that.

    Source: Attention Surgery (arXiv 2509.24899); "lse" and "common" are ours.
    """

    kind: ClassVar[str] = "hybrid"
    told: ClassVar[tuple[str, ...]] = ("rate",)
    rate: int = 2
    feature_map: str = "polynomial"
    feature_dim: int = 0
    stabilizer: str = "max"

    def __post_init__(self) -> None:
        check_whole("rate", self.rate, 1, MOST_TOKENS, "1 keeps every key exact")
        _feature_map(self)
        check_choice("stabilizer", self.stabilizer, STABILIZERS)


@dataclass(frozen=True, slots=True)
class ChunkedSpec(Spec):
    """Softmax inside a chunk of frames and its overlap, linear attention outside.

    Args:
        chunk_frames: latent frames per chunk, at least 1.
        overlap_frames: latent frames before the chunk that its softmax still sees, at least 0.
        causal: leave out the frames after the chunk.
        feature_map: one of FEATURE_MAPS.
        feature_dim: features per head; 0 takes the map's own number.

    Source: ReHyAt (arXiv 2601.04342).
    """

    kind: ClassVar[str] = "chunked"
    told: ClassVar[tuple[str, ...]] = ("chunk_frames",)
    rate: ClassVar[None] = None  # exact keys are whole frames
    stabilizer: ClassVar[str] = "max"
    chunk_frames: int = 3
    overlap_frames: int = 1
    causal: bool = False
    feature_map: str = "polynomial"
    feature_dim: int = 0

    def __post_init__(self) -> None:
        check_whole("chunk_frames", self.chunk_frames, 1, MOST_FRAMES, "a chunk holds at least one frame")
        check_whole("overlap_frames", self.overlap_frames, 0, MOST_FRAMES, "0 means no overlap")
        check_boolean("causal", self.causal)
        _feature_map(self)


@dataclass(frozen=True, slots=True)
class FoveatedSpec(Spec):
    """Exact keys near the query and where content asks for them, means elsewhere; every key counts once.

    Grids are cut into tiles, and the queries of a tile see the same. A mean counts as often as it has tokens: its score
    is q . mean(k) + log(number of tokens). Global tokens stay exact.

    Args:
        radius: tokens nearer to the tile of queries than this are exact (strict: 1 is the tile itself, 0 is none).
        top: share of the tiles of keys that each head and tile of queries chooses by content to see exactly, 0 to 1;
            rounded down, but one tile at least.
        tile: side of a tile in tokens.
        frames: latent frames of a tile; 0 takes all.
        levels: sizes of means. 1: one mean per tile. More: means begin at half a tile's side, and each further level
            doubles side and distance, so that pairs grow with N log N; `tile` is even then.
        order: 0 means alone; 1 adds the first-order term of the means, one matrix per head.

    Raises:
        ValueError: a value is out of range; the sentence names it.

    Source: the rule is ours; PISA (arXiv 2602.01077) has the means of runs of tokens and the first-order term.
    """

    kind: ClassVar[str] = "foveated"
    told: ClassVar[tuple[str, ...]] = ("top", "tile")
    radius: int = 1
    top: float = 0.1
    tile: int = 4
    frames: int = 1
    levels: int = 1
    order: int = 0

    def __post_init__(self) -> None:
        check_whole("radius", self.radius, 0, MOST_TOKENS, "0 makes nothing exact for its distance")
        check_number("top", self.top, 1.0)
        check_whole("tile", self.tile, 1, MOST_TILE, "one token")
        check_whole("frames", self.frames, 0, MOST_FRAMES, "0 means all frames")
        check_whole("levels", self.levels, 1, MOST_LEVELS, "one mean per tile")
        check_whole("order", self.order, 0, 1, "means alone")
        if self.levels > 1 and self.tile % 2:
            raise ValueError(f"tile is even where levels are above 1, got tile={self.tile}")
        if not self.radius and not self.top:
            raise ValueError("radius or top is above 0; with neither there is no exact key on the grid")

    @property
    def cell_side(self) -> int:
        """Side of the smallest cells in tokens."""
        return self.tile if self.levels == 1 else self.tile // 2

    def learned_shapes(self, num_heads: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a bias per head and level, and of pooling logits where a cell has several places."""
        shapes: dict[str, tuple[int, ...]] = {"bias": (num_heads, self.levels)}
        return shapes if self.cell_side == 1 else shapes | {"pool_logits": (num_heads, self.cell_side, self.cell_side)}


MappedSpec = LinearSpec | HybridSpec | ChunkedSpec  # the kinds that have feature maps
SPECS: dict[str, type[Spec]] = {}  # by kind; `runtime/registry.py` enters them


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Some heads of a site, counted from 0, and their spec."""

    heads: tuple[int, ...]
    spec: Spec


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """A site whose heads run different specs, for example a radius per head.

    Raises:
        ValueError: a head is named twice or the heads do not run from 0 without gap.
    """

    is_dense: ClassVar[bool] = False
    feature_map: ClassVar[str] = ""  # kinds with feature maps run on all heads of a site
    feature_dim: ClassVar[int] = 0
    has_maps: ClassVar[bool] = False
    groups: tuple[HeadGroup, ...]

    def __post_init__(self) -> None:
        if self.num_heads > MOST_HEADS:
            raise ValueError(f"a site has at most {MOST_HEADS} heads, got {self.num_heads}")
        named = sorted(head for group in self.groups for head in group.heads)
        if not named or named != list(range(len(named))):
            raise ValueError(f"the heads of a site are named once each and without gap from 0, got {quote(named)}")

    @property
    def num_heads(self) -> int:
        return sum(len(group.heads) for group in self.groups)

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The specs of the groups."""
        return tuple(group.spec for group in self.groups)

    @property
    def kind(self) -> str:
        """The kind all groups share, else the distinct kinds joined by "+"."""
        return "+".join(sorted({part.kind for part in self.parts}))

    def learned_shapes(self, num_heads: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what its kinds learn, where they agree; heads of other kinds use none."""
        shapes = {pair for part in self.parts for pair in part.learned_shapes(num_heads).items()}
        names = [name for name, _ in shapes]
        return {name: shape for name, shape in sorted(shapes) if names.count(name) == 1}


SiteSpec = Spec | HeadSplit


def groups_of(spec: SiteSpec, num_heads: int) -> tuple[HeadGroup, ...]:
    """Return the head groups of a site; a plain spec is one group with every head.

    Raises:
        ValueError: the spec names another number of heads than the site has.
    """
    if not isinstance(spec, HeadSplit):
        return (HeadGroup(tuple(range(num_heads)), spec),)
    if spec.num_heads != num_heads:
        raise ValueError(f"the plan names {spec.num_heads} heads for a site that has {num_heads}")
    return spec.groups


def radius_per_head(radii: tuple[int, ...], spec: ClearSpec | FoveatedSpec | None = None) -> SiteSpec:
    """Return `spec` (default: plain CLEAR) with radius `radii[h]` for head h, heads of equal radius in one group."""
    base = spec or ClearSpec()
    groups = tuple(
        HeadGroup(tuple(h for h, r in enumerate(radii) if r == radius), replace(base, radius=radius))
        for radius in sorted(set(radii))
    )
    return groups[0].spec if len(groups) == 1 else HeadSplit(groups)


def _feature_map(spec: MappedSpec) -> None:
    check_choice("feature_map", spec.feature_map, FEATURE_MAPS)
    check_whole("feature_dim", spec.feature_dim, 0, MOST_FEATURES, "0 takes the map's own number")
