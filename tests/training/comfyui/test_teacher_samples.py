"""The node Generate Teacher Samples on tiny models, through ComfyUI's own sampler."""

from types import SimpleNamespace

import pytest
import torch

from linearize.attention.words import time_left

SIZE = (1, 16, 16, 24)
PROMPTS = "a lake\n\n  # not this\n a house \n"


class Clip:
    """Stands in for a text encoder: the text seeds the numbers, and what was read is noted."""

    def __init__(self, width=64, pooled=32):
        self.width, self.pooled, self.read = width, pooled, []

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        self.read.append(text)
        generator = torch.Generator().manual_seed(sum(text.encode()))
        tokens = torch.randn(1, 12, self.width, generator=generator)
        return [[tokens, {"pooled_output": torch.randn(1, self.pooled, generator=generator)}]]


@pytest.fixture(scope="module")
def flux(comfy):
    """The tiny FLUX as its loader gives it."""
    with torch.inference_mode():
        return comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", "default")[0]


@pytest.fixture
def studio(comfy, flux, tmp_path, monkeypatch):
    """The node with ComfyUI's folders elsewhere, and all that it showed."""
    import folder_paths

    for name in ("output", "input"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda name=name: str(tmp_path / name))
    shown = []
    patching = comfy.module("patching")
    monkeypatch.setattr(comfy.module("nodes.node_status"), "show_on_node", lambda *_: shown.append)
    schema = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeTeacherSamples"].define_schema()
    defaults = {each.id: each.default for each in schema.inputs if getattr(each, "default", None) is not None}
    defaults |= {"model": flux, "latent_image": {"samples": torch.zeros(SIZE)}, "steps": 2}

    def run(**inputs):
        """Run the node with inputs as ComfyUI gives them to a node of lists; return the samples and the text."""
        values = {name: value if isinstance(value, list) else [value] for name, value in {**defaults, **inputs}.items()}
        with torch.inference_mode():
            return comfy.node("LinearizeTeacherSamples")(**values).args

    def ksampler(seed, positive, cfg=1.0, negative=None, model=flux, latent=None):
        """Return what ComfyUI's own node makes."""
        empty = latent or {"samples": torch.zeros(SIZE)}
        with torch.inference_mode():
            (out,) = comfy.nodes.KSampler().sample(
                model, seed, 2, cfg, "euler", "simple", positive, negative or positive, empty, 1.0
            )
        return out["samples"]

    samples = comfy.module("training.samples.folder")
    sampling = comfy.module("training.comfyui.sampling")
    conditions = comfy.module("training.comfyui.conditioning")
    return SimpleNamespace(
        run=run, ksampler=ksampler, shown=shown, output=tmp_path / "output", input=tmp_path / "input",
        open=samples.TeacherSamples.open, sampling=sampling, conditions=conditions, patching=patching,
        node_status=comfy.module("nodes.node_status"),
    )  # fmt: skip


def test_samples_are_those_of_the_ksampler(studio, flux):
    clip = Clip()
    samples, text = studio.run(prompts=PROMPTS, clip=clip, seeds=2, first_seed=5)
    assert [each.prompt for each in samples.entries] == ["a lake", "a lake", "a house", "a house"]
    assert clip.read == ["a lake", "a house"]
    for number, entry in enumerate(samples.entries):
        positive = Clip().encode_from_tokens_scheduled(entry.prompt)
        assert torch.equal(samples.latent(number), studio.ksampler(5 + number, positive))
        assert entry.seed == 5 + number and entry.negative is None
        (found,) = studio.conditions.from_conditioning(samples.conditioning(number))
        assert torch.equal(found[0], positive[0][0])
        assert torch.equal(found[1]["pooled_output"], positive[0][1]["pooled_output"])
    folder = studio.output / "linearize" / "teacher"
    assert text.startswith("4 samples of 1 x 16 x 16 x 24, ") and text.endswith(f"MiB in {folder}")
    assert samples.about.base_model == "linearize_tiny_flux.safetensors" and samples.about.host == "flux"
    assert studio.open(folder).digest == samples.digest


def test_the_node_tells_how_many_how_large_and_how_long(studio, monkeypatch):
    studio.run(prompts=PROMPTS, clip=Clip())
    assert studio.shown[:2] == ["encoding prompt 1", "encoding prompt 2"]
    assert studio.shown[2].startswith("2 samples of 2 prompts, 2 to make; 0.1 MiB in ")
    assert studio.shown[3].startswith("1 sample finished of 2, 50 %, about ") and studio.shown[3].endswith(" s left")
    studio.shown.clear()
    studio.run(prompts=PROMPTS + "more", clip=Clip())
    assert studio.shown[1].startswith("3 samples of 3 prompts, 1 to make; ")
    for seconds, words in ((5, "about 5 s left"), (600, "about 10 min left"), (9000, "about 2.5 h left")):
        assert time_left(seconds) == words
    assert [studio.sampling.memory_size(size) for size in (2**19, 3 * 2**30)] == ["0.5 MiB", "3.0 GiB"]


def test_progress_counts_all_samples(studio, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0.0)
    studio.run(prompts=PROMPTS, clip=Clip())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_users_preview_is_shown(studio, monkeypatch):
    import latent_preview

    previews = []
    previewer = SimpleNamespace(decode_latent_to_preview_image=lambda kind, x0: previews.append(tuple(x0.shape)))
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: previewer)
    studio.run(prompts="a", clip=Clip())
    assert previews == [SIZE, SIZE]


def test_with_a_vae_the_newest_samples_are_shown(studio):
    decoded = []

    def decode(latent):
        decoded.append(tuple(latent.shape))
        return torch.zeros(1, 16, 24, 3)

    vae = SimpleNamespace(decode=decode, patcher=SimpleNamespace(load_device=torch.device("cpu")))
    studio.run(prompts=PROMPTS, clip=Clip(), vae=vae)
    assert decoded == [SIZE, SIZE]


def test_what_is_cancelled_goes_on_with_equal_latents(studio, monkeypatch):
    import comfy.model_management as management

    whole, _ = studio.run(prompts=PROMPTS, clip=Clip(), seeds=2, name="whole")

    shown = []

    def show(text):
        shown.append(text)
        if text.startswith("2 samples finished"):
            management.interrupt_current_processing(True)

    with monkeypatch.context() as patch:
        patch.setattr(studio.node_status, "show_on_node", lambda *_: show)
        with pytest.raises(management.InterruptProcessingException):
            studio.run(prompts=PROMPTS, clip=Clip(), seeds=2)
    assert shown[-1] == "cancelled after 2 of 4 samples, run again to go on"
    assert len(studio.open(studio.output / "linearize" / "teacher")) == 2
    clip = Clip()
    resumed, _ = studio.run(prompts=PROMPTS, clip=clip, seeds=2)
    assert clip.read == ["a house"], "what is finished is not read again"
    assert resumed.digest == whole.digest
    assert all(torch.equal(resumed.latent(number), whole.latent(number)) for number in range(4))


def test_a_finished_folder_returns_without_the_model(studio, monkeypatch):
    import comfy.model_management
    import comfy.sample

    first, _ = studio.run(prompts=PROMPTS, clip=Clip())

    def fail(*_, **__):
        raise AssertionError("the model was used")

    monkeypatch.setattr(comfy.sample, "sample", fail)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", fail)
    monkeypatch.setattr(Clip, "encode_from_tokens_scheduled", fail)
    again, text = studio.run(prompts=PROMPTS, clip=Clip())
    assert again.digest == first.digest and text.startswith("2 samples")


def test_ready_conditionings_instead_of_prompts(studio):
    positive = [Clip().encode_from_tokens_scheduled(text) for text in ("a", "b")]
    positive[1][0][1]["guidance"] = 2.0
    samples, _ = studio.run(positive=positive, guidance=4.0, seeds=2)
    assert [each.prompt for each in samples.entries] == [""] * 4
    assert [samples.conditioning(number).values["guidance"] for number in range(4)] == [4.0, 4.0, 2.0, 2.0]
    positive[0][0][1]["guidance"] = 4.0
    for number in range(4):
        assert torch.equal(samples.latent(number), studio.ksampler(number, positive[number // 2]))
    with pytest.raises(ValueError, match="sample 0 in .* was made from another conditioning; prompts may be added"):
        studio.run(positive=[positive[1], positive[0]], guidance=4.0, seeds=2)


def test_above_cfg_1_the_negative_is_kept(studio):
    negative = Clip().encode_from_tokens_scheduled("ugly")
    positive = Clip().encode_from_tokens_scheduled("a")
    samples, _ = studio.run(prompts="a", clip=Clip(), cfg=3.0, negative=[negative])
    assert samples.has_negative
    assert torch.equal(samples.latent(0), studio.ksampler(0, positive, 3.0, negative))
    assert torch.equal(samples.conditioning(0, negative=True).cross_attn, negative[0][0])
    clip = Clip()
    empty, _ = studio.run(prompts="a", clip=clip, cfg=3.0, name="empty")
    assert clip.read == ["", "a"]
    assert torch.equal(empty.latent(0), studio.ksampler(0, positive, 3.0, Clip().encode_from_tokens_scheduled("")))
    unused, _ = studio.run(prompts="a", clip=Clip(), negative=[negative], name="unused")
    assert not unused.has_negative and unused.entries[0].negative is None


def test_guidance_of_0_leaves_the_models_own(studio):
    plain, _ = studio.run(prompts="a", clip=Clip(), name="plain")
    set_, _ = studio.run(prompts="a", clip=Clip(), name="set", guidance=3.5)
    assert plain.conditioning(0).values == {} and set_.conditioning(0).values == {"guidance": 3.5}
    assert torch.equal(plain.latent(0), set_.latent(0)), "ComfyUI gives FLUX.1 a guidance of 3.5 by itself"


def test_prompts_come_from_lists_and_files_too(studio):
    (studio.input / "more").mkdir()
    (studio.input / "more" / "p.txt").write_text("\ufefffrom a file\n#no\n", encoding="utf-8")
    for name, file in {"here": "more/p.txt", "from another system": "more\\p.txt"}.items():
        samples, _ = studio.run(prompts=["one\ntwo", " ", "three"], prompts_file=file, clip=Clip(), name=name)
        assert [each.prompt for each in samples.entries] == ["one two", "three", "from a file"]


def test_the_size_is_that_of_the_latent(studio, comfy):
    latent = {"samples": torch.zeros(3, 4, 8, 12), "downscale_ratio_spacial": 16}
    samples, _ = studio.run(prompts="a", clip=Clip(), latent_image=latent)
    assert samples.about.latent_shape == SIZE, "channels and scale are the model's, the batch does not count"
    assert samples.latent(0).shape == SIZE
    with pytest.raises(ValueError, match=r"latent_shape is \(1, 16, 16, 24\) there and \(1, 16, 16, 16\) here"):
        studio.run(prompts="a", clip=Clip(), latent_image={"samples": torch.zeros(1, 16, 16, 16)})


def test_video_models_have_frames(studio, comfy):
    with torch.inference_mode():
        (wan,) = comfy.nodes.UNETLoader().load_unet("linearize_tiny_wan.safetensors", "default")
    latent = {"samples": torch.zeros(1, 16, 3, 8, 10)}
    samples, text = studio.run(model=wan, prompts="a", clip=Clip(4096), latent_image=latent, cfg=4.0)
    positive, negative = (Clip(4096).encode_from_tokens_scheduled(each) for each in ("a", ""))
    assert torch.equal(samples.latent(0), studio.ksampler(0, positive, 4.0, negative, wan, latent))
    assert text.startswith("1 sample of 1 x 16 x 3 x 8 x 10")
    with pytest.raises(ValueError, match="host is wan there and flux here, latent_shape is"):
        studio.run(prompts="a", clip=Clip(), cfg=4.0)


def conditioning(**options):
    entry = Clip().encode_from_tokens_scheduled("a")[0]
    return [[entry[0], {**entry[1], **options}]]


WRONG = {
    "no prompts": ({"prompts": "\n# only this\n", "clip": Clip()}, "there are no prompts; write one per line, or wire"),
    "no clip": ({"prompts": "a"}, "prompts need a text encoder; wire one to clip"),
    "both": ({"prompts": "a", "clip": Clip(), "positive": [conditioning()]}, "got both; clear the prompts or unplug"),
    "no negative": ({"positive": [conditioning()], "cfg": 2.5}, "cfg 2.5 needs a negative conditioning; wire one to"),
    "no file": ({"prompts_file": "none.txt", "clip": Clip()}, "there is no none.txt in ComfyUI's input folder"),
    "file outside": ({"prompts_file": "../secret.txt", "clip": Clip()}, "in ComfyUI's input folder, got '../secret"),
    "file outside, other slashes": ({"prompts_file": "..\\s.txt", "clip": Clip()}, "in ComfyUI's input folder, got"),
    "file absolute": ({"prompts_file": "/etc/x.txt", "clip": Clip()}, "in ComfyUI's input folder, got '/etc/x.txt'"),
    "file no text": ({"prompts_file": "a.png", "clip": Clip()}, "is the name of a .txt file"),
    "file null": ({"prompts_file": "a\0.txt", "clip": Clip()}, "is the name of a .txt file"),
    "no name": ({"name": ""}, "name is one of letters, digits, spaces and . _ - inside, at most 80 characters, got ''"),
    "name up": ({"name": "../x"}, "got '../x'; for example flux-1024"),
    "name below": ({"name": "a/b"}, "got 'a/b'"),
    "name dots": ({"name": ".."}, "got '..'"),
    "name device": ({"name": "nul.x"}, "got 'nul.x'"),
    "name long": ({"name": "x" * 81}, "at most 80 characters"),
    "several": ({"steps": [1, 2]}, "steps takes one value, got 2; only prompts, positive and negative"),
    "mask": ({"latent_image": {"samples": torch.zeros(SIZE), "noise_mask": torch.ones(1)}}, "must have no noise_mask"),
    "entries": ({"positive": [conditioning() * 2]}, "one entry, this one has 2; leave out nodes that combine"),
    "control": ({"positive": [conditioning(control=object())]}, "a conditioning with a control of type object; use a"),
    "negatives": ({"positive": [conditioning()], "negative": [conditioning()] * 3, "cfg": 2.0},
                  "negative is one conditioning for all samples or one for each of positive, got 3 for 1 ready"),
    "two negatives": ({"prompts": "a", "clip": Clip(), "negative": [conditioning()] * 2, "cfg": 2.0}, "got 2 for 0"),
    "hooks": ({"positive": [conditioning(hooks=object())]}, "a conditioning with hooks"),
    "area": ({"positive": [conditioning(area=(8, 8, 0, 0))]}, "a conditioning with area"),
    "a mask": ({"positive": [conditioning(mask=torch.ones(1, 8, 8))]}, "a conditioning with mask"),
    "a time": ({"positive": [conditioning(start_percent=0.2)]}, "a conditioning with start_percent"),
    "reference": ({"positive": [conditioning(reference_latents=[object()])]}, "with reference_latents; leave out"),
    "numbered": ({"positive": [conditioning(keyframes={1: torch.ones(1)})]}, "with keyframes; leave out"),
    "sparse": ({"positive": [conditioning(guide={"sparse": torch.eye(2).to_sparse()})]}, "with guide; leave out"),
    "infinite": ({"positive": [conditioning(guidance=float("nan"))]}, "a conditioning with guidance"),
    "no tensor": ({"positive": [[["text", {}]]]}, "a conditioning with cross_attn"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_sentence_before_anything_is_written(studio, name):
    inputs, words = WRONG[name]
    if "positive" not in inputs and "clip" not in inputs:
        inputs = {"prompts": "a", "clip": Clip(), **inputs} if name != "no clip" else inputs
    with pytest.raises(ValueError) as error:
        studio.run(**inputs)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(studio.output.iterdir())


def test_a_linearized_model_is_no_teacher(studio, comfy, flux):
    with torch.inference_mode():
        patched = comfy.node("LinearizeCLEAR")(model=flux, radius=3, weights="none")[0]
    with pytest.raises(
        ValueError, match="samples come from the teacher; wire the model from before the Linearize node"
    ):
        studio.run(model=patched, prompts="a", clip=Clip())


def test_conditioning_survives_the_way_to_files_and_back(studio):
    options = {"pooled_output": None, "guidance": 3.5, "method": "offset", "flag": True, "count": 2,
               "attention_mask": torch.tensor([[True, False]]), "ids": torch.arange(3)}  # fmt: skip
    with torch.inference_mode():
        entries = [[torch.randn(1, 4, 8).bfloat16(), options]]
    there = studio.conditions.to_conditioning(entries)
    with torch.inference_mode():
        ((tensor, back),) = studio.conditions.from_conditioning(there)
    assert torch.equal(tensor, entries[0][0]) and tensor.dtype == torch.bfloat16 and not tensor.is_inference()
    assert back.keys() == options.keys()
    for name, value in options.items():
        same = torch.equal(back[name], value) if isinstance(value, torch.Tensor) else back[name] is value
        assert same, name
    without = studio.conditions.to_conditioning([[None, {}]])
    assert studio.conditions.from_conditioning(without) == [[None, {}]]


def test_the_node_runs_again_when_folder_or_file_change(studio, comfy):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeTeacherSamples"]
    state = lambda: node.fingerprint_inputs(name=["teacher"], prompts_file=["p.txt"], model=[None])  # noqa: E731
    seen = [state()]
    (studio.input / "p.txt").write_text("a\n")
    seen.append(state())
    studio.run(prompts_file="p.txt", clip=Clip())
    seen.append(state())
    assert state() == seen[-1] and len(set(seen)) == 3
