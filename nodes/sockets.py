"""The pack's own socket types, and the categories of its menu."""

from comfy_api.latest import io

AttentionPlan = io.Custom("ATTENTION_PLAN")

CATEGORY = "linearize"
CATEGORY_INSPECT = "linearize/inspect"
