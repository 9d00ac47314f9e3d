"""Compare with Teacher: PSNR and SSIM against definitions computed another way, batches, wrong input."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate


@pytest.fixture(scope="module")
def metrics(comfy):
    return comfy.module("nodes.picture_metrics")


@pytest.fixture
def compare(comfy):
    """Run the node; return its text and sheet."""
    return lambda image, teacher: comfy.node("LinearizeCompare")(image=image, teacher=teacher).args


def pictures(*size, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.rand(*size, generator=generator)
    return (teacher + noise * torch.randn(*size, generator=generator)).clamp(0, 1), teacher


def ssim_by_definition(x, y):
    """Wang et al. 2004 with one 11 x 11 window of weights, summed by scipy, deviations from the window's own mean."""
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    maps = []
    for channel in range(3):
        a, b = x[..., channel].double().numpy(), y[..., channel].double().numpy()
        mu_a, mu_b = (correlate(each, window) for each in (a, b))
        var_a, var_b = correlate(a * a, window) - mu_a**2, correlate(b * b, window) - mu_b**2
        cov = correlate(a * b, window) - mu_a * mu_b
        top = (2 * mu_a * mu_b + 0.0001) * (2 * cov + 0.0009)
        maps.append((top / ((mu_a**2 + mu_b**2 + 0.0001) * (var_a + var_b + 0.0009)))[5:-5, 5:-5].mean())
    return np.mean(maps)


@pytest.mark.parametrize(("height", "width"), [(11, 11), (40, 27), (64, 96), (150, 20)])
def test_ssim_and_psnr_equal_their_definitions(metrics, height, width):
    image, teacher = pictures(2, height, width, 3)
    found, _ = metrics.compare(image, teacher)
    for frame in range(2):
        assert float(found.ssim[frame]) == pytest.approx(ssim_by_definition(image[frame], teacher[frame]), abs=1e-9)
        error = np.mean((image[frame].double().numpy() - teacher[frame].double().numpy()) ** 2)
        assert float(found.psnr[frame]) == pytest.approx(10 * math.log10(1 / error), abs=1e-6)
        assert float(found.largest[frame]) == pytest.approx(float((image - teacher)[frame].abs().max()))


def test_known_values(metrics):
    """Flat pictures have no variance, so SSIM is its luminance term; an error of 0.1 everywhere is 20 dB."""
    teacher = torch.full((1, 32, 32, 3), 0.5)
    found, _ = metrics.compare(teacher + 0.1, teacher)
    assert float(found.psnr) == pytest.approx(20, abs=1e-5)
    assert float(found.ssim) == pytest.approx((2 * 0.6 * 0.5 + 1e-4) / (0.36 + 0.25 + 1e-4), abs=1e-6)
    assert found.describe() == (
        "32 x 32, 1 frame\nPSNR 20.00 dB\nSSIM 0.9836\nlargest difference 0.100 of 1; the map shows differences x 8"
    )


def test_equal_pictures(compare, metrics):
    image, _ = pictures(2, 20, 24, 3)
    text, sheet = compare(image, image.clone())
    assert "PSNR equal\nSSIM 1.0000 mean, 1.0000 lowest" in text and "largest difference 0.000" in text
    assert torch.all(sheet[:, -20:, -24:] == 0)
    assert metrics.compare(image, image)[0].psnr.tolist() == [math.inf] * 2


def test_a_clip_gives_mean_and_lowest(compare, metrics):
    image, teacher = pictures(4, 24, 24, 3)
    image[2] = (teacher[2] + 0.5).clamp(0, 1)
    image[3] = teacher[3]
    found, _ = metrics.compare(image, teacher)
    text, _ = compare(image, teacher)
    assert found.worst_frame == 2
    assert text.startswith("24 x 24, 4 frames\n")
    mean = float(found.psnr[:3].mean())
    assert f"PSNR {mean:.2f} dB mean, {found.psnr[2]:.2f} dB lowest (frame 3); 1 of 4 frames are equal" in text
    assert f"SSIM {found.ssim.mean():.4f} mean, {found.ssim[2]:.4f} lowest (frame 3)" in text


def test_the_sheet_holds_teacher_image_and_amplified_difference(compare):
    image, teacher = pictures(2, 30, 40, 3, noise=0.03)
    _, sheet = compare(image, teacher)
    assert sheet.shape[0] == 2 and sheet.shape[3] == 3 and float(sheet.min()) >= 0 and float(sheet.max()) <= 1
    assert torch.equal(sheet[:, -30:, :40], teacher)
    gap = (sheet.shape[2] - 3 * 40) // 2
    assert torch.equal(sheet[:, -30:, 40 + gap : 80 + gap], image)
    assert torch.allclose(sheet[:, -30:, -40:], ((image - teacher).abs() * 8).clamp(0, 1))
    assert sheet[:, :-30].std() > 0, "the caption is drawn"


def test_what_is_saved_is_compared(compare):
    """Alpha does not count, values beyond 0 to 1 are clipped, NaN is black and said."""
    image, teacher = pictures(1, 16, 16, 4)
    assert compare(image, teacher)[0] == compare(image[..., :3], teacher[..., :3])[0]
    beyond = torch.where(teacher > 0.9, 1.7, teacher)
    assert compare(beyond, teacher)[0] == compare(beyond.clamp(max=1), teacher)[0]
    broken = image.clone()
    broken[0, 0, 0] = float("nan")
    black = torch.where(broken.isnan(), 0.0, broken)
    assert compare(broken, teacher)[0] == (
        compare(black, teacher)[0] + "\nthe image holds values that are no numbers; they count as black"
    )


@pytest.mark.parametrize(
    ("image", "teacher", "words"),
    [
        ((1, 32, 48, 3), (1, 32, 32, 3), "the image is 48 x 32, 1 frame and the teacher 32 x 32, 1 frame; render both"),
        ((5, 32, 32, 3), (4, 32, 32, 3), "the image is 32 x 32, 5 frames and the teacher 32 x 32, 4 frames"),
        (
            (1, 10, 32, 3),
            (1, 10, 32, 3),
            "SSIM needs pictures of at least 11 pixels a side, these are 32 x 10, 1 frame",
        ),
    ],
)
def test_wrong_input_is_one_sentence(compare, image, teacher, words):
    with pytest.raises(ValueError) as error:
        compare(torch.zeros(image), torch.zeros(teacher))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_node_shows_its_text_and_the_worst_frame(comfy, monkeypatch):
    import types

    import server

    sent = []
    fake = types.SimpleNamespace(send_sync=lambda _, status, __: sent.append((status["node"], status["text"])))
    monkeypatch.setattr(server.PromptServer, "instance", fake, raising=False)
    cls = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeCompare"].PREPARE_CLASS_CLONE({"hidden_inputs": {"UNIQUE_ID": "9"}})
    image, teacher = pictures(3, 16, 16, 3)
    output = cls.EXECUTE_NORMALIZED(image=image, teacher=teacher)
    assert sent == [("9", output.args[0])] and output.ui["text"] == (output.args[0],)
    assert len(output.ui["images"]) == 1
