"""The demo's own model: its pictures, captions, autoencoder and training, and what the shipped weights paint."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from linearize.lab.demo.nodes.captions import encode_caption
from linearize.lab.models.lake.autoencoder import OFFSET, SCALE, SHIFT, UNFOLDED, Autoencoder
from linearize.lab.models.lake.flux_model import FluxConfig, FluxModel
from linearize.lab.models.lake.latents import SPREAD, latents_of, small_pictures_of
from linearize.lab.models.lake.scenes import COLOURS, SIDES, draw_scenes, render, scenes_of_captions
from linearize.lab.models.lake.scores import house_of, reflection, reflection_of_others, times_of
from linearize.lab.models.lake.train import Stage, Trainer, run

MODELS = Path(__file__).resolve().parents[3] / "lab" / "models"
CAPTIONS = [
    "dusk sun left mountains red house right pine left",
    "day sun right dunes blue house left oak right",
    "night moon middle hills yellow house right pine left",
    "day sun middle mountains white house left pine right",
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def psnr(result, truth):
    return -10 * torch.log10((result.clamp(0, 1) - truth).square().mean()).item()


def test_a_caption_keeps_the_order_of_its_words():
    tokens, pooled = encode_caption("red house left")
    assert tokens.shape == (12, 64) and pooled.shape == (64,)
    assert torch.equal(tokens, encode_caption("red, House left")[0])
    other, _ = encode_caption("left house red")
    assert not any(torch.equal(row, each) for row in tokens[:3] for each in other[:3])
    assert tokens[3:].eq(0).all()
    empty, nothing = encode_caption("")
    assert empty.eq(0).all() and nothing.eq(0).all()


def test_too_many_words_are_one_sentence():
    with pytest.raises(ValueError, match="read 12 words, this caption has 13"):
        encode_caption("a " * 13)


def test_scenes_are_what_their_captions_say():
    scenes = draw_scenes(64, generator(3))
    captions = scenes.captions()
    assert scenes_of_captions(captions, generator()).captions() == captions
    pictures = render(scenes, 128)
    assert reflection(pictures).min() > 0.95
    assert reflection_of_others(pictures).mean() < 0.2
    colours, sides = house_of(pictures, times_of(captions))
    assert torch.equal(colours, scenes.choices["colour"]) and torch.equal(sides, scenes.choices["side"])


def test_a_scene_is_the_same_at_every_size():
    scenes = draw_scenes(4, generator(5))
    large, small = render(scenes, 256), render(scenes, 64)
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < 3e-3


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("noon sun left hills red house left oak right", "'noon' is no time; known: day, dusk, night"),
        ("day moon left hills red house left oak right", "did you mean 'day sun left hills red house left oak right'"),
        ("day sun left", "nine words"),
    ],
)
def test_a_wrong_caption_is_one_sentence(caption, words):
    with pytest.raises(ValueError, match=words):
        scenes_of_captions([caption], generator())


def test_the_encoder_gives_the_latents_of_training():
    pictures = render(draw_scenes(2, generator(7)), 128)
    latents = latents_of(F.avg_pool2d(pictures, 4))
    found = Autoencoder().encode(pictures)
    assert (found[:, :12] - latents[:, :12]).abs().max() < 1e-5
    assert found[:, 12:].abs().max() == 0
    assert (small_pictures_of(latents) - F.avg_pool2d(pictures, 4)).abs().max() < 1e-6


def test_the_decoder_unfolds_exactly_up_to_the_border():
    small = render(draw_scenes(2, generator(7)), 64)
    features = latents_of(small)
    unfolding, channels = Autoencoder().unfolding, list(UNFOLDED)
    squeezed = 3 * torch.tanh(SPREAD * (small - 0.5) / 3) + OFFSET
    assert (unfolding(features)[:, channels] - squeezed).abs().max() < 1e-5
    noisy = features.clone()
    noisy[:, 12:14] += 0.03 * torch.randn(noisy[:, 12:14].shape, generator=generator())
    assert (unfolding(noisy)[:, channels] - squeezed).abs().max() < 1e-5
    bare = features.clone()
    bare[:, 12:] = 0
    mean = F.interpolate(F.avg_pool2d(squeezed, 2), scale_factor=2)
    assert (unfolding(bare)[:, channels] - mean).abs().max() < 1e-5


def test_the_training_forward_is_comfyuis(comfy):
    import comfy.ldm.flux.model
    import comfy.model_detection
    import comfy.ops

    ours = FluxModel(FluxConfig(double=2, single=1))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator(parameter.numel()))
    config = comfy.model_detection.model_config_from_unet(ours.state_dict(), "")
    assert type(config).__name__ == "Flux"
    theirs = comfy.ldm.flux.model.Flux(
        **config.unet_config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(2, 16, 6, 10), torch.rand(2), torch.randn(2, 5, 64), torch.randn(2, 64), torch.rand(2) * 4
    with torch.no_grad():
        assert (ours(*inputs) - theirs(*inputs)).abs().max() < 1e-4 * ours(*inputs).abs().max()


def test_training_resumes_where_it_stopped(tmp_path):
    stage = Stage("small", 8, 2, 2, 1.0, 0.5)
    distil = Stage("distilled", 8, 2, 2, 0.5, 0.1, distil=True)
    run(tmp_path / "whole", "cpu", (stage, distil))
    for stop in (1, 3):  # in the middle of each stage
        part = tmp_path / f"part{stop}"
        trainer = Trainer()
        part.mkdir()
        for step in range(stop):
            trainer.advance((stage, distil)[step // 2], step % 2)
        trainer.save(part / "checkpoint.safetensors")
        run(part, "cpu", (stage, distil))
        whole, resumed = (load_file(tmp_path / each / "checkpoint.safetensors") for each in ("whole", part.name))
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name


def test_shipped_weights_are_small():
    sizes = {file.name: file.stat().st_size for file in MODELS.glob("linearize_lake_*.safetensors")}
    assert set(sizes) == {"linearize_lake_flux.safetensors", "linearize_lake_vae.safetensors"}
    assert sum(sizes.values()) < 19e6


def test_comfyui_decodes_with_the_shipped_autoencoder(comfy):
    with torch.inference_mode():
        (vae,) = comfy.nodes.VAELoader().load_vae("linearize_lake_vae.safetensors")
        pictures = render(draw_scenes(2, generator(99)), 512)
        latents = latents_of(F.avg_pool2d(pictures, 4))
        scale, shift = SCALE, SHIFT
        result = vae.decode(latents / scale + shift).permute(0, 3, 1, 2)
        assert psnr(result, pictures) > json.loads((MODELS / "scores.json").read_text())["decoder, dB"] - 1.5
        encoded = (vae.encode(pictures.permute(0, 2, 3, 1)) - shift) * scale
    assert (encoded[:, :12] - latents[:, :12]).abs().max() < 0.02


def test_the_shipped_model_paints_what_the_caption_says(comfy):
    """Through ComfyUI's stock loader and sampler: the right house, and a lake that mirrors its own land."""
    with torch.inference_mode():
        (model,) = comfy.nodes.UNETLoader().load_unet("linearize_lake_flux.safetensors", "default")
        (vae,) = comfy.nodes.VAELoader().load_vae("linearize_lake_vae.safetensors")
        pictures = []
        for caption in CAPTIONS:
            (conditioning,) = comfy.node("LinearizeDemoCaption")(caption=caption).args
            conditioning = [[tensor, {**options, "guidance": 2.0}] for tensor, options in conditioning]
            (latent,) = comfy.nodes.KSampler().sample(
                model, 1, 12, 1.0, "euler", "simple", conditioning, conditioning,
                {"samples": torch.zeros(1, 16, 64, 64)}, 1.0,
            )  # fmt: skip
            pictures.append(vae.decode(latent["samples"]))
    painted = torch.cat(pictures).permute(0, 3, 1, 2)
    colours, sides = house_of(painted, times_of(CAPTIONS))
    said = [caption.split() for caption in CAPTIONS]
    assert [COLOURS[each] for each in colours] == [words[4] for words in said]
    assert [SIDES[each] for each in sides] == [words[6] for words in said]
    own, others = reflection(painted).mean(), reflection_of_others(painted).mean()
    assert own > 0.6 and own > others + 0.3, (own, others)
