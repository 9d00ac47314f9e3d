"""The pack's own socket types, and the categories of its menu."""

from comfy_api.latest import io

AttentionPlan = io.Custom("ATTENTION_PLAN")
AttentionStudent = io.Custom("ATTENTION_STUDENT")

CATEGORY = "linearize"
CATEGORY_PLAN = "linearize/plan"
CATEGORY_INSPECT = "linearize/inspect"
