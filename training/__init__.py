"""Distillation: a teacher's samples, the transfer of its attention, a plan under a budget, fine-tuning.

Modules named `comfy_*` know ComfyUI; everything else runs without it.
"""
