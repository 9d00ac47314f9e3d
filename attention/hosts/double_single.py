"""What hosts with FLUX's two kinds of blocks share: double blocks with two streams, then single blocks with one.

It is no host itself: what such a model is, and which tokens its calls have, each host tells.
"""

from collections.abc import Mapping
from typing import Any

from .base import Host, Site, WeightTarget, numbered_sites, rows_of, site_of_block, with_biases


class DoubleSingleHost(Host):
    """A host whose models have `double_blocks` and `single_blocks` named as in FLUX.1."""

    def sites(self, module: Any) -> tuple[Site, ...]:
        sizes = module.num_heads, module.hidden_size // module.num_heads
        double = numbered_sites("double", len(module.double_blocks), *sizes)
        return double + numbered_sites("single", len(module.single_blocks), *sizes)

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"double": "double", "single": "single"})

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """Return the query norms of every block."""
        double = [f"double_blocks.{i}.img_attn.norm.query_norm" for i in range(len(module.double_blocks))]
        single = [f"single_blocks.{i}.norm.query_norm" for i in range(len(module.single_blocks))]
        return tuple(f"{name}.weight" for name in double + single)

    def site_weights(self, module: Any) -> dict[str, tuple[str, ...]]:
        """Return the modules with the attention weights; in a single block they hold its MLP too."""
        parts = ("linear1", "linear2", "norm")
        double = {
            f"double.{i}": tuple(f"double_blocks.{i}.{stream}_attn" for stream in ("img", "txt"))
            for i in range(len(module.double_blocks))
        }
        return double | {
            f"single.{i}": tuple(f"single_blocks.{i}.{part}" for part in parts)
            for i in range(len(module.single_blocks))
        }

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image stream's projections, which CLEAR trains, weights and biases."""
        return with_biases({**double_targets(module), **single_targets(module)})

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        double = {f"transformer_blocks.{i}.attn": f"double.{i}" for i in range(len(module.double_blocks))}
        single = {f"single_transformer_blocks.{i}.attn": f"single.{i}" for i in range(len(module.single_blocks))}
        return double | single


def double_targets(module: Any) -> dict[str, WeightTarget]:
    """Return the image stream's projections in double blocks, weights only; q, k and v are rows of one parameter.

    Source: key names of diffusers, and `flux_to_diffusers` of ComfyUI 0.30.
    """
    width = module.hidden_size
    targets: dict[str, WeightTarget] = {}
    for i in range(len(module.double_blocks)):
        name, block = f"transformer_blocks.{i}.attn", f"double_blocks.{i}.img_attn"
        targets |= rows_of(name, ("to_q", "to_k", "to_v"), f"{block}.qkv", (width,) * 3, width)
        targets |= rows_of(name, ("to_out.0",), f"{block}.proj", (width,), width)
    return targets


def single_targets(module: Any) -> dict[str, WeightTarget]:
    """Return the same of single blocks; the rest of a block's `linear1` is its MLP."""
    width, parts = module.hidden_size, ("to_q", "to_k", "to_v")
    targets: dict[str, WeightTarget] = {}
    for i in range(len(module.single_blocks)):
        name, key = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}.linear1"
        targets |= rows_of(name, parts, key, (width,) * 3, width)
    return targets
