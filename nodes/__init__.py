"""The nodes ComfyUI shows. Each builds a configuration, calls one function and returns; ids are for ever."""

from comfy_api.latest import ComfyExtension, io

from ..patching.receipt import watch_prompts
from .budget_plan import LinearizeBudgetPlan
from .calibrate import LinearizeCalibrate
from .clear import LinearizeCLEAR
from .compare import LinearizeCompare
from .finetune import LinearizeFinetune
from .foveated import LinearizeFoveated
from .high_res import LinearizeHighRes
from .linear import LinearizeHybrid, LinearizeLinear
from .load_student import LinearizeLoadStudent
from .model_files import register_folder
from .plan import LinearizeApply, LinearizeUniformPlan
from .publish import LinearizePublish
from .report import LinearizeReport
from .save_student import LinearizeSaveStudent
from .sentences import with_sentences
from .site_errors import LinearizeSiteErrors
from .teacher_samples import LinearizeTeacherSamples
from .transfer import LinearizeTransfer

register_folder()


class LinearizeExtension(ComfyExtension):
    """The pack, in the order of its menu."""

    async def on_load(self) -> None:
        """Start noting prompts, for the receipts in saved pictures."""
        watch_prompts()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        nodes = (
            LinearizeCalibrate,
            LinearizeFoveated,
            LinearizeCLEAR,
            LinearizeHybrid,
            LinearizeLinear,
            LinearizeLoadStudent,
            LinearizeApply,
            LinearizeUniformPlan,
            LinearizeBudgetPlan,
            LinearizeTeacherSamples,
            LinearizeTransfer,
            LinearizeFinetune,
            LinearizeSaveStudent,
            LinearizePublish,
            LinearizeReport,
            LinearizeCompare,
            LinearizeSiteErrors,
            LinearizeHighRes,
        )
        return [with_sentences(node) for node in nodes]
