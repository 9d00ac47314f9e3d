"""The templates' thumbnails: the model's name, the size, and what the node does, readable at 300 pixels.

A template list shows them small and side by side, where pictures of graphs all look alike.
"""

from PIL import Image, ImageDraw, ImageFont

SIZE = 640, 400
BACK, TEXT, QUIET = (24, 27, 34), (240, 242, 246), (160, 168, 182)
KINDS = {  # badge: its colour
    "FOVEATED": (214, 72, 72),
    "CLEAR WINDOWS": (46, 110, 200),
    "HYBRID": (178, 120, 30),
    "DISTIL": (70, 150, 90),
    "CALIBRATE": (128, 90, 190),
}
CARDS = {  # template: (model, what is made, badge)
    "side_by_side": ("Side by side", "dense, foveated, windows: the demo", "FOVEATED"),
    "flux_dev_calibrate": ("FLUX.1 dev", "what is fastest here, 1024 x 1024", "CALIBRATE"),
    "wan22_t2v_calibrate": ("Wan 2.2 14B T2V", "what is fastest here, 640 x 640", "CALIBRATE"),
    "flux_dev_clear": ("FLUX.1 dev", "picture, 1024 x 1024", "CLEAR WINDOWS"),
    "flux_dev_clear_2k": ("FLUX.1 dev 2K", "picture, 2048 x 2048", "CLEAR WINDOWS"),
    "flux_dev_lora_clear": ("FLUX.1 dev + LoRA", "picture, 1024 x 1024", "CLEAR WINDOWS"),
    "flux_schnell_clear": ("FLUX.1 schnell", "picture, 1024 x 1024, 4 steps", "CLEAR WINDOWS"),
    "flux_dev_high_res": ("FLUX.1 dev 2K", "two passes, 2048 x 2048", "CLEAR WINDOWS"),
    "flux_dev_high_res_4k": ("FLUX.1 dev 4K", "three passes, 4096 x 4096", "CLEAR WINDOWS"),
    "flux_dev_distill": ("FLUX.1 dev", "train a student, save it", "DISTIL"),
    "wan21_t2v_distill": ("Wan 2.1 1.3B", "train a student, save it", "DISTIL"),
    "wan21_t2v_hybrid": ("Wan 2.1 1.3B", "text to video, 832 x 480", "HYBRID"),
    "wan21_t2v_foveated": ("Wan 2.1 1.3B", "text to video, 832 x 480", "FOVEATED"),
    "wan22_t2v_foveated": ("Wan 2.2 14B T2V", "text to video, 640 x 640", "FOVEATED"),
    "wan22_i2v_foveated": ("Wan 2.2 14B I2V", "picture to video, 640 x 640", "FOVEATED"),
    "hunyuan_video_foveated": ("HunyuanVideo", "text to video, 848 x 480", "FOVEATED"),
    "ltx_video_foveated": ("LTX-Video", "text to video, 768 x 512", "FOVEATED"),
    "qwen_image_foveated": ("Qwen-Image", "picture, 1328 x 1328", "FOVEATED"),
    "z_image_foveated": ("Z-Image Turbo", "picture, 1024 x 1024, 8 steps", "FOVEATED"),
    "flux2_foveated": ("FLUX.2 Klein", "picture, 1024 x 1024", "FOVEATED"),
    "flux_kontext_foveated": ("FLUX.1 Kontext", "edit a picture", "FOVEATED"),
    "sd35_foveated": ("SD 3.5 Large", "picture, 1024 x 1024", "FOVEATED"),
}


def draw_thumbnail(name: str, graph: Image.Image) -> Image.Image:
    """Return a template's thumbnail.

    Args:
        name: of the template, one of CARDS.
        graph: a picture of its graph, shown faintly below the words.
    """
    model, made, badge = CARDS[name]
    card = Image.new("RGB", SIZE, BACK)
    small = graph.convert("RGB")
    small.thumbnail((SIZE[0] - 40, 150))
    card.paste(Image.blend(Image.new("RGB", small.size, BACK), small, 0.6), (20, SIZE[1] - small.height - 16))
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, 14, SIZE[1]), fill=KINDS[badge])
    draw.text((40, 30), model, fill=TEXT, font=_fitting(model, 64))
    draw.text((40, 112), made, fill=QUIET, font=_fitting(made, 36))
    font = ImageFont.load_default(30)
    draw.rounded_rectangle((40, 170, 40 + draw.textlength(badge, font) + 40, 222), 26, fill=KINDS[badge])
    draw.text((60, 178), badge, fill=TEXT, font=font)
    return card


def _fitting(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the largest font up to a size in which a text fits the card."""
    while (font := ImageFont.load_default(size)).getlength(text) > SIZE[0] - 60:
        size -= 2
    return font
