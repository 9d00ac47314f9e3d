"""AuraFlow.

Sequence: 8 registers, text, main grid.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import Host, ModelCall, Site, WeightTarget, main_segment, missing_structure, planned_main, wrong_inputs

PIXELS_PER_LATENT = 8
NUM_REGISTERS = 8
PARTS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
STRUCTURE = (
    "init_x_linear",
    "cond_seq_linear",
    "positional_encoding",
    "register_tokens",
    "double_layers.0.attn.w2q",
    "single_layers.0.attn.w1q",
    "final_linear",
)


class AuraFlowHost(Host):
    """AuraFlow: 4 double and 32 single layers, head dimension 256."""

    name = "auraflow"
    title = "AuraFlow"
    default_text_tokens = 256  # ComfyUI pads T5 prompts to this many tokens; longer prompts grow

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        attention = module.single_layers[0].attn
        return tuple(Site(site, attention.n_heads, attention.head_dim) for site in self.site_modules(module))

    def site_modules(self, module: Any) -> dict[str, str]:
        kinds = {"double": module.double_layers, "single": module.single_layers}
        return {f"{kind}.{i}": f"{kind}_layers.{i}.attn" for kind, layers in kinds.items() for i in range(len(layers))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        patch = call.module.patch_size
        problem = wrong_inputs(self.title, latent, (4,), text)
        return problem or _layout(text.shape[1], main_segment(latent, (patch, patch)))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """AuraFlow makes pictures, so `frames` is not used."""
        return _layout(text_tokens, planned_main(width, height, PIXELS_PER_LATENT * module.patch_size))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image-stream projections, which have no biases.

        Source: `auraflow_to_diffusers` of ComfyUI 0.30.
        """
        attention = module.single_layers[0].attn
        width = attention.n_heads * attention.head_dim
        streams = {"double": "w2", "single": "w1"}
        return {
            f"{theirs}.{part}.weight": WeightTarget(
                f"{self.site_modules(module)[site]}.{streams[site.partition('.')[0]]}{ours}.weight", 0, (width, width)
            )
            for theirs, site in self.diffusers_sites(module).items()
            for part, ours in PARTS.items()
        }

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        double = {f"joint_transformer_blocks.{i}.attn": f"double.{i}" for i in range(len(module.double_layers))}
        return double | {f"single_transformer_blocks.{i}.attn": f"single.{i}" for i in range(len(module.single_layers))}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """AuraFlow's norms have no weights, so the modulations of its layers stand in."""
        double = [f"double_layers.{i}.modX.1.weight" for i in range(len(module.double_layers))]
        return (*double, *(f"single_layers.{i}.modCX.1.weight" for i in range(len(module.single_layers))))


def _layout(text_tokens: int, main: Segment) -> TokenLayout:
    return TokenLayout.of((Segment("register", NUM_REGISTERS), Segment("text", text_tokens), main))
