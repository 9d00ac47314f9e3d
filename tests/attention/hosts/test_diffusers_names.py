"""Names of diffusers against ComfyUI's own tables for LoRAs, where it has one."""

import family_auraflow
import family_flux
import family_flux2
import family_hunyuan_video
import family_krea2
import family_lumina
import family_sd3
import pytest
from families import collect

from linearize.attention.hosts import find_host

TABLES = {  # by family: ComfyUI's function, and the sizes that it asks for
    "flux": ("flux_to_diffusers", family_flux.CONFIG),
    "flux2": ("flux_to_diffusers", family_flux2.CONFIG),
    "hunyuan_video": ("flux_to_diffusers", family_hunyuan_video.CONFIG),
    "z_image": ("z_image_to_diffusers", family_lumina.Z_IMAGE),
    "krea2": ("krea2_to_diffusers", family_krea2.CONFIG),
    "sd3": ("mmdit_to_diffusers", family_sd3.CONFIG),
    "sd3.5 medium": ("mmdit_to_diffusers", family_sd3.CONFIG | {"num_blocks": 3}),
    "auraflow": ("auraflow_to_diffusers", family_auraflow.CONFIG),
}


@pytest.mark.parametrize("family", [family for family in collect() if family.name in TABLES], ids=lambda f: f.name)
def test_targets_are_where_comfyui_puts_them(family, tiny):
    import comfy.utils

    function, config = TABLES[family.name]
    known = getattr(comfy.utils, function)(config)
    model = tiny(family)
    targets = find_host(model).diffusers_targets(model)
    assert targets
    for name, target in targets.items():
        found = known[name]
        key, rows = (found[0], found[1][1:]) if isinstance(found, tuple) else (found, (0, target.shape[0]))
        assert (target.key, target.start, target.shape[0]) == (key, *rows), name
