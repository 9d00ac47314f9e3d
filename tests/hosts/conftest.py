"""A tiny FLUX of ComfyUI's own class, and a way to watch its attention calls."""

from types import SimpleNamespace

import pytest
import torch

from linearize.attention.runtime import CALL_KEY, RUNTIME_KEY, model_call_wrapper

CONFIG = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
    "hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
    "txt_ids_dims": [],
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_flux(comfy):
    """ComfyUI's own FLUX class with seeded random weights, fp32."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(**CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model.requires_grad_(False)


@pytest.fixture
def watch(tiny_flux):
    """A function that runs one forward and returns its attention calls, with the layout the host told for each."""

    def run(runtime, latent, text, references=None, override=None, **options):
        calls = []

        def spy(func, q, k, v, heads, **kwargs):
            transformer_options = kwargs["transformer_options"]
            facts = transformer_options.get(CALL_KEY)
            if override is not None:
                output = override(func, q, k, v, heads, **kwargs)
            else:
                output = func(q, k, v, heads, **kwargs)
            site = runtime.host.site_of(transformer_options)
            calls.append(SimpleNamespace(site=site, q=q, k=k, v=v, output=output, layout=facts and facts.layout))
            return output

        transformer_options = {
            "optimized_attention_override": spy,
            RUNTIME_KEY: runtime,
            "wrappers": {"diffusion_model": {"linearize": [model_call_wrapper]}},
            **options,
        }
        batch = latent.shape[0]
        with torch.no_grad():
            output = tiny_flux(
                latent, torch.full((batch,), 0.5), text, torch.zeros(batch, 32), None, references,
                transformer_options=transformer_options,
            )  # fmt: skip
        return output, calls

    return run
