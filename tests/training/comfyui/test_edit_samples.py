"""Samples of edit and control models: the model is called as its sampler called it, and students learn from them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from edit_models import EDITS, Vae, control_net, controlled, load, noise, text

EARLIER = "580917af42722d34af62a72a16114a63caac5851c5f2e1603cf90e38fc6d535b"
CONTROLLED = ("flux control", "sd3 control")
DISTILLED = ("kontext", "qwen edit", "vace", "flux control")


@pytest.fixture(scope="module")
def models(comfy):
    """The tiny models by name, loaded once."""
    loaded = {}

    def get(name):
        with torch.inference_mode():
            return loaded.setdefault(name, None) or loaded.update({name: load(name)}) or loaded[name]

    return get


@pytest.fixture
def studio(comfy, models, tmp_path, monkeypatch):
    """The nodes of distillation, with ComfyUI's folders elsewhere."""
    import folder_paths

    (tmp_path / "students").mkdir()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "linearize", ([str(tmp_path / "students")], set()))
    shown, patching = [], comfy.module("patching")
    monkeypatch.setattr(comfy.module("nodes.node_status"), "show_on_node", lambda *_: shown.append)
    schema = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeTeacherSamples"].define_schema()
    defaults = {each.id: each.default for each in schema.inputs if getattr(each, "default", None) is not None}

    def conditions(name, count=2):
        edit = EDITS[name]
        with torch.inference_mode():
            more = (control_net(edit.net),) if edit.net else ()
            return [edit.condition(20 * number, *more) for number in range(count)]

    def samples(name, pairs, **inputs):
        edit = EDITS[name]
        values = {"model": models(edit.model), "latent_image": {"samples": torch.zeros(edit.size)}, "steps": 2}
        values = {key: [value] for key, value in {**defaults, **values, **inputs}.items()}
        positive, negative = [list(each) for each in zip(*pairs, strict=True)]
        with torch.inference_mode():
            return comfy.node("LinearizeTeacherSamples")(**values, positive=positive, negative=negative).args[0]

    def ksampler(name, pair, seed=0, cfg=1.0, model=None):
        edit = EDITS[name]
        with torch.inference_mode():
            return comfy.nodes.KSampler().sample(
                model or models(edit.model), seed, 2, cfg, "euler", "simple", *pair,
                {"samples": torch.zeros(edit.size)}, 1.0,
            )[0]["samples"]  # fmt: skip

    return SimpleNamespace(
        conditions=conditions, samples=samples, ksampler=ksampler, module=comfy.module, node=comfy.node, shown=shown,
        model=lambda name: models(EDITS[name].model), folder=tmp_path / "linearize", patching=patching,
    )  # fmt: skip


def plain(value):
    """Return a copy of what a model was called with, without options that differ from call to call."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if name != "transformer_options"}
        return {name: plain(each) for name, each in kept.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


class Calls:
    """What a diffusion model was called with, and the noised picture and level of each call."""

    def __init__(self, model):
        self.model, self.seen, self.inputs, self.halves = model.clone(), [], [], []
        self.asked = {}  # what the arguments were made of, by positive and negative; the last call counts
        self.model.set_model_unet_function_wrapper(self._wrap)
        self._module = model.model.diffusion_model

    def _wrap(self, apply, call):
        self.inputs.append((call["input"].clone(), call["timestep"].clone()))
        self.halves.append(list(call["cond_or_uncond"]))
        return apply(call["input"], call["timestep"], **call["c"])

    def __enter__(self):
        def see(_, args, kwargs):
            self.options = list(kwargs["transformer_options"]["cond_or_uncond"])
            self.seen.append((plain(args), plain(kwargs)))

        def ask(**given):
            names = ("seed", "latent_image", "denoise_mask", "latent_shapes", "width", "height", "device")
            self.asked[given["prompt_type"]] = [given.get(name) for name in names] + [given["noise"].shape]
            return base(**given)

        self._hook = self._module.register_forward_pre_hook(see, with_kwargs=True)
        base, self.model.model.extra_conds = self.model.model.extra_conds, ask
        return self

    def __exit__(self, *_):
        self._hook.remove()
        del self.model.model.extra_conds


def assert_equal(found, expected, row, rows, where="", tolerance=0.0):
    """Compare one half of a batch with a call of its own."""
    if isinstance(expected, torch.Tensor):
        expected = expected[row : row + 1] if expected.ndim and expected.shape[0] == rows else expected
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        if tolerance:
            assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), where
        else:
            assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            # two halves in one batch are added up in another order
            more = 1e-4 if name == "control" and rows > 1 else tolerance
            assert_equal(found[name], expected[name], row, rows, f"{where}/{name}", more)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, each in enumerate(expected):
            assert_equal(found[number], each, row, rows, f"{where}/{number}", tolerance)
    else:
        assert found == expected, where


def replayed(studio, model, samples, place, negative, noised, sigma):
    """Return what training calls the model with, for a picture and a level of the sampler."""
    teacher_module, draw = studio.module("training.comfyui.teacher"), studio.module("training.engine.protocols").Draw

    def work(teacher):
        teacher.noised = lambda _: (noised, sigma, None)
        with Calls(model) as calls:
            teacher.watch(draw(place, 0.5, 77, negative), lambda _: None)
        return calls

    with torch.inference_mode():
        return teacher_module.with_teacher(model, samples, work)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", EDITS)
def test_training_calls_the_model_as_its_sampler_did(studio, name, cfg):
    pairs, model = studio.conditions(name), studio.model(name)
    samples = studio.samples(name, pairs, cfg=cfg, first_seed=3)
    for place, pair in enumerate(pairs):
        with Calls(model) as calls:
            result = studio.ksampler(name, pair, 3 + place, cfg, calls.model)
        assert torch.equal(samples.latent(place), result), "the sample is the one of the core's own sampler"
        assert {half for halves in calls.halves for half in halves} == ({0} if cfg == 1.0 else {0, 1})
        for call, (noised, sigma), halves in zip(calls.seen, calls.inputs, calls.halves, strict=True):
            for row, half in enumerate(halves):
                one = replayed(studio, model, samples, place, bool(half), noised[row : row + 1], sigma[row : row + 1])
                assert_equal(list(one.seen[0]), list(call), row, len(halves))
                kind = "negative" if half else "positive"
                assert_equal(one.asked[kind], calls.asked[kind], 0, 1)
                assert one.options == [half], "which half it is stands in the transformer options"


def test_what_a_model_was_given_matters_and_reaches_it(studio):
    """The comparison above compares something: each option is among the arguments of the call."""
    wanted = {"kontext": "ref_latents", "qwen edit": "ref_latents", "vace": "vace_context", "wan i2v": "clip_fea",
              "flux control": "control", "sd3 control": "control"}  # fmt: skip
    for name, option in wanted.items():
        (pair,) = studio.conditions(name, 1)
        with Calls(studio.model(name)) as calls:
            given = studio.ksampler(name, pair, model=calls.model)
        assert calls.seen[0][1][option] is not None, name
        bare = [[[entry[0], {"pooled_output": entry[1].get("pooled_output")}] for entry in each] for each in pair]
        assert not torch.equal(studio.ksampler(name, bare), given), name


def relative(first, second):
    return float((first - second).norm() / second.norm())


@pytest.fixture
def distill(studio, comfy):
    """A function: linear candidates of all sites after some updates, without matrices behind them."""

    def run(name, model, samples, updates):
        host, _ = studio.patching.host_of(model)
        plan = studio.module("attention.plans").Plan(host.name, studio.module("attention.specs").LinearSpec("hedgehog"))
        inputs = {"updates": updates, "held_out": 2, "learning_rate": 0.01, "queries": 0, "output_draws": 0}
        with torch.inference_mode():
            run = comfy.node("LinearizeTransfer")
            return run(model=model, samples=samples, plans={"plan0": plan}, **inputs).args[0]

    return run


@pytest.mark.parametrize("name", DISTILLED[:3])
def test_a_student_of_an_edit_model_learns_is_saved_and_runs(studio, name, distill, comfy):
    pairs, model = studio.conditions(name, 6), studio.model(name)
    samples = studio.samples(name, pairs, cfg=2.0)
    found = {updates: distill(name, model, samples, updates) for updates in (0, 40)}
    errors = {updates: {site: each.error for site, (each,) in one.sites.items()} for updates, one in found.items()}
    host, module = studio.patching.host_of(model)
    assert errors[40].keys() == {site.id for site in host.sites(module)}
    assert sum(errors[40].values()) < 0.95 * sum(errors[0].values()), errors
    with torch.inference_mode():
        text = comfy.node("LinearizeSaveStudent")(student=found[40], name="edit").args[0]
        file = re.search(r"student (\S+) \(press", text)
        assert file is not None, text
        loaded = comfy.node("LinearizeLoadStudent")(model=model, student=file[1]).args[0]
    dense, student = studio.ksampler(name, pairs[0], cfg=2.0), studio.ksampler(name, pairs[0], cfg=2.0, model=loaded)
    record = studio.patching.runtime_of(loaded).record
    assert {(each.site, each.kind) for each in record.ran} == {(site, "linear") for site in errors[40]}
    assert not record.declined and 0 < relative(student, dense) < 0.7


@pytest.mark.parametrize("name", DISTILLED)
def test_fine_tuning_works_on_samples_of_edit_models(studio, name, distill, comfy):
    pairs, model = studio.conditions(name, 6), studio.model(name)
    samples = studio.samples(name, pairs, cfg=2.0)
    given = distill(name, model, samples, 0)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    with torch.inference_mode():
        found = comfy.node("LinearizeFinetune")(
            model=model, student=given, samples=samples, block_updates=4, updates=14, rank=4, delta_rate=1e-3,
            map_rate=5e-3, accumulation=1, warmup=1, held_out=2, ema=0.0, preset="ours",
        ).args[0]  # fmt: skip
    facts = found.recipe["finetune"]
    assert facts["error_after"] < 0.97 * facts["error_before"], studio.shown[-1]
    assert found.deltas and all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_every_sort_of_option_survives_the_way_to_files_and_back(studio, tmp_path):
    import comfy.clip_vision

    conditioning, convert, files = (
        studio.module(f"training.{name}") for name in ("samples.conditioning", "comfyui.conditioning", "samples.files")
    )
    seen = comfy.clip_vision.Output()
    seen["last_hidden_state"], seen["mm_projected"] = noise(1, 1, 3, 5), None
    shared = noise(2, 1, 4, 3, 5)
    options = {
        "reference_latents": [shared, noise(3, 1, 4, 2, 7), shared[..., 1:]],
        "vace_strength": [1.0, 0.5],
        "guidance": 3.5,
        "clip_vision_output": seen,
        "unclip_conditioning": [{"clip_vision_output": seen, "strength": 1.0, "noise_augmentation": 0.0}],
        "audio_embed": {"tokens": noise(4, 1, 6, 2), "size": (3, 5)},
        "guide_attention_entries": [{"strength": 1.0, "pixel_mask": None, "latent_shape": [2, 3]}],
        "empty": [],
    }
    with torch.inference_mode():
        entries = [[noise(0, 1, 4, 8), options]]
        there = convert.to_conditioning(entries)
        path = tmp_path / "conditioning.safetensors"
        files.save_tensors(path, there.stored(), there.stored_values())
        read = conditioning.read_conditioning(path)
        ((_, back),) = convert.from_conditioning(read)
    assert read.file == there.file

    def check(found, expected, where):
        assert type(found) is type(expected), where
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected) and not found.is_inference(), where
        elif isinstance(expected, dict):
            assert found.keys() == expected.keys(), where
            for name in expected:
                check(found[name], expected[name], f"{where}/{name}")
        elif isinstance(expected, (list, tuple)):
            assert len(found) == len(expected), where
            for number, each in enumerate(expected):
                check(found[number], each, f"{where}/{number}")
        elif isinstance(expected, comfy.clip_vision.Output):
            check(vars(found), vars(expected), where)
        else:
            assert found == expected, where

    check(back, options, "")


@pytest.mark.parametrize("values", [
    {"reference_latents": [1]}, {"a": {"list": 1}}, {"a": {"tensor": 0}}, {"a": {"tensor": "0"}}, {"a": {"what": []}},
    {"a": {"record": 3, "fields": {}}}, {"a": {"map": [], "list": []}}, {"a": {}},
    {"a": json.loads('{"list": [' * 10 + "]}" * 10)}, {"a": json.loads("[" * 600 + "]" * 600)},
], ids=lambda values: str(values)[:80])  # fmt: skip
def test_a_file_that_says_nonsense_of_its_options_is_one_sentence(studio, tmp_path, values):
    conditioning = studio.module("training.samples.conditioning")
    path = tmp_path / "conditioning.safetensors"
    studio.module("training.samples.files").save_tensors(path, {"cross_attn": torch.ones(1)}, values)
    with pytest.raises(ValueError, match=r"is no file of teacher samples; delete it, and run"):
        conditioning.read_conditioning(path)
    assert not conditioning.needs_control_net(path)


def test_conditionings_of_earlier_versions_keep_their_name(studio):
    """The hash of a text conditioning, taken before lists could be stored: old folders are gone on with."""
    made = studio.module("training.samples.conditioning").Conditioning(
        torch.arange(6, dtype=torch.float32).reshape(1, 2, 3), {"pooled_output": torch.ones(1, 2)}, {"guidance": 3.5}
    )
    assert made.file == f"conditioning/{EARLIER}.safetensors"


def test_another_reference_or_control_is_another_conditioning(studio):
    make = studio.module("training.comfyui.conditioning").to_conditioning
    net = control_net("flux")
    base = (text(1, 64, 32), text(2, 64, 32))
    one = lambda net=net, seed=1, **more: make(controlled(base, net, seed, **more)[0]).file  # noqa: E731
    other, typed = control_net("sd3"), control_net("flux")
    typed.set_extra_arg("control_type", [3])
    files = [
        make(base[0]).file, one(), one(seed=2), one(strength=0.6), one(percents=(0.0, 0.8)), one(net=other),
        one(net=other, vae=Vae()), one(net=other, vae=Vae(2.0)), one(net=typed),
        one(net=control_net("flux", 6)),
        make(controlled(controlled(base, net, 1), net, 1)[0]).file,
        make(text(1, 64, 32, reference_latents=[noise(1, 1, 16, 4, 4)])).file,
        make(text(1, 64, 32, reference_latents=[noise(1, 1, 16, 4, 4)] * 2)).file,
    ]  # fmt: skip
    assert len(set(files)) == len(files)
    assert one() == one(net=control_net("flux")), "the same weights, loaded twice"


@pytest.mark.parametrize("name", CONTROLLED)
def test_control_nets_come_from_the_graph_and_are_said_where_they_lack(studio, name, comfy):
    """A folder alone cannot replay them; the same graph can, from its finished folder too."""
    pairs, model = studio.conditions(name), studio.model(name)
    first = studio.samples(name, pairs, cfg=2.0)
    alone = type(first).open(first.folder)
    teacher = studio.module("training.comfyui.teacher")
    with pytest.raises(ValueError, match="were made with a ControlNet, which no folder holds; run Generate Teacher"):
        teacher.with_teacher(model, alone, lambda _: pytest.fail("training began"))
    again = studio.samples(name, pairs, cfg=2.0)
    assert again.live and again.digest == first.digest
    draw = studio.module("training.engine.protocols").Draw(1, 0.5, 7)
    look = lambda one: one.watch(draw, lambda _: None)  # noqa: E731
    assert torch.equal(*(teacher.with_teacher(model, each, look) for each in (first, again)))
    control = pairs[0][0][0][1]["control"]
    assert control.cond_hint is None and control.timestep_range is None, "cleaned up"
    worker = studio.module("nodes.training_worker")
    with pytest.raises(ValueError, match="other processes do not have it; set gpus to 1"):
        worker.train_in_processes(SimpleNamespace(processes=1), model, first, None, first.folder)


def test_controls_that_are_not_understood_are_refused(studio):
    import comfy.controlnet
    import comfy.hooks

    make = studio.module("training.comfyui.conditioning").to_conditioning
    other = type("AdvancedNet", (comfy.controlnet.ControlNet,), {"__module__": "another.pack"})
    hooked, strange = control_net("flux"), control_net("flux")
    hooked.extra_hooks = comfy.hooks.HookGroup()
    strange.set_extra_arg("what", object())
    net = control_net("flux")
    changed = other(net.control_model, load_device=net.load_device)
    base = (text(1, 64, 32), text(2, 64, 32))
    for made, words in ((changed, "a control of type AdvancedNet; use"), (hooked, "with hooks on a ControlNet; leave"),
                        (strange, "with control; leave out")):  # fmt: skip
        made.set_cond_hint(noise(1, 1, 3, 8, 8))
        entries = [[base[0][0][0], {**base[0][0][1], "control": made}]]
        with pytest.raises(ValueError, match=words):
            make(entries)


def test_conditionings_on_the_device_are_few(studio, monkeypatch):
    pairs, model = studio.conditions("kontext", 5), studio.model("kontext")
    samples, teacher = studio.samples("kontext", pairs), studio.module("training.comfyui.teacher")
    monkeypatch.setattr(teacher, "KEPT", 2)
    draw, kept = studio.module("training.engine.protocols").Draw, []

    def work(one):
        for place in (0, 1, 0, 2, 0, 3, 4):
            one.watch(draw(place, 0.5, 7), lambda _: None)
            kept.append(len(one._conditions))

    teacher.with_teacher(model, samples, work)
    assert kept == [1, 2, 2, 2, 2, 2, 2]


def test_a_session_reads_one_conditioning_however_many_control_nets_it_shows(studio, monkeypatch):
    pairs, model = studio.conditions("flux control", 5), studio.model("flux control")
    samples, teacher = studio.samples("flux control", pairs), studio.module("training.comfyui.teacher")
    nets, read, begun, cleaned = [pair[0][0][1]["control"] for pair in pairs], [], [], []
    whole = samples.conditioning
    monkeypatch.setattr(samples, "conditioning", lambda *place: read.append(place) or whole(*place))
    for net in nets:
        monkeypatch.setattr(net, "pre_run", lambda *_, net=net: begun.append(net))
        monkeypatch.setattr(net, "cleanup", lambda net=net: cleaned.append(net))
    teacher.with_teacher(model, samples, lambda _: None)
    assert len(read) == 1
    assert {*map(id, begun)} == {*map(id, cleaned)} == {*map(id, nets)}, "each is made ready and cleaned up"
