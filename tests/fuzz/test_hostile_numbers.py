"""Small files that ask for much: each is one sentence, or runs, in little time and memory."""

import contextlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.attention.hosts.base import Site
from linearize.attention.layout import Segment, TokenLayout, grid_segment
from linearize.attention.planning.cost import attention_cost
from linearize.attention.planning.report import describe_spec
from linearize.attention.plans import Plan, group_sites
from linearize.attention.specs import HeadSplit, MappedSpec
from linearize.attention.students.clear_weights import clear_weights, published_radius
from linearize.attention.students.file import StudentFile, load_student, save_student
from linearize.attention.students.fit import check_student, student_parameters
from linearize.attention.students.learned import new_maps
from linearize.attention.students.tensor_file import FileProblem, TensorInfo, open_tensor_file, write_tensor_file
from linearize.attention.students.tensor_values import content_sha256
from linearize.training.jobs.description import read_job
from linearize.training.samples.files import SamplesProblem
from linearize.training.samples.folder import TeacherSamples

SECONDS, BYTES, LONGEST = 3, 400 * 2**20, 420
SITES = [*(Site(f"double.{n}", 24, 128) for n in range(19)), *(Site(f"single.{n}", 24, 128) for n in range(38))]
LAYOUT = TokenLayout.of([Segment("text", 7), grid_segment("main", 3, 9, 11)])
HUGE = [
    2**31,
    2**63,
    2**64,
    10**18,
    10**400,
    10**4200,
    -1,
    -(10**400),
    1e308,
    float("inf"),
    float("nan"),
    True,
    "9" * 99,
]
EXAMPLES = 400 if os.environ.get("LINEARIZE_TEST_ALL") else 60


@contextlib.contextmanager
def limited():
    """End what hangs or takes memory, as an error that no test expects."""
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(AssertionError("it hangs")))
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def said_of(open_it):
    """Return the sentence of a door, or None where it opened."""
    with limited():
        try:
            open_it()
        except ValueError as error:  # also those of files and samples
            said = str(error)
            assert said and said.isprintable() and len(said) < LONGEST, (len(said), said[:600])
            return said


def use(plan):
    """Do with a plan what is done before a model runs."""
    specs = plan.resolve([site.id for site in SITES])
    group_sites(specs), plan.spec_of("double.3"), plan.to_json()
    for site in (SITES[0], SITES[-1]):
        spec = specs[site.id]
        describe_spec(spec)
        attention_cost(spec, LAYOUT, site.num_heads, site.head_dim)
        for each in [group.spec for group in spec.groups] if isinstance(spec, HeadSplit) else [spec]:
            if isinstance(each, MappedSpec):
                new_maps(each, 1, site.head_dim)


PARAMETERS = {
    "clear": ("radius", "temporal_radius", "down_factor"),
    "linear": ("feature_dim",),
    "hybrid": ("rate", "feature_dim"),
    "chunked": ("chunk_frames", "overlap_frames", "feature_dim"),
}
NUMBERS = [(kind, name) for kind, names in PARAMETERS.items() for name in names]


def plan_text(spec, sites=None):
    return json.dumps({"format": "linearize/plan/1", "host": "flux", "default": spec, "sites": sites or {}})


@pytest.mark.parametrize("kind, name", NUMBERS)
@pytest.mark.parametrize("feature_map", ["polynomial", "favor"])
def test_numbers_of_a_plan(kind, name, feature_map):
    spec = {"kind": kind, **({} if kind == "clear" else {"feature_map": feature_map})}
    for number in [*HUGE, 10**6, 4097, 1025, 257]:
        said_of(lambda number=number: use(Plan.from_text(plan_text({**spec, name: number}))))
    for number in [*HUGE, 2**31]:
        assert said_of(lambda number=number: use(Plan.from_text(plan_text({**spec, name: number})))), number


DENSE = {"kind": "dense"}
TEXTS = {
    "site of nine digits": plan_text(DENSE, {"double.999999999": DENSE}),
    "range to nine digits": plan_text(DENSE, {"double.0-999999999": DENSE}),
    "site of thousands of digits": plan_text(DENSE, {"double." + "9" * 5000: DENSE}),
    "site that is not there": plan_text(DENSE, {"double.999999": DENSE}),
    "a hundred thousand parts": plan_text(DENSE, {"all," * 10**5 + "all": DENSE}),
    "thousands of rules": plan_text(DENSE, {"all" + " " * n: {"kind": "clear"} for n in range(900)}
                                    | {f"single.{n}-37," * 5 + "all": DENSE for n in range(9000)}),
    "long expression": plan_text(DENSE, {"double" * 10**5: DENSE}),
    "long unknown key": plan_text({"kind": "clear", "x" * 10**5: 1}),
    "many unknown keys": plan_text({"kind": "clear"} | {f"x{n}": 1 for n in range(10**5)}),
    "long kind": plan_text({"kind": "x" * 10**5}),
    "a million heads": plan_text([{"heads": list(range(10**6)), "spec": DENSE}]),
    "a head of 10^400": plan_text([{"heads": [10**400], "spec": DENSE}]),
    "a million groups": plan_text([{"heads": [n], "spec": DENSE} for n in range(10**5)]),
    "heads twice": plan_text([{"heads": [0] * 1000, "spec": DENSE}]),
    "groups inside groups": '{"format": "linearize/plan/1", "host": "flux", "default": '
    + '[{"heads": [0], "spec": ' * 400 + "1" + "}]" * 400 + "}",
    "deep": '{"format": ' + "[" * 10**5 + "]" * 10**5 + "}",
    "digits": '{"format": ' + "9" * 10**5 + "}",
    "long format": json.dumps({"format": "x" * 10**6}),
    "long host": plan_text(DENSE).replace('"flux"', '"' + "x" * 10**6 + '"'),
    "keys": json.dumps({"format": "linearize/plan/1", "host": "a", **{f"x{n}": 1 for n in range(10**5)}}),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_a_plan(name):
    assert said_of(lambda: use(Plan.from_text(TEXTS[name])))


def test_a_plan_of_every_site_is_none_of_these():
    """The longest real plans stay well inside the bounds."""
    sites = {site.id: {"kind": "clear", "radius": 1 + n} for n, site in enumerate(SITES)}
    assert said_of(lambda: use(Plan.from_text(plan_text(DENSE, sites)))) is None
    heads = [{"heads": [n], "spec": {"kind": "clear", "radius": n + 1}} for n in range(24)]
    assert said_of(lambda: use(Plan.from_text(plan_text(heads)))) is None


def fit(path):
    student = load_student(path)
    student_parameters(student, check_student(student, "flux", SITES), SITES)


def student(path, spec, **changes):
    save_student(path, StudentFile(host="flux", plan=Plan.from_text(plan_text(spec)), **changes))
    assert path.stat().st_size < 4000
    return path


@pytest.mark.parametrize("feature_map", ["polynomial", "hedgehog", "favor", "linfusion"])
@pytest.mark.parametrize("dim", [0, 1024])
def test_a_student_without_parameters_takes_no_memory_for_them(tmp_path, feature_map, dim):
    """What the file lacks is found by shapes, before a map is made that the plan asks for."""
    path = student(tmp_path / "a.safetensors", {"kind": "linear", "feature_map": feature_map, "feature_dim": dim})
    said = said_of(lambda: fit(path))
    assert (said is None) == (feature_map == "favor"), said
    assert said is None or "the student lacks" in said or "feature_dim is 0" in said


KEY = "diffusion_model.double_blocks.0.img_attn.qkv"
EMPTY = {
    "rank 0": {"deltas": {f"{KEY}.lora_up.weight": torch.ones(9, 0), f"{KEY}.lora_down.weight": torch.ones(0, 9)}},
    "no rows": {"deltas": {f"{KEY}.lora_up.weight": torch.ones(0, 3), f"{KEY}.lora_down.weight": torch.ones(3, 9)}},
    "no difference": {"deltas": {f"{KEY}.diff": torch.ones(0, 9)}},
    "pool": {"parameters": {"double.0.pool": torch.ones(0, 0)}},
    "output": {"parameters": {"double.0.output.weight": torch.ones(0)}},
    "map": {"parameters": {"double.0.phi_q.weight": torch.ones(0, 3)}},
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_a_student_holds_has_numbers(name):
    with pytest.raises(ValueError, match="holds no numbers|has as many rows"):
        StudentFile(host="flux", plan=Plan("flux"), **EMPTY[name])


def edited(path, **texts):
    """Return a student whose metadata was edited and sealed again."""
    from linearize.attention.students.file import _checksum

    save_student(path, StudentFile(host="flux", plan=Plan("flux")))
    file = open_tensor_file(path)
    metadata = {**file.metadata, **texts}
    write_tensor_file(path, {}, {**metadata, "sha256": _checksum(metadata, {})})
    return path


@pytest.mark.parametrize("texts", [
    {"site_errors": json.dumps({"double.0": 10**400})},
    {"site_errors": json.dumps({"double.0": True})},
    {"site_errors": '{"double.0": Infinity}'},
    {"site_errors": '{"double.0": ' + "[" * 3000 + "]" * 3000 + "}"},
    {"recipe": '{"a": NaN}'},
    {"recipe": '{"a": ' + "9" * 4000 + "}"},
    {"recipe": '{"a": ' + "9" * 9000 + "}"},
    {"recipe": '{"a": ' + "[" * 900 + "]" * 900 + "}"},
    {"recipe": '{"a": ' + '{"b":' * 40 + "1" + "}" * 40 + "}"},
    {"base_model": "x" * 10**5},
    {"licence": "x" * 10**5},
], ids=lambda texts: next(iter(texts.items()))[0] + next(iter(texts.items()))[1][:30])  # fmt: skip
def test_numbers_and_texts_of_a_student(tmp_path, texts):
    path = edited(tmp_path / "a.safetensors", **texts)
    assert "cannot be used: " in str(said_of(lambda: load_student(path)))


def job(path, recipe, stage="transfer", **more):
    (path.parent / "model.safetensors").touch()
    plans = {"plans": [json.loads(plan_text(DENSE))]} if stage == "transfer" else {"student": "s.safetensors"}
    data = {"format": "linearize/training/1", "stage": stage, "model": {"file": "model.safetensors"}, "samples": "s",
            "output": "o", "recipe": recipe, **plans, **more}  # fmt: skip
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("stage, name", [
    *[("transfer", name) for name in ("updates", "queries", "replay", "repeats", "held_out", "output_draws", "warmup",
                                      "replay_bytes", "seed", "learning_rate", "clip")],
    *[("finetune", name) for name in ("block_updates", "updates", "rank", "attention_every", "accumulation", "warmup",
                                      "held_out", "seed", "map_rate", "delta_rate", "clip", "flow", "prediction",
                                      "attention", "ema", "checkpointing")],
])  # fmt: skip
def test_numbers_of_a_job(tmp_path, stage, name):
    for number in [*HUGE, 2**60, "1", None, [1], 10**12]:
        path = job(tmp_path / "job.json", {name: number}, stage)
        said = said_of(lambda path=path: read_job(path))
        is_seed = type(number) is int and 0 <= number < 2**64
        fine = {"checkpointing": number is True, "seed": is_seed, "replay_bytes": number in (2**31, 10**12)}
        assert bool(said) != fine.get(name, False), number


@pytest.mark.parametrize("text", [
    "[" * 10**5, "9" * 10**4, '{"format": ' + "[" * 900 + "]" * 900 + "}", "[" + "1," * 10**6 + "1]", "", "\0", "null",
], ids=["deep", "digits", "nested", "million", "empty", "zero", "null"])  # fmt: skip
def test_texts_of_a_job(tmp_path, text):
    (tmp_path / "job.json").write_text(text)
    assert said_of(lambda: read_job(tmp_path / "job.json"))
    many = job(tmp_path / "job.json", {}, plans=[json.loads(plan_text(DENSE))] * 1000)
    assert "plans are at most 64, got 1000" in str(said_of(lambda: read_job(many)))
    strange = job(tmp_path / "job.json", {f"key_{n}": 1 for n in range(9999)})
    assert "the recipe of stage transfer has no key key_0" in str(said_of(lambda: read_job(strange)))


@pytest.fixture
def samples(tmp_path):
    """A folder of one sample whose files can be edited: `write(about, sample)` with what differs."""
    latent = {"samples": torch.ones(1, 4, 6, 8)}
    about = {"format": "linearize/samples/1", "host": "flux", "fingerprint": [1.0] * 256, "latent_shape": [1, 4, 6, 8],
             "sampler": "euler", "scheduler": "simple", "steps": 4, "cfg": 1.0, "guidance": 0.0, "seeds": 1,
             "first_seed": 7, "base_model": "tiny"}  # fmt: skip
    sha256 = content_sha256({}, {})
    sample = {"number": 0, "prompt": "a", "seed": 7, "shape": [1, 4, 6, 8], "latent": "latents/000000.safetensors",
              "sha256": content_sha256(latent), "positive": f"conditioning/{sha256}.safetensors",
              "negative": None}  # fmt: skip

    def write(about_changes, sample_changes, values="{}"):
        (tmp_path / "latents").mkdir(exist_ok=True)
        (tmp_path / "conditioning").mkdir(exist_ok=True)
        write_tensor_file(tmp_path / sample["latent"], latent, {"format": "linearize/samples/1", "values": "{}"})
        write_tensor_file(tmp_path / sample["positive"], {}, {"format": "linearize/samples/1", "values": values})
        (tmp_path / "about.json").write_text(json.dumps({**about, **about_changes}))
        (tmp_path / "index.jsonl").write_text(json.dumps({**sample, **sample_changes}) + "\n" * 2)

    def read():
        found = TeacherSamples.open(tmp_path)
        for number in range(len(found)):
            found.latent(number), found.conditioning(number)

    write({}, {})
    read()
    return SimpleNamespace(write=write, read=read)


@pytest.mark.parametrize("name", ["steps", "seeds", "first_seed", "cfg", "guidance", "latent_shape", "fingerprint"])
def test_numbers_of_samples(samples, name):
    for number in [*HUGE, 2**60, "1", None, [1] * 10**5, {}]:
        value = {"latent_shape": [1, 4, 6, number], "fingerprint": [1.0] * 255 + [number]}.get(name, number)
        samples.write({name: value}, {})
        plain = type(number) is int
        fine = {"first_seed": plain and 0 <= number < 2**64, "fingerprint": plain and abs(number) < 10**30}
        assert said_of(samples.read) or fine.get(name), (name, number)
    samples.write({"latent_shape": [1, 4, 10**9, 10**9]}, {"shape": [1, 4, 10**9, 10**9]})
    assert said_of(samples.read)


@pytest.mark.parametrize("number", [10**6, 10**9, 10**18, 10**400, -1, True, 0.5, "0", None])
def test_the_number_of_a_sample(samples, number):
    """A line that told of sample 10^12 had all numbers before it listed as lost."""
    latent = f"latents/{number:06d}.safetensors" if type(number) is int else "latents/000000.safetensors"
    seed = (7 + number) % 2**64 if type(number) is int else 7
    samples.write({}, {"number": number, "latent": latent, "seed": seed})
    with pytest.raises(SamplesProblem), limited():
        samples.read()


@pytest.mark.parametrize("values", ['{"guidance": ' + "9" * 400 + "}", '{"guidance": Infinity}', '{"a": ' * 5000, "[]"])
def test_values_of_a_conditioning(samples, values):
    samples.write({}, {}, values)
    assert said_of(samples.read)


def test_clear_files(tmp_path):
    assert published_radius("clear_local_99999999999999999999.safetensors") is None
    assert published_radius("clear_local_8_down_4.safetensors") == (8, 4)
    site = SimpleNamespace(shape=(2, 2), key="a", start=0)
    host = SimpleNamespace(title="FLUX.1", diffusers_targets=lambda _: {"blocks.0.attn.to_q.weight": site},
                           diffusers_sites=lambda _: {"blocks.0.attn": "double.0"})  # fmt: skip
    for shape in ((10**5, 10**5), (1, 1, 1, 300, 1, 300, 1), (2, 3), (), (1,), (2,) * 60):
        path = tmp_path / "clear_local_8.safetensors"
        write_tensor_file(path, {"blocks.0.attn.to_q.weight": torch.ones(2, 2)}, {})
        file = open_tensor_file(path)
        pool = TensorInfo(torch.float32, shape)
        tensors = {**file.tensors, "blocks.0.attn.processor.spatial_weight": pool}
        object.__setattr__(file, "tensors", tensors)
        said = said_of(lambda file=file: clear_weights(file, host, None))  # pyright: ignore[reportArgumentType]
        assert said and "pooling weights have the shapes" in said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(HUGE[:9]) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=9,
)
SPECS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["clear", "linear", "hybrid", "chunked", "dense"])},
    optional=dict.fromkeys(("radius", "down_factor", "rate", "feature_dim", "feature_map", "chunk_frames"), JSON),
)
GROUPS = st.lists(st.fixed_dictionaries({"heads": st.lists(st.integers(0, 24) | JSON, max_size=3), "spec": SPECS}))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    default=SPECS | GROUPS | JSON, sites=st.dictionaries(st.text("adoublesing.0-9,", max_size=20), SPECS, max_size=3)
)
def test_any_json_is_a_plan_or_a_sentence(default, sites):
    said_of(lambda: use(Plan.from_text(plan_text(default, sites))))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=st.dictionaries(st.sampled_from(["updates", "seed", "clip", "rank", "loss", "ema", "stage"]), JSON),
       stage=st.sampled_from(["transfer", "finetune"]), other=JSON)  # fmt: skip
def test_any_json_is_a_job_or_a_sentence(tmp_path_factory, recipe, stage, other):
    folder = tmp_path_factory.mktemp("job")
    said_of(lambda: read_job(job(folder / "job.json", recipe, stage)))
    (folder / "other.json").write_text(json.dumps(other))
    assert said_of(lambda: read_job(folder / "other.json"))


def test_a_header_of_lies_is_short(tmp_path):
    """A hundred thousand tensors of nothing, in 7 MB: reading it takes 30 times its size."""
    path = tmp_path / "many.safetensors"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"tensor_{n}": entry for n in range(10**5)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileProblem, match="at most 4194304 are read"), limited():
        open_tensor_file(path)
