"""Pictures of latents: decoded by a VAE that is wired, of clips the middle frame, and never at a training's cost."""

from types import SimpleNamespace

import pytest
import torch


class Vae:
    """Doubles the sides and shows the first channel; it notes what it decoded."""

    def __init__(self, device="cpu", needs=0):
        self.patcher = SimpleNamespace(load_device=torch.device(device), model_size=lambda: needs)
        self.vae_dtype, self.seen = torch.float32, []

    def memory_used_decode(self, shape, dtype):
        return 0

    def decode(self, latent):
        self.seen.append(tuple(latent.shape))
        grey = latent[:, :1].reshape(1, 1, *latent.shape[-2:]).repeat_interleave(2, 2).repeat_interleave(2, 3)
        pixels = grey.movedim(1, -1).expand(-1, -1, -1, 3)
        return pixels if latent.ndim == 4 else pixels[:, None]


@pytest.fixture
def pictures(comfy):
    """The module."""
    return comfy.module("nodes.latent_pictures")


@pytest.mark.parametrize(
    ("shape", "decoded"),
    [((2, 16, 5, 7), (1, 16, 5, 7)), ((1, 16, 3, 5, 7), (1, 16, 1, 5, 7)), ((1, 16, 1, 5, 7),) * 2],
)
def test_the_first_latent_is_decoded_and_of_a_clip_its_middle_frame(pictures, shape, decoded):
    vae = Vae()
    assert pictures.decoded(vae, torch.rand(shape)).size == (14, 10) and vae.seen == [decoded]


def test_no_picture_where_the_vae_fails_or_would_push_a_model_out(pictures, monkeypatch):
    import comfy.model_management as management

    broken = Vae()
    broken.decode = lambda _: (_ for _ in ()).throw(RuntimeError("other channels"))
    assert pictures.decoded(broken, torch.rand(1, 16, 4, 4)) is None
    monkeypatch.setattr(management, "get_free_memory", lambda _: 1000)
    for needs, shown in ((500, True), (2000, False)):
        vae = Vae("meta", needs)
        assert (pictures.decoded(vae, torch.rand(1, 16, 4, 4)) is not None) == shown
        assert len(vae.seen) == shown


def test_a_contact_sheet_stands_in_a_row(pictures):
    latents = [torch.full((1, 16, 4, 6), value) for value in (0.0, 0.5, 1.0)]
    sheet = pictures.contact_sheet(lambda latent: pictures.decoded(Vae(), latent), latents)
    assert sheet.shape == (1, 8, 3 * 12 + 2 * 4, 3)
    assert [round(float(sheet[0, 4, x, 0]), 1) for x in (6, 22, 38)] == [0.0, 0.5, 1.0]
    assert pictures.contact_sheet(lambda _: None, latents) is None
    many = pictures.contact_sheet(lambda latent: pictures.decoded(Vae(), latent), latents * 4)
    assert many.shape[2] == 8 * 12 + 7 * 4, "a sheet has a bound"
