"""How the shipped workflows look in the interface: columns, frames, sizes; and where their model files come from.

Data only; `author_workflows.py` applies it. A workflow's note lies beside its API form, as a page of the same name.
"""

HUB = "https://huggingface.co"
ENCODERS = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
MODELS = {  # file: (address, models folder)
    "flux1-dev.safetensors": (
        f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
        "diffusion_models",
    ),
    "flux1-schnell.safetensors": (
        f"{HUB}/Comfy-Org/flux1-schnell/resolve/main/flux1-schnell.safetensors",
        "diffusion_models",
    ),
    "t5xxl_fp8_e4m3fn.safetensors": (f"{ENCODERS}/t5xxl_fp8_e4m3fn.safetensors", "text_encoders"),
    "clip_l.safetensors": (f"{ENCODERS}/clip_l.safetensors", "text_encoders"),
    "ae.safetensors": (
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
        "vae",
    ),
    "clear_local_16.safetensors": (
        f"{HUB}/Huage001/CLEAR/resolve/main/clear_local_16.safetensors",
        "linearize",
    ),
}
USERS_OWN = ("flux_lora.safetensors",)  # names that stand for a file that only the user has

SIZES = {  # type: (width, height); no height keeps what the frontend chose
    "MarkdownNote": (340, 360),
    "UNETLoader": (340, None),
    "CLIPTextEncode": (280, 200),
    "KSampler": (300, 500),
    "LinearizeCLEAR": (400, 380),
    "LinearizeHighRes": (400, 420),
    "LinearizeReport": (440, 600),
    "SaveImage": (440, 320),
}
WIDTH = 280  # of other types; a node is as wide as the widest of its column

# columns from left to right, each `title: node ids` from top to bottom; neighbours of one title share a frame. The
# frontend opens a workflow so that all of it is seen, and below 0.6 of its size draws no texts: 2300 pixels of width
# fit a screen of 1920
LAYOUTS = {  # workflow: columns; `note` is the note
    "demo/clear_demo": ("1 2 3", "4 5 6", "7", "8 9", "10"),
    "workflows/flux_dev_clear": (
        "note 1 2 3",
        "Windows and prompt: 4 5",
        "Sampling: 7 6 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_dev_clear_2k": (
        "note 1 2 3",
        "Windows and prompt: 4 5",
        "Sampling: 7 6 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_schnell_clear": (
        "note 1 2 3",
        "Windows and prompt: 4 5",
        "Sampling: 7 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_dev_lora_clear": (
        "note 1 2 3",
        "LoRA, windows and prompt: 16 4 5",
        "Sampling: 7 6 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_dev_high_res": (
        "note 1 2 3 7 8",
        "Base picture: 4 10 5 9 6 11 12",
        "Enlarge: 13 14 15",
        "High resolution: 16 17",
        "High resolution: 18 19 20 21",
        "Result: 22 23",
    ),
    "workflows/flux_dev_high_res_4k": (
        "note 1 2 3 7 8",
        "Base picture: 4 10 5 9 6 11 12",
        "Enlarge to 2048: 13 14 15",
        "Repaint at 2048: 16 17",
        "Repaint at 2048: 18 19 20 21",
        "Enlarge to 4096: 24 25 26",
        "Repaint at 4096: 27 28 29 30",
        "Result: 22 23",
    ),
}
