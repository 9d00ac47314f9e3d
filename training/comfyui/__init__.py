"""ComfyUI's models, samplers and conditionings in the form that training needs."""
