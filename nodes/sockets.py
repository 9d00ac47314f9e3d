"""The pack's own socket types, and the categories of its menu."""

from comfy_api.latest import io

AttentionPlan = io.Custom("ATTENTION_PLAN")
AttentionStudent = io.Custom("ATTENTION_STUDENT")
TeacherSamples = io.Custom("TEACHER_SAMPLES")

CATEGORY = "linearize"
CATEGORY_PLAN = "linearize/plan"
CATEGORY_DISTILL = "linearize/distill"
CATEGORY_INSPECT = "linearize/inspect"
