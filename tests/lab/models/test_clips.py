"""The demo's video model: its clips, latents, scores and training, and what the shipped weights make of captions."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from linearize.lab.demo.nodes.captions import encode_caption
from linearize.lab.demo.nodes.clip_latents import clips_of, latents_of, of_comfyui, to_comfyui
from linearize.lab.models.clips.publish import write_model
from linearize.lab.models.clips.scenes import choices_of, draw_scenes, render, scenes_of_captions
from linearize.lab.models.clips.scores import AFTER, BEFORE, judge, judge_chance, track
from linearize.lab.models.clips.train import Stage, Trainer, run
from linearize.lab.models.clips.wan_model import WanConfig, WanModel

MODELS = Path(__file__).resolve().parents[3] / "lab" / "models"
FILE = "linearize_clips_wan.safetensors"
CAPTIONS = ["day red ball right white tower", "dusk green ball left brown tower", "night yellow ball left white tower"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def psnr(result, truth):
    return -10 * (result - truth).square().flatten(1).mean(1).log10()


def test_latents_hold_the_clips():
    drawn = render(draw_scenes(16, generator(3)))
    latents = latents_of(drawn)
    assert drawn.shape == (16, 3, 17, 48, 64) and latents.shape == (16, 16, 5, 24, 32)
    quality = psnr(clips_of(latents), drawn)
    assert quality.mean() > 33 and quality.min() > 28
    assert latents[:, [1, 2, 3, 5, 6, 7, 9, 10, 11, 15], 0].abs().max() < 1e-5  # the first frame stands still


def test_latents_come_back_exactly():
    latents = 0.2 * torch.randn(2, 16, 3, 4, 6, generator=generator(1))
    latents[:, :, 0] = latents_of(torch.rand(2, 3, 1, 8, 12, generator=generator(2)) / 2 + 0.2)[:, :, 0]
    found = latents_of(clips_of(latents))
    assert (found - latents).abs().max() < 1e-4


def test_latents_are_in_comfyuis_units(comfy):
    import comfy.latent_formats

    latents = torch.randn(1, 16, 2, 4, 4, generator=generator())
    outside = to_comfyui(latents)
    assert torch.allclose(outside, comfy.latent_formats.Wan21().process_out(latents))
    assert torch.allclose(of_comfyui(outside), latents, atol=1e-5)


def test_captions_name_what_is_drawn():
    scenes = draw_scenes(32, generator(3))
    captions = scenes.captions()
    again = scenes_of_captions(captions, generator())
    assert again.captions() == captions
    tokens = torch.stack([encode_caption(caption)[0] for caption in captions])
    assert tokens.shape == (32, 12, 64) and tokens[:, 6:].eq(0).all()


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("noon red ball right white tower", "'noon' is no time; known: day, dusk, night"),
        ("day red ball up white tower", "'up' is no way; known: right, left"),
        ("day red ball", "a caption is like"),
    ],
)
def test_a_wrong_caption_is_one_sentence(caption, words):
    with pytest.raises(ValueError, match=words):
        choices_of([caption])


def test_a_clip_is_the_same_at_every_size():
    scenes = draw_scenes(2, generator(5))
    large, small = render(scenes, (96, 128)), render(scenes, (24, 32))
    assert (F.avg_pool3d(large, (1, 4, 4)) - small).abs().mean() < 0.01


def test_the_ball_is_hidden_in_the_middle():
    scenes = draw_scenes(16, generator(7))
    mass = track(render(scenes)).mass.amax(1)
    assert (mass[:, :3] > 0.01).all() and (mass[:, -3:] > 0.01).all()
    assert (mass[:, 8] < 1e-4).all() and ((mass < 1e-4).sum(1) >= 3).all()


def test_scores_tell_drawn_clips_from_chance():
    scenes = draw_scenes(32, generator(9))
    drawn = render(scenes)
    right, chance = judge(drawn, scenes.choices), judge_chance(drawn, scenes.choices)
    assert right["mirror, still"] > 0.98 and right["mirror, moving"] > 0.98
    assert chance["mirror, still"] < 0.6 and chance["mirror, moving"] < 0.2
    for part in ("before", "after"):
        assert right[f"ball {part} the tower"] == 1 and chance[f"ball {part} the tower"] < 0.4
    assert right["path off a line, %"] < 0.15 and chance["path off a line, %"] > 0.35
    assert right["comes out off its path, %"] < 1 and chance["comes out off its path, %"] > 2.5


def test_a_still_clip_has_no_ball():
    scenes = draw_scenes(4, generator(9))
    still = render(scenes)[:, :, :1].expand(-1, -1, 17, -1, -1)
    found = track(still)
    assert found.colour(AFTER).eq(-1).all() and found.way(BEFORE).eq(-1).all()
    assert found.bend().isnan().all()


def test_the_training_forward_is_comfyuis(comfy):
    import comfy.ldm.wan.model
    import comfy.model_detection
    import comfy.ops

    ours = WanModel(WanConfig(blocks=2))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator(parameter.numel()))
    metadata = {"config": '{"transformer": {"text_dim": 64}}'}
    config = comfy.model_detection.model_config_from_unet(ours.state_dict(), "", metadata=metadata)
    assert type(config).__name__ == "WAN21_T2V"
    theirs = comfy.ldm.wan.model.WanModel(
        **config.unet_config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    theirs.load_state_dict(ours.state_dict())
    latent, level, text = torch.randn(2, 16, 3, 6, 10), torch.rand(2), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = theirs(latent, 1000 * level, text)
        assert (ours(latent, level, text) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_training_resumes_where_it_stopped(tmp_path):
    config = WanConfig(dim=128, ffn=64, blocks=1)
    stages = (Stage("coarse", (3, 4), 2, 2, 1.0, 0.5), Stage("fine", (6, 8), 2, 1, 0.5, 0.1))
    run(tmp_path / "whole", "cpu", stages, config)
    part = tmp_path / "part"
    part.mkdir()
    trainer = Trainer(config=config)
    trainer.advance(stages[0], 0)
    trainer.save(part / "checkpoint.safetensors")
    run(part, "cpu", stages, config)
    whole, resumed = (load_file(tmp_path / each / "checkpoint.safetensors") for each in ("whole", "part"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_the_written_file_is_a_small_wan(comfy, tmp_path):
    import comfy.sd
    import comfy.utils

    path = tmp_path / FILE
    write_model(WanModel(WanConfig()), path)
    assert path.stat().st_size <= 8.0e6
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    model = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)
    assert type(model.model.model_config).__name__ == "WAN21_T2V"
    assert model.model.diffusion_model.num_heads == 2


def test_frames_have_the_size_that_was_asked_for(comfy):
    frames = comfy.node("LinearizeDemoClipDecode")(samples={"samples": torch.zeros(2, 16, 5, 24, 32)}).args[0]
    assert frames.shape == (34, 192, 256, 3) and 0 <= frames.min() <= frames.max() <= 1


@pytest.mark.skipif(not (MODELS / FILE).exists(), reason="the video model is not trained yet")
def test_the_shipped_model_makes_what_the_caption_says(comfy):
    """Through ComfyUI's stock loader and sampler: the right ball on both sides of the tower, and its mirror."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    assert (MODELS / FILE).stat().st_size <= 8.0e6
    with torch.inference_mode():
        (model,) = comfy.nodes.UNETLoader().load_unet(FILE, "default")
        (model,) = ModelSamplingSD3().patch(model, 4.0)
        assert type(model.model.model_config).__name__ == "WAN21_T2V"
        (empty,) = comfy.node("LinearizeDemoCaption")(caption="").args
        made = []
        for caption in CAPTIONS:
            (told,) = comfy.node("LinearizeDemoCaption")(caption=caption).args
            (latent,) = comfy.nodes.KSampler().sample(
                model, 1, 12, 2.0, "euler", "simple", told, empty, {"samples": torch.zeros(1, 16, 5, 24, 32)}, 1.0
            )
            (frames,) = comfy.node("LinearizeDemoClipDecode")(samples=latent).args
            made.append(frames.permute(3, 0, 1, 2))
    scores = judge(F.avg_pool3d(torch.stack(made), (1, 4, 4)), choices_of(CAPTIONS))
    assert scores["ball before the tower"] == scores["ball after the tower"] == 1, scores
    assert scores["mirror, still"] > 0.8 and scores["mirror, moving"] > 0.5, scores
