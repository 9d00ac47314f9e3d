"""Generate Teacher Samples: samples the untouched model and keeps the results for distillation."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from .. import patching
from ..attention.checks import MOST_SEED
from ..attention.words import counted
from ..patching.patcher import model_fingerprint
from ..training.comfyui.conditioning import ready_conditioning
from ..training.comfyui.identity import model_digest
from ..training.comfyui.sampling import Order, describe_samples, generate_samples, latent_shape
from ..training.samples.folder import TeacherSamples as Samples
from ..training.samples.index import INDEX, About
from . import node_status
from .latent_pictures import MOST_PICTURES, contact_sheet, decoded, vae_input
from .model_files import WINDOWS_NAMES
from .sentences import answer
from .sockets import CATEGORY_DISTILL, EXPERIMENTAL, TeacherSamples

FOLDER = "linearize"  # in ComfyUI's output folder
NAME = re.compile(r"\w([\w .-]{0,78}\w)?")
LISTS = ("prompts", "positive", "negative")  # inputs that take several values
ADVANCED = {"sampler_name": "euler", "scheduler": "simple", "guidance": 0.0, "first_seed": 0, "prompts_file": ""}


class LinearizeTeacherSamples(io.ComfyNode):
    """Samples prompts, and goes on where an earlier run stopped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeTeacherSamples",
            display_name="Generate Teacher Samples",
            category=CATEGORY_DISTILL,
            is_experimental=EXPERIMENTAL,
            description="Samples your prompts with the untouched model and keeps what came out, for distillation to "
            "learn from. What is finished is kept: run it again after a stop and it goes on; a finished folder "
            "returns at once.",
            search_aliases=["distillation data", "training samples", "dataset", "distill"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher: the model from before any Linearize node."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt per line; empty lines and lines that begin with # do not count. A list that "
                    "comes in has one prompt per entry.",
                ),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent of the size to sample at. Its batch does not count."
                ),
                io.String.Input(
                    "name",
                    default="teacher",
                    tooltip="Folder of the samples in output/linearize. Other settings need another name; prompts may "
                    "be added at the end.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder that reads the prompts."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Ready conditionings instead of prompts, one or a list: of models without a text encoder, "
                    "and those with reference pictures, control clips or a ControlNet.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative conditioning of all samples, or a list with one for each of positive. Used where "
                    "cfg is not 1; without one, clip reads an empty prompt.",
                ),
                *_sampling_inputs(),
            ],
            outputs=[
                TeacherSamples.Output(tooltip="The samples, for Distill Attention."),
                io.String.Output(display_name="text", tooltip="How many there are, their size, and where they lie."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        """Return the samples, made now or earlier."""
        one = ADVANCED | {name: _single(name, values) for name, values in inputs.items() if name not in LISTS}
        folder = samples_folder(one["name"])
        prompts = [*split_prompts(inputs["prompts"]), *read_prompts_file(one["prompts_file"])]
        positive, negative = ([each for each in inputs.get(name, ()) if each is not None] for name in LISTS[1:])
        order = _order(one, prompts, positive, negative)
        show = node_status.show_on_node(cls.hidden.unique_id)
        samples = generate_samples(one["model"], folder, order, show)
        text = describe_samples(samples)
        show(text)
        shown = {**ui.PreviewText(text).as_dict()}
        sheet = contact_sheet(partial(decoded, one["vae"]), newest(samples)) if one.get("vae") is not None else None
        if sheet is not None:
            shown |= ui.PreviewImage(sheet, cls=cls).as_dict()
        return io.NodeOutput(samples, text, ui=shown)

    @classmethod
    def validate_inputs(cls, name: list[Any] | None = None, prompts_file: list[Any] | None = None):
        """Return whether samples can have this name, and whether the file of prompts is there."""
        for check, values in ((samples_folder, name), (read_prompts_file, prompts_file)):
            found = answer(check, values[0]) if values else True
            if found is not True:
                return found
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: list[Any]) -> tuple[Any, ...]:
        """Return what changes when the folder or the file of prompts does."""
        name, file = (str((inputs.get(each) or [""])[0]) for each in ("name", "prompts_file"))
        paths = [samples_folder(name) / INDEX, *([prompts_path(file)] if file.strip() else [])]
        return tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None for path in paths)


def _sampling_inputs() -> list[Any]:
    """Return the inputs that say how samples are made."""
    return [
        io.Int.Input("seeds", default=1, min=1, max=10000, tooltip="Samples per prompt."),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of each sampling, as you use the model."),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Strength of the negative prompt; 1 leaves it out, as FLUX needs.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            default=ADVANCED["sampler_name"],
            optional=True,
            advanced=True,
            tooltip="The sampler, as you use the model.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default=ADVANCED["scheduler"],
            optional=True,
            advanced=True,
            tooltip="How the noise is taken away over the steps, as you use the model.",
        ),
        io.Float.Input(
            "guidance",
            default=ADVANCED["guidance"],
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Guidance of models that have it built in, such as FLUX. 0 takes the model's usual value, 3.5 for "
            "FLUX.1. A conditioning that has its own keeps it.",
        ),
        io.Int.Input(
            "first_seed",
            default=ADVANCED["first_seed"],
            min=0,
            max=MOST_SEED,
            optional=True,
            advanced=True,
            tooltip="Seed of the first sample; each further sample takes the next one.",
        ),
        io.String.Input(
            "prompts_file",
            default=ADVANCED["prompts_file"],
            optional=True,
            advanced=True,
            tooltip="A .txt file in ComfyUI's input folder with more prompts, one per line.",
        ),
        vae_input("the newest samples"),
    ]


def newest(samples: Samples) -> list[Tensor]:
    """Return the latents of the last samples of a folder, as ComfyUI's sampler gave them."""
    return [samples.latent(entry.number) for entry in samples.entries[-MOST_PICTURES:]]


def _single(name: str, values: list[Any]) -> Any:
    """Return the one value of an input that comes as a list.

    Raises:
        ValueError: there are several.
    """
    if len(values) != 1:
        raise ValueError(f"{name} takes one value, got {len(values)}; only prompts, positive and negative take a list")
    return values[0]


def _order(one: dict[str, Any], prompts: list[str], positive: list[Any], negative: list[Any]) -> Order:
    """Return what is to be made, from the node's inputs.

    Raises:
        ValueError: an input is missing, or two contradict each other; one sentence.
    """
    model, clip = one["model"], one.get("clip")
    host, _ = patching.host_of(model)
    if patching.runtime_of(model) is not None:
        raise ValueError(
            "this model runs linearized attention, and samples come from the teacher; wire the model from before the "
            "Linearize node"
        )
    if prompts and positive:
        raise ValueError("samples are made of prompts or of positive, got both; clear the prompts or unplug positive")
    if not prompts and not positive:
        raise ValueError("there are no prompts; write one per line, or wire a conditioning to positive")
    if prompts and clip is None:
        raise ValueError("prompts need a text encoder; wire one to clip, or a conditioning to positive instead")
    about = About(
        host=host.name,
        fingerprint=model_fingerprint(model),
        latent_shape=latent_shape(model, one["latent_image"]),
        sampler=one["sampler_name"],
        scheduler=one["scheduler"],
        steps=one["steps"],
        cfg=float(one["cfg"]),
        guidance=float(one["guidance"]),
        seeds=one["seeds"],
        first_seed=one["first_seed"],
        base_model=_file_name(model),
        model=model_digest(model),
    )
    if about.uses_negative and len(negative) > 1 and len(negative) != len(positive):
        raise ValueError(
            f"negative is one conditioning for all samples or one for each of positive, got {len(negative)} for "
            f"{counted(len(positive), 'ready conditioning')}"
        )
    if about.uses_negative and not negative and clip is None:
        raise ValueError(f"cfg {about.cfg} needs a negative conditioning; wire one to negative, or set cfg to 1")
    return Order(
        about,
        prompts,
        [ready_conditioning(each, about.guidance) for each in positive],
        [ready_conditioning(each, about.guidance) for each in negative if about.uses_negative],
        None if clip is None else lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text)),
    )


def _file_name(model: Any) -> str:
    """Return the name of the file that a core loader took the model from, empty where another one did."""
    made = getattr(model, "cached_patcher_init", None)
    source = made[1][0] if made and made[1] else None
    return Path(source).name if isinstance(source, (str, Path)) else ""


def split_prompts(texts: list[str]) -> list[str]:
    """Return the prompts of one text, a line each, or of a list, an entry each."""
    lines = texts[0].splitlines() if len(texts) == 1 else [" ".join(text.split()) for text in texts]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def prompts_path(name: str) -> Path:
    """Return the path of a file of prompts by its name below ComfyUI's input folder.

    Raises:
        ValueError: it lies elsewhere, or is no .txt file.
    """
    base = Path(folder_paths.get_input_directory()).resolve()
    try:
        # it may have been written on another system
        path = (base / name.strip().replace("\\", "/")).resolve()
    except (OSError, ValueError):
        path = base
    if not path.is_relative_to(base) or path.suffix.lower() != ".txt":
        raise ValueError(f"prompts_file is the name of a .txt file in ComfyUI's input folder, got {name!r}")
    return path


def read_prompts_file(name: str) -> list[str]:
    """Return the prompts of a file in ComfyUI's input folder; none where no file is named.

    Raises:
        ValueError: there is no such file, or it is no text; one sentence.
    """
    if not name.strip():
        return []
    path = prompts_path(name)
    try:
        return split_prompts([path.read_text(encoding="utf-8-sig")])
    except OSError:
        raise ValueError(f"there is no {name.strip()} in ComfyUI's input folder; put it there") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name.strip()} is no UTF-8 text; save it as UTF-8") from None


def samples_folder(name: str) -> Path:
    """Return the folder of samples by its name.

    Raises:
        ValueError: the name is none that every system takes.
    """
    if not NAME.fullmatch(name) or WINDOWS_NAMES.fullmatch(name):
        raise ValueError(
            f"name is one of letters, digits, spaces and . _ - inside, at most 80 characters, got {name[:100]!r}; "
            "for example flux-1024"
        )
    return Path(folder_paths.get_output_directory()) / FOLDER / name
