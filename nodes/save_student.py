"""Save Linearized Attention: a distilled student as one file that Load Linearized Attention takes."""

import contextlib
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui

from ..attention.hub.model_card import describe_student
from ..attention.students.candidates import Candidates, decided
from ..attention.students.file import ROLES, StudentFile, save_student, unfinished_stages
from ..attention.words import file_size
from . import model_files, node_status
from .sentences import answer
from .sockets import CATEGORY_DISTILL, EXPERIMENTAL, AttentionStudent

AS_DISTILLED = "auto"


class LinearizeSaveStudent(io.ComfyNode):
    """Writes a new file, never over another one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeSaveStudent",
            display_name="Save Linearized Attention",
            category=CATEGORY_DISTILL,
            is_experimental=EXPERIMENTAL,
            description="Saves distilled attention as one file in models/linearize, where Load Linearized Attention "
            "finds it. A number is added to the name, so nothing is ever replaced.",
            search_aliases=["save student", "export linear attention", "save distilled attention"],
            is_output_node=True,
            inputs=[
                AttentionStudent.Input(
                    "student", tooltip="From Distill Attention, Budget Plan or Fine-tune Student, or a loaded one."
                ),
                io.String.Input(
                    "name",
                    default="linearized",
                    tooltip="Name of the file, a folder before it if you like: wan/high. The rest is added: "
                    "_00001_.safetensors.",
                ),
                io.String.Input(
                    "base_model",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What it was distilled from, best as on the Hub: black-forest-labs/FLUX.1-dev. Empty keeps "
                    "what the student says.",
                ),
                io.String.Input(
                    "licence",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Licence of the weights, such as apache-2.0; that of the base model binds you too. Empty "
                    "keeps what the student says.",
                ),
                io.Combo.Input(
                    "role",
                    options=[AS_DISTILLED, *ROLES],
                    default=AS_DISTILLED,
                    optional=True,
                    advanced=True,
                    tooltip="Which half of a model that is split by noise level, such as Wan 2.2, this is for: high, "
                    "low, or all. auto keeps what the student says.",
                ),
                io.String.Input(
                    "pair_id",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A word that both halves of such a model share, so that they are known as a pair.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The file, what it holds, and how to load it.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name: str = "linearized"):
        """Return whether a file can have this name."""
        return answer(model_files.check_name, name)

    @classmethod
    def execute(
        cls,
        student: Candidates,
        name: str,
        base_model: str = "",
        licence: str = "",
        role: str = AS_DISTILLED,
        pair_id: str = "",
    ) -> io.NodeOutput:
        """Write the file and return a text about it."""
        one, note = decided(student)
        given = {"base_model": base_model, "licence": licence, "pair_id": pair_id}
        given = {key: value.strip() for key, value in given.items() if value.strip()}
        given |= {} if role == AS_DISTILLED else {"role": role}
        saved = replace(one.student(), **given)
        stem = "/".join(model_files.check_name(name))
        path = _save_under_new_name(f"{stem}_unfinished" if unfinished_stages(saved.recipe) else stem, saved)
        lines = [
            f"saved {path}, {file_size(path.stat().st_size)}",
            *describe_student(saved),
            *filter(None, (note,)),
            f"to use it: Load Linearized Attention, student {model_files.shown_name(path)} (press R to renew its list)",
        ]
        text = "\n".join(lines)
        node_status.show_on_node(cls.hidden.unique_id)(text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _save_under_new_name(name: str, student: StudentFile) -> Path:
    while True:
        path = model_files.new_path(name)
        # another server may take the same number meanwhile
        with contextlib.suppress(FileExistsError):
            save_student(path, student, replace=False)
            return path
