"""What tells two models apart, for samples and for jobs: some values of every weight, and the LoRAs on them."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

SIZE = (1, 16, 8, 12)
MLP = "diffusion_model.single_blocks.1.linear1.weight"


@pytest.fixture(scope="module")
def lab(comfy, tmp_path_factory):
    """Loads the tiny FLUX, as its file has it or changed, and tells what it is."""
    import folder_paths
    from safetensors.torch import load_file, save_file

    source = folder_paths.get_full_path("diffusion_models", "linearize_tiny_flux.safetensors")
    folder = tmp_path_factory.mktemp("models")
    identity = comfy.module("training.comfyui.identity")

    def load(dtype="default"):
        with torch.inference_mode():
            return comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", dtype)[0]

    def merged(name, change, scale=0.02):
        """Return the model of a file in which one weight has a change of rank 1."""
        import comfy.sd

        weights = load_file(source)
        generator = torch.Generator().manual_seed(1)
        rows, columns = weights[name].shape
        low = torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator)
        weights[name] += scale * change(low)
        save_file(weights, folder / "merged.safetensors")
        with torch.inference_mode():
            return comfy.sd.load_diffusion_model(str(folder / "merged.safetensors"))

    def sample(model):
        empty = {"samples": torch.zeros(SIZE)}
        positive = [[torch.randn(1, 7, 64), {"pooled_output": torch.randn(1, 32)}]]
        with torch.inference_mode():
            comfy.nodes.KSampler().sample(model, 1, 1, 1.0, "euler", "simple", positive, positive, empty, 1.0)

    fingerprint = comfy.module("patching.patcher").model_fingerprint
    return SimpleNamespace(source=source, load=load, merged=merged, sample=sample, weights=identity.weights_digest,
                           model=identity.model_digest, fingerprint=fingerprint,
                           match=comfy.module("attention.students.fingerprint").match)  # fmt: skip


def lora(model, scale=0.1, key=MLP, loader="load_lora_for_models"):
    """Return a clone with a LoRA of rank 2 in the graph."""
    import comfy.sd
    import comfy.utils

    shape, name = comfy.utils.get_attr(model.model, key).shape, key.removesuffix(".weight")
    generator = torch.Generator().manual_seed(3)
    tensors = {f"{name}.lora_up.weight": scale * torch.randn(shape[0], 2, generator=generator),
               f"{name}.lora_down.weight": torch.randn(2, shape[1], generator=generator)}  # fmt: skip
    return getattr(comfy.sd, loader)(model, None, tensors, 1.0, 0)[0]


def first_part(low):
    """A change of one seventh of the rows: the queries of a fused weight."""
    return torch.cat([low[: low.shape[0] // 7], torch.zeros_like(low[low.shape[0] // 7 :])])


@pytest.mark.parametrize("change", [lambda low: low, first_part], ids=["whole", "one seventh of the rows"])
@pytest.mark.parametrize("name", ["single_blocks.1.linear1.weight", "double_blocks.0.img_mlp.2.weight"])
def test_a_merged_change_of_one_weight_is_another_model(lab, name, change):
    base, merged = lab.load(), lab.merged(name, change)
    assert lab.match(lab.fingerprint(base), lab.fingerprint(merged)) == "same", "the norms cannot tell"
    assert lab.weights(base) != lab.weights(merged) and lab.model(base) != lab.model(merged)


def test_a_file_loaded_twice_and_used_between_is_one_model(lab):
    import comfy.model_management as management

    first, second = lab.load(), lab.load()
    before = lab.model(first)
    assert lab.model(second) == before and lab.weights(first) == lab.weights(second)
    lab.sample(first)
    assert lab.model(first) == before, "while it is loaded"
    changed = lora(first)
    lab.sample(changed)  # its LoRA is in the shared weights now
    assert lab.weights(first) == lab.weights(changed) == lab.weights(second), "what lies under the patches"
    assert lab.model(first) == before != lab.model(changed)
    management.unload_all_models()
    assert lab.model(first) == before
    first.partially_load(first.load_device, 2**20)
    assert lab.model(first) == before, "partly loaded"
    first.detach()
    assert lab.model(first.clone()) == before


def test_other_dtypes_loras_and_noise_levels_are_other_models(lab):
    import comfy.model_sampling as sampling

    base = lab.load()
    shifted = base.clone()
    shift = type("Shift", (sampling.ModelSamplingFlux, sampling.CONST), {})(base.model.model_config)
    shift.set_parameters(shift=1.7)
    shifted.add_object_patch("model_sampling", shift)
    models = [base, lab.load("fp8_e4m3fn"), lab.load("fp8_e5m2"), lora(base), lora(base, 0.11), shifted]
    assert len({lab.model(each) for each in models}) == len(models)
    assert len({lab.weights(each) for each in models}) == 3, "three dtypes"


def test_a_lora_beside_the_weights_is_another_model(lab):
    """ComfyUI's bypass puts it into the layers' calls; the patcher knows it by name only."""
    base = lab.load()
    beside = [lora(base, scale, loader="load_bypass_lora_for_models") for scale in (0.1, 0.1, 0.2)]
    before = [lab.model(each) for each in (base, *beside)]
    assert not beside[0].patches and lab.weights(beside[0]) == lab.weights(base)
    assert before[1] == before[2] and len(set(before)) == 3
    lab.sample(beside[0])
    assert [lab.model(each) for each in (base, *beside)] == before, "while it is loaded"


def test_weights_are_sampled_not_read_whole(comfy, lab, monkeypatch):
    fingerprint = comfy.module("attention.students.fingerprint")
    flat = torch.arange(300_000, dtype=torch.int32)
    digests = {name: fingerprint.weights_digest([(name, flat)]) for name in ("a", "b")}
    assert digests["a"] != digests["b"]
    changed = torch.zeros_like(flat)
    found = sum(
        fingerprint.weights_digest([("a", flat + changed.index_fill(0, torch.tensor([place]), 1))]) != digests["a"]
        for place in range(0, 300_000, 5_003)
    )
    assert found < 10, "single values are seen where the sample falls"
    for start in range(0, 300_000, 37_500):
        part = changed.clone()
        part[start : start + 37_500] = 1
        assert fingerprint.weights_digest([("a", flat + part)]) != digests["a"], f"an eighth from {start}"
    small = torch.randn(5, 9)
    for place in range(45):
        other = small.clone().reshape(-1)
        other[place] += 1
        assert fingerprint.weights_digest([("a", other.view(5, 9))]) != fingerprint.weights_digest([("a", small)])
    strided = torch.randn(40, 1000).t()
    assert fingerprint.weights_digest([("a", strided)]) == fingerprint.weights_digest([("a", strided.contiguous())])


def test_packed_weights_count_as_they_are_stored(comfy):
    fingerprint = comfy.module("attention.students.fingerprint")
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    weight = torch.randn(32, 48)
    packed = [kitchen.QuantizedTensor.from_float(each, "TensorCoreFP8Layout", scale=torch.tensor(scale))
              for each, scale in ((weight, 0.5), (weight, 0.25), (weight + 1, 0.5))]  # fmt: skip
    digests = {fingerprint.weights_digest([("a", each)]) for each in packed}
    assert len(digests) == 3 and fingerprint.weights_digest([("a", weight)]) not in digests

    class Disguised(torch.Tensor):
        """As packs for GGUF have it: bytes that tell the shape of what they stand for."""

        @property
        def shape(self):
            return torch.Size((1024, 1024))

    raw = torch.randint(0, 255, (8, 16), dtype=torch.uint8)
    assert fingerprint.weights_digest([("a", raw.as_subclass(Disguised))]) == fingerprint.weights_digest([("a", raw)])


@pytest.fixture
def studio(comfy, tmp_path, monkeypatch):
    """Generate Teacher Samples and Distill Attention, with ComfyUI's output folder elsewhere."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    shown = []
    monkeypatch.setattr(comfy.module("nodes.node_status"), "show_on_node", lambda *_: shown.append)
    schema = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeTeacherSamples"].define_schema()
    defaults = {each.id: each.default for each in schema.inputs if getattr(each, "default", None) is not None}
    positive = [[[torch.full((1, 7, 64), number / 4), {"pooled_output": torch.ones(1, 32)}]] for number in range(3)]

    def samples(model, name="teacher"):
        values = {**defaults, "model": model, "latent_image": {"samples": torch.zeros(SIZE)}, "steps": 1, "name": name}
        with torch.inference_mode():
            run = comfy.node("LinearizeTeacherSamples")
            return run(**{key: [value] for key, value in values.items()}, positive=positive).args[0]

    def distill(model, samples):
        spec = comfy.module("attention.specs").LinearSpec("hedgehog")
        plan = comfy.module("attention.plans").Plan("flux", spec)
        with torch.inference_mode():
            return comfy.node("LinearizeTransfer")(
                model=model, samples=samples, plans={"plan0": plan}, updates=1, held_out=1
            ).args[0]

    return SimpleNamespace(samples=samples, distill=distill, shown=shown, output=tmp_path / "linearize",
                           module=comfy.module)  # fmt: skip


OTHER = (
    r"model is another one: other weights, LoRAs or noise levels, or the same weights in another dtype; choose a new"
)


def test_a_merged_lora_gets_its_own_samples_and_its_own_student(lab, studio):
    base, merged = lab.load(), lab.merged("single_blocks.1.linear1.weight", lambda low: low)
    samples = studio.samples(base)
    assert studio.samples(lab.load()).digest == samples.digest, "the same file is the same model"
    for other in (merged, lora(base), lab.load("fp8_e4m3fn")):
        with pytest.raises(ValueError, match=OTHER):
            studio.samples(other)
    studio.distill(base, samples)
    assert "another model" not in studio.shown[-1]
    studio.distill(merged, samples)
    assert "the samples are of another model than this one" in studio.shown[-1]
    assert len(list((studio.output / "jobs").iterdir())) == 2, "a job of its own"


def test_samples_without_a_digest_are_read_as_before(lab, studio):
    base = lab.load()
    first = studio.samples(base)
    about = studio.output / "teacher" / "about.json"
    data = json.loads(about.read_text())
    assert len(data.pop("model")) == 64
    about.write_text(json.dumps(data))
    old = type(first).open(studio.output / "teacher")
    assert old.about.model == "" and old.digest != first.digest
    as_written = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for sample in old.entries:
        as_written.update(sample.line())
    assert old.digest == as_written.hexdigest(), "jobs of old samples are found again"
    merged = lab.merged("single_blocks.1.linear1.weight", lambda low: low)
    assert studio.samples(merged).digest == old.digest, "the norms alone, as before"
    studio.distill(merged, old)
    assert "another model" not in studio.shown[-1]
    for wrong in ("x" * 64, 3, ["a"], "ab"):
        about.write_text(json.dumps({**data, "model": wrong}))
        with pytest.raises(ValueError, match="is damaged"):
            type(first).open(studio.output / "teacher")


def test_a_job_of_an_earlier_version_goes_on(lab, studio):
    """Its folder was named by the norms; the first model that comes with them takes it, and no other."""
    base = lab.load()
    samples = studio.samples(base)
    studio.distill(base, samples)
    (job,) = (studio.output / "jobs").iterdir()
    identity, kept = studio.module("training.comfyui.identity"), studio.module("training.engine.job_folder")
    described = json.loads((job / "job.json").read_text())
    described.pop("format")
    old = {**described, "model": identity.norms_digest(base)}
    assert described["model"] != old["model"]
    job.rename(job.with_name(kept.job_key(old)))
    (job.with_name(kept.job_key(old)) / "mark").touch()
    studio.distill(base, samples)
    (found,) = (studio.output / "jobs").iterdir()
    assert found == job and (job / "mark").exists()
    shutil.copytree(job, job.with_name(kept.job_key(old)))
    studio.distill(base, samples)
    assert len(list((studio.output / "jobs").iterdir())) == 2, "a folder of its own comes first"


def test_gguf_models_are_told_apart_though_their_state_dict_holds_nothing(lab, studio, packed_models):
    base, again, changed = (packed_models.gguf_model(lab.source) for _ in range(3))
    before = lab.model(base)
    assert lab.model(again) == before, "the same file is the same model"
    lab.sample(base)
    assert lab.model(base) == before, "while it is loaded"
    with_lora = lora(base)
    lab.sample(with_lora)  # its LoRA is beside the packed weights now
    assert lab.weights(with_lora) == lab.weights(base) and lab.model(with_lora) != before
    weight = changed.model.diffusion_model.single_blocks[1].linear1.weight
    weight.as_subclass(torch.Tensor).view(torch.uint8)[:224] ^= 64  # an eighth
    assert lab.weights(changed) != lab.weights(base)
    samples = studio.samples(base)
    with pytest.raises(ValueError, match=OTHER):
        studio.samples(changed)
    assert studio.distill(base, samples).sites
