"""Load Linearized Attention: a student's file, from disk or from the Hub, onto a model."""

from dataclasses import replace

from comfy_api.latest import io

from .. import patching
from ..attention.hub.download import parse_hub_file
from ..attention.students.candidates import Candidates
from ..attention.students.clear_weights import published_radius
from ..attention.students.file import load_student
from ..attention.students.fit import check_student
from . import model_files
from .apply import apply_student
from .sentences import answer
from .sockets import CATEGORY, EXPERIMENTAL, AttentionStudent

NO_FILE = "none"


class LinearizeLoadStudent(io.ComfyNode):
    """Checks a file against the model before it touches anything."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeLoadStudent",
            display_name="Load Linearized Attention",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Loads distilled attention that others share, as one file: its plan, its learned "
            "parameters and its changes to weights. LoRAs before and after keep working.",
            search_aliases=[
                "load student",
                "distilled attention",
                "linear attention weights",
                "sparse attention",
                "加载",
                "加速",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model the student was distilled from, or a fine-tune of it."),
                io.Combo.Input(
                    "student",
                    options=[NO_FILE, *model_files.local_files()],
                    default=NO_FILE,
                    tooltip="A file in models/linearize.",
                ),
                io.String.Input(
                    "hub_file",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A file on the Hugging Face Hub instead, written owner/repo/file.safetensors or with "
                    "@revision behind it.",
                ),
                io.Boolean.Input(
                    "allow_download",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Lets hub_file be downloaded when it is not there. Nothing is downloaded otherwise.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The patched model."),
                AttentionStudent.Output(tooltip="The student, for Apply Linearized Attention on another model."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, student: str, hub_file: str = "", allow_download: bool = False) -> io.NodeOutput:
        """Return the patched model and the student."""
        host, module = patching.host_of(model)  # an unknown model is refused before anything is fetched
        path = model_files.student_path("" if student == NO_FILE else student, hub_file.strip(), allow_download)
        if published_radius(path.name) is not None and path.name in model_files.published_files():
            raise ValueError(f"{path.name} is one of CLEAR's own files; choose it under weights of CLEAR Attention")
        file, origin = model_files.read_identified(path, load_student)
        specs = check_student(file, host.name, host.sites(module))
        loaded = Candidates.of_student(replace(file, origin=origin), specs)
        return io.NodeOutput(apply_student(model, loaded, cls.hidden.unique_id), loaded)

    @classmethod
    def validate_inputs(cls, student: str = NO_FILE, hub_file: str = ""):
        """Return whether there is such a file, and hub_file can be one; other systems have other slashes."""
        there = model_files.is_choice(student, NO_FILE)
        return answer(parse_hub_file, hub_file) if there is True and (hub_file or "").strip() else there

    @classmethod
    def fingerprint_inputs(cls, model=None, student: str = NO_FILE, hub_file: str = "", allow_download: bool = False):
        """Return what changes when the file changes."""
        return student, hub_file, model_files.state("" if student == NO_FILE else student)
