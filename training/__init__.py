"""Distillation: a teacher's samples, the transfer of its attention, a plan under a budget, fine-tuning.

Only `training/comfyui/` knows ComfyUI; everything else runs without it.
"""
