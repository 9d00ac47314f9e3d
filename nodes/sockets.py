"""The pack's own socket types, the categories of its menu, and how finished its nodes are called."""

from comfy_api.latest import io

AttentionPlan = io.Custom("ATTENTION_PLAN")
AttentionStudent = io.Custom("ATTENTION_STUDENT")
TeacherSamples = io.Custom("TEACHER_SAMPLES")

EXPERIMENTAL = True  # on every node, until a GPU and a released model were measured

CATEGORY = "linearize"
CATEGORY_PLAN = "linearize/plan"
CATEGORY_DISTILL = "linearize/distill"
CATEGORY_INSPECT = "linearize/inspect"
