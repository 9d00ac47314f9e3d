"""How the shipped workflows look in the interface, and where their model files come from.

Data only; `workflows.py` applies it. A workflow's note lies beside its API form, as a page of the same name.
"""

HUB = "https://huggingface.co"
ENCODERS = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
QWEN_IMAGE = f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
Z_IMAGE = f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files"
WAN_21 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN_22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN_VIDEO = f"{HUB}/Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
MODELS = {  # file: (address, models folder)
    "flux1-dev.safetensors": (
        f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
        "diffusion_models",
    ),
    "flux1-dev-fp8-e4m3fn.safetensors": (
        f"{HUB}/Kijai/flux-fp8/resolve/main/flux1-dev-fp8-e4m3fn.safetensors",
        "diffusion_models",
    ),
    "flux1-schnell.safetensors": (
        f"{HUB}/Comfy-Org/flux1-schnell/resolve/main/flux1-schnell.safetensors",
        "diffusion_models",
    ),
    "flux1-dev-kontext_fp8_scaled.safetensors": (
        f"{HUB}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/"
        "flux1-dev-kontext_fp8_scaled.safetensors",
        "diffusion_models",
    ),
    "flux-2-klein-base-4b.safetensors": (
        f"{HUB}/Comfy-Org/flux2-klein/resolve/main/split_files/diffusion_models/flux-2-klein-base-4b.safetensors",
        "diffusion_models",
    ),
    "flux2-vae.safetensors": (
        f"{HUB}/Comfy-Org/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors",
        "vae",
    ),
    "qwen_image_fp8_e4m3fn.safetensors": (
        f"{QWEN_IMAGE}/diffusion_models/qwen_image_fp8_e4m3fn.safetensors",
        "diffusion_models",
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        f"{QWEN_IMAGE}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
        "text_encoders",
    ),
    "qwen_image_vae.safetensors": (f"{QWEN_IMAGE}/vae/qwen_image_vae.safetensors", "vae"),
    "z_image_turbo_bf16.safetensors": (
        f"{Z_IMAGE}/diffusion_models/z_image_turbo_bf16.safetensors",
        "diffusion_models",
    ),
    "qwen_3_4b.safetensors": (f"{Z_IMAGE}/text_encoders/qwen_3_4b.safetensors", "text_encoders"),
    "t5xxl_fp8_e4m3fn.safetensors": (f"{ENCODERS}/t5xxl_fp8_e4m3fn.safetensors", "text_encoders"),
    "t5xxl_fp8_e4m3fn_scaled.safetensors": (f"{ENCODERS}/t5xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders"),
    "clip_l.safetensors": (f"{ENCODERS}/clip_l.safetensors", "text_encoders"),
    "ae.safetensors": (
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
        "vae",
    ),
    "wan2.1_t2v_1.3B_fp16.safetensors": (
        f"{WAN_21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
        "diffusion_models",
    ),
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": (
        f"{WAN_22}/diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "diffusion_models",
    ),
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": (
        f"{WAN_22}/diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        "diffusion_models",
    ),
    "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": (
        f"{WAN_22}/diffusion_models/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        "diffusion_models",
    ),
    "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": (
        f"{WAN_22}/diffusion_models/wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
        "diffusion_models",
    ),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
        f"{WAN_21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "text_encoders",
    ),
    "wan_2.1_vae.safetensors": (f"{WAN_22}/vae/wan_2.1_vae.safetensors", "vae"),
    "sd3.5_large_fp8_scaled.safetensors": (
        f"{HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/sd3.5_large_fp8_scaled.safetensors",
        "checkpoints",
    ),
    "hunyuan_video_t2v_720p_bf16.safetensors": (
        f"{HUNYUAN_VIDEO}/diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors",
        "diffusion_models",
    ),
    "llava_llama3_fp8_scaled.safetensors": (
        f"{HUNYUAN_VIDEO}/text_encoders/llava_llama3_fp8_scaled.safetensors",
        "text_encoders",
    ),
    "hunyuan_video_vae_bf16.safetensors": (f"{HUNYUAN_VIDEO}/vae/hunyuan_video_vae_bf16.safetensors", "vae"),
    "ltx-video-2b-v0.9.safetensors": (
        f"{HUB}/Lightricks/LTX-Video/resolve/main/ltx-video-2b-v0.9.safetensors",
        "checkpoints",
    ),
    "t5xxl_fp16.safetensors": (f"{ENCODERS}/t5xxl_fp16.safetensors", "text_encoders"),
    "clear_local_16.safetensors": (
        f"{HUB}/Huage001/CLEAR/resolve/main/clear_local_16.safetensors",
        "linearize",
    ),
}
TITLES = {  # workflow: titles of nodes by id, where their own would not tell them apart
    "lab/demo/nodes/workflows/side_by_side": {
        "10": "KSampler: dense",
        "7": "KSampler: foveated",
        "14": "KSampler: windows",
        "12": "Dense",
        "9": "Foveated",
        "16": "Windows",
        "17": "Compare Images: dense, foveated",
        "18": "Compare with Teacher: foveated",
    },
}
USERS_OWN = ("flux_lora.safetensors",)  # names that stand for a file that only the user has

SIZES = {  # type: (width, height); no height keeps what the frontend chose
    "MarkdownNote": (380, 560),
    "UNETLoader": (340, None),
    "CLIPTextEncode": (280, 200),
    "CheckpointLoaderSimple": (340, None),
    "KSampler": (300, 500),
    "KSamplerAdvanced": (300, 580),
    "SamplerCustom": (300, 490),
    "SamplerCustomAdvanced": (300, 370),
    "SaveVideo": (440, 340),
    "ImageCompare": (520, 600),
    "LossGraphNode": (340, 300),
    "LinearizeCLEAR": (400, 380),
    "LinearizeFoveated": (400, 430),
    "ModelSamplingSD3": (280, 58),
    "LoadImage": (300, 340),
    "LinearizeHighRes": (400, 420),
    "LinearizeReport": (440, 600),
    "LinearizeTeacherSamples": (280, 400),
    "LinearizeSaveStudent": (340, None),
    "LinearizeCompare": (440, 400),
    "PreviewImage": (280, 280),
    "SaveImage": (440, 320),
}
WIDTH = 280  # of other types; a node is as wide as the widest of its column

# columns from left to right, each `title: node ids` from top to bottom; neighbours of one title share a frame. The
# frontend opens a workflow so that all of it is seen, and below 0.6 of its size draws no texts: 2300 pixels of width
# fit a screen of 1920
LAYOUTS = {  # workflow: columns; `note` is the note
    "lab/demo/nodes/workflows/side_by_side": (
        "note",
        "Model and caption: 1 3 2 5 6",
        "Turn these: 4 13",
        "Sampling: 10 7",
        "Sampling: 14 11 8 15",
        "Pictures: 12 9 16",
        "Dense and foveated: 17 18",
    ),
    "lab/demo/clear_demo": ("1 2 3", "4 5 6", "7", "8 9", "10"),
    "lab/demo/foveated_demo": ("1 2 3", "4 5 6", "7", "8 9", "10"),
    "lab/demo/distill_demo": (
        "1 2 3 16",
        "Teacher: 4",
        "Candidates: 5 6 7",
        "Distil: 8 21 22",
        "Distil: 9 10",
        "Distil: 11 26",
        "Compare: 13 23 12",
        "Compare: 14 15",
        "Result: 17 18 19 20",
    ),
    "lab/demo/distill_clips": (
        "1 2 3 23",
        "Teacher: 4",
        "Candidates: 5 6 7",
        "Distil: 8 21 22",
        "Distil: 9 10",
        "Distil: 11 26",
        "Compare: 13 12",
        "Compare: 14 15",
        "Result: 17 18 19 20",
    ),
    "lab/demo/calibrate_demo": ("1 2 3", "5 6", "4 12", "7 8", "9 11", "10"),
    "workflows/flux_dev_calibrate": (
        "note",
        "1 2 3",
        "Prompt and size: 5 6 7",
        "Calibrate: 4 17",
        "Sampling: 8 9 10 11 12",
        "Result: 13 14",
        "Result: 16 15",
    ),
    "workflows/wan22_t2v_calibrate": (
        "note",
        "1 2 3 4",
        "Prompts: 9 10 11 5 6",
        "Calibrate both: 7 19",
        "Sampling: 12 13",
        "Result: 14 15 16 8",
        "Result: 17 18",
    ),
    "workflows/flux_dev_clear": (
        "note",
        "1 2 3",
        "Windows and prompt: 4 5",
        "Sampling: 7 6 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_dev_clear_2k": (
        "note",
        "1 2 3",
        "Windows and prompt: 4 5",
        "Sampling: 7 6 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_dev_distill": (
        "note",
        "1 2 3 4",
        "Samples and candidates: 5 6 7 8",
        "Distil: 9 12 10 11",
        "Fine-tune, save, prompt: 13 14 24 16 17",
        "Student and teacher: 15 18 19",
        "Result: 20 21 22 23",
    ),
    "workflows/wan21_t2v_distill": (
        "note",
        "1 4 2 3 6",
        "Samples and candidates: 7 8 9 10",
        "Distil: 11 14 12 13",
        "Fine-tune, save, negative prompt: 15 16 25 5",
        "Student: 17 18 19 20 21",
        "Result: 22 23 24",
    ),
    "workflows/flux_schnell_clear": (
        "note",
        "1 2 3",
        "Windows and prompt: 4 5",
        "Sampling: 7 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_dev_lora_clear": (
        "note",
        "1 2 3",
        "LoRA, windows and prompt: 16 4 5",
        "Sampling: 7 6 8 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_dev_high_res": (
        "note",
        "1 2 3 7 8",
        "Base picture: 4 10 5 9 6 11 12",
        "Enlarge: 13 14 15",
        "High resolution: 16 17",
        "High resolution: 18 19 20 21",
        "Result: 22 23",
    ),
    "workflows/flux_dev_high_res_4k": (
        "note",
        "1 2 3 7 8",
        "Base picture: 4 10 5 9 6 11 12",
        "Enlarge to 2048: 13 14 15",
        "Repaint at 2048: 16 17",
        "Repaint at 2048: 18 19 20 21",
        "Enlarge to 4096: 24 25 26",
        "Repaint at 4096: 27 28 29 30",
        "Result: 22 23",
    ),
    "workflows/wan21_t2v_foveated": (
        "note",
        "1 2 3",
        "Attention and prompts: 4 5",
        "Attention and prompts: 6 7",
        "Sampling: 8 9 10",
        "Result: 11 12 13",
    ),
    "workflows/wan21_t2v_hybrid": (
        "note",
        "1 2 3",
        "Plan and prompts: 4 5 6 7",
        "Plan and prompts: 8 9",
        "Sampling: 10 11 12",
        "Result: 13 14 15",
    ),
    "workflows/wan22_t2v_foveated": (
        "note",
        "1 2 3 4",
        "Attention, high and low noise: 5 7 6 8",
        "Prompts: 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15 16",
        "Result: 17 18",
    ),
    "workflows/sd35_foveated": (
        "note",
        "1",
        "Attention and prompts: 2 3 4",
        "Sampling: 5 6 7",
        "Result: 8 9",
    ),
    "workflows/hunyuan_video_foveated": (
        "note",
        "1 2 3",
        "Attention and prompt: 4 5 6",
        "Sampling: 8 7 9 10 11 12",
        "Sampling: 13 14",
        "Result: 15 16 17",
    ),
    "workflows/ltx_video_foveated": (
        "note",
        "1 2",
        "Attention and prompts: 3 4 5",
        "Sampling: 6 7 8 9",
        "Sampling: 10 11",
        "Result: 12 13 14",
    ),
    "workflows/qwen_image_foveated": (
        "note",
        "1 2 3",
        "Attention and prompts: 4 5",
        "Attention and prompts: 6 7",
        "Sampling: 8 9 10",
        "Result: 11 12",
    ),
    "workflows/z_image_foveated": (
        "note",
        "1 2 3",
        "Attention and prompt: 4 5 6 7",
        "Sampling: 8 9 10",
        "Result: 11 12",
    ),
    "workflows/flux2_foveated": (
        "note",
        "1 2 3",
        "Attention and prompts: 4 5 6",
        "Sampling: 7 8 9 10",
        "Sampling: 11 12 13",
        "Result: 14 15",
    ),
    "workflows/flux_kontext_foveated": (
        "note",
        "1 2 3",
        "Attention and prompt: 4 8",
        "Reference: 5 6 7 9 10 11",
        "Sampling: 12 13",
        "Result: 14 15",
    ),
    "workflows/wan22_i2v_foveated": (
        "note",
        "1 2 3 4",
        "Attention, high and low noise: 5 7 6 8",
        "Picture and prompts: 11 9 10 12",
        "Sampling: 13 14",
        "Result: 15 16 17",
        "Result: 18 19",
    ),
}
