"""Fine-tune Student on bases whose weights are stored packed: 8 and 4 bits, scaled or rotated."""

from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(
    "kind, full_rank",
    [("float8_e4m3fn", True), ("mxfp8", False), ("nvfp4", True), ("int8_tensorwise", False), ("convrot_w4a4", True)],
)
def test_a_student_of_a_packed_base_loads_on_it(lab, comfy, packed_models, kind, full_rank, tmp_path):
    """From samples to a file that runs on the base it was distilled on."""
    import comfy.sd as comfy_sd
    import folder_paths

    source = Path(folder_paths.get_full_path("diffusion_models", "linearize_tiny_flux.safetensors"))
    packed_models.write_packed(source, tmp_path / "base.safetensors", kind)
    with torch.inference_mode():
        model = comfy_sd.load_diffusion_model(str(tmp_path / "base.safetensors"))
    spec = lab.specs.HybridSpec(2, "hedgehog")
    settings = {"full_rank": full_rank, "delta_rate": 1e-5, "seed": 21, "block_updates": 1, "updates": 1}
    found, losses = lab.finetune(model, lab.student("flux", spec), lab.samples("flux"), **settings)
    assert len(losses["loss"]) == 2 and found.deltas
    saved = tmp_path / "student.safetensors"
    files = lab.module("attention.students.file")
    files.save_student(saved, found.student())
    studio, loaded = lab.models["flux"], files.load_student(saved)
    student = lab.candidates.Candidates.of_student(loaded, dict.fromkeys(found.sites, spec))
    patched = comfy.node("LinearizeApply")(model=model, attention=student)[0]
    assert studio.sample(patched).isfinite().all()
    assert {kind for kind, _ in studio.ran(patched).values()} == {"hybrid"}


def test_memory_counts_what_layers_unpack(lab, packed_models, tmp_path):
    """A packed weight says that it has the dtype of the activations, and is cast for the backward pass all the same."""
    import comfy.sd as comfy_sd
    import folder_paths

    source = Path(folder_paths.get_full_path("diffusion_models", "linearize_tiny_flux.safetensors"))
    needed = {}
    for kind in ("plain", "convrot_w4a4"):
        path = source
        if kind != "plain":
            packed_models.write_packed(source, path := tmp_path / "base.safetensors", kind)
        with torch.inference_mode():
            model = comfy_sd.load_diffusion_model(str(path))

            def work(trainee):
                recipe = lab.module("training.engine.recipe").FinetuneRecipe(
                    block_updates=0, updates=1, held_out=1, rank=4
                )
                given = lab.student("flux", lab.specs.ClearSpec(radius=2))
                stage = lab.module("training.finetune.finetune").Finetune(trainee, given, recipe, torch.device("cpu"))
                return lab.module("nodes.finetune").needed_memory(trainee, stage)

            needed[kind] = lab.module("training.comfyui.trainee").with_trainee(model, lab.samples("flux"), work)
    assert needed["convrot_w4a4"].base < 0.5 * needed["plain"].base
    assert needed["convrot_w4a4"].activations > needed["plain"].activations
