"""Compare with Teacher: how far a picture is from the one the untouched model makes."""

from comfy_api.latest import io, ui

from . import node_status
from .picture_metrics import compare
from .sockets import CATEGORY_INSPECT, EXPERIMENTAL


class LinearizeCompare(io.ComfyNode):
    """Shows PSNR, SSIM and a sheet; changes nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeCompare",
            display_name="Compare with Teacher",
            category=CATEGORY_INSPECT,
            is_experimental=EXPERIMENTAL,
            description="Measures how far a picture is from the one that the untouched model makes with the same seed: "
            "PSNR, SSIM and a map of the difference.",
            search_aliases=["psnr", "ssim", "image difference", "compare images"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The picture to judge, or the frames of a clip."),
                io.Image.Input(
                    "teacher",
                    tooltip="The picture of the untouched model: same prompt, seed, size and number of frames.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The measures."),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="Teacher, image and amplified difference side by side, per frame.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, teacher) -> io.NodeOutput:
        """Return the measures and the sheet; the node shows the worst frame."""
        measures, sheet = compare(image, teacher)
        text = measures.describe()
        node_status.show_on_node(cls.hidden.unique_id)(text)
        worst = sheet[measures.worst_frame : measures.worst_frame + 1]
        return io.NodeOutput(
            text, sheet, ui={**ui.PreviewText(text).as_dict(), **ui.PreviewImage(worst, cls=cls).as_dict()}
        )
