"""ComfyUI's models, samplers and conditionings as what training needs."""
