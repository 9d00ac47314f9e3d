"""Publish to Hub: shows a student's file and its model card, and sends them only when asked."""

from io import BytesIO
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..attention.atomic_file import whole_file
from ..attention.hub.publish import CARD, Publication, check_repository, describe_publication, prepare, publish
from . import model_files, node_status
from .sentences import answer
from .sockets import CATEGORY_DISTILL, EXPERIMENTAL

NO_FILE = "none"

MOST_PICTURE_PIXELS = 1600


class LinearizePublish(io.ComfyNode):
    """Writes the card into the output folder; touches the network only with `dry_run` off."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizePublish",
            display_name="Publish to Hub",
            category=CATEGORY_DISTILL,
            is_experimental=EXPERIMENTAL,
            description="Uploads a saved student and a model card to the Hugging Face Hub. As long as dry_run is on "
            "nothing is sent: the card is written into the output folder, and the text says what would be uploaded.",
            search_aliases=["upload student", "hugging face", "share weights", "model card"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "student",
                    options=[NO_FILE, *model_files.local_files()],
                    default=NO_FILE,
                    tooltip="A file in models/linearize, from Save Linearized Attention.",
                ),
                io.String.Input("repo_id", default="", tooltip="Where it goes on the Hub: owner/name."),
                io.Boolean.Input(
                    "private",
                    default=True,
                    tooltip="Makes a new repository that only you see. One that is there keeps its setting; a public "
                    "one is refused while this is on.",
                ),
                io.Boolean.Input(
                    "dry_run",
                    default=True,
                    tooltip="Sends nothing. Switched off, the file is uploaded with the login of this machine (hf auth "
                    "login).",
                ),
                io.Boolean.Input(
                    "replace_card",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Writes the card anew where the repository has one. Off keeps what you wrote there.",
                ),
                io.Image.Input(
                    "picture",
                    optional=True,
                    tooltip="A picture for the card, best the sheet of Compare with Teacher. It is stored beside the "
                    "file without any metadata.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="What was or would be uploaded, and the card.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, student: str, repo_id: str, private: bool, dry_run: bool, replace_card: bool = False, picture=None
    ) -> io.NodeOutput:
        """Return what was or would be uploaded."""
        path = None if student == NO_FILE else model_files.find(student)
        if path is None:
            raise ValueError(f"choose a student to publish, one of those in models/linearize; got {student!r}")
        publication = prepare(path, repo_id, b"" if picture is None else as_jpeg(picture))
        card = write_card(publication)
        if dry_run:
            first = "dry run, nothing was sent; switch dry_run off to publish"
        else:
            first = f"published: {publish(publication, private=private, replace_card=replace_card)}"
        text = f"{first}\n{describe_publication(publication, private, card)}"
        node_status.show_on_node(cls.hidden.unique_id)(first)
        return io.NodeOutput(text, ui=ui.PreviewText(text))

    @classmethod
    def validate_inputs(cls, student: str = NO_FILE, repo_id: str | None = None):
        """Return whether there is such a file and such a name on the Hub; other systems have other slashes."""
        there = model_files.is_choice(student, NO_FILE)
        return answer(check_repository, repo_id) if there is True and repo_id is not None else there

    @classmethod
    def fingerprint_inputs(cls, student: str = NO_FILE, **_):
        """Return what changes when the file changes."""
        return model_files.state("" if student == NO_FILE else student)


def write_card(publication: Publication) -> Path:
    """Write the card into ComfyUI's output folder and return its path."""
    folder = Path(folder_paths.get_output_directory()) / "linearize" / "hub" / publication.file.repo.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CARD
    with whole_file(path) as file:
        file.write(publication.card.encode())
    if publication.picture:
        with whole_file(folder / Path(publication.picture_name).name) as file:
            file.write(publication.picture)
    return path


def as_jpeg(pictures: Tensor) -> bytes:
    """Return the first of (B, H, W, C) pictures, 0 to 1, as a JPEG without metadata, MOST_PICTURE_PIXELS a side."""
    image = Image.fromarray((pictures[0].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()[..., :3])
    image.thumbnail((MOST_PICTURE_PIXELS, MOST_PICTURE_PIXELS))
    stream = BytesIO()
    image.save(stream, "JPEG", quality=85, optimize=True)
    return stream.getvalue()
