"""What a user reads when a node refuses or fails: before anything runs where no model is needed, else on the node."""

import asyncio
import inspect
import traceback

import pytest


def validated(comfy, node_id, **inputs):
    """Return what a node's `validate_inputs` answers."""
    return comfy.nodes.NODE_CLASS_MAPPINGS[node_id].validate_inputs(**inputs)


PLACED = ("LinearizeFoveated", "LinearizeCLEAR", "LinearizeLinear", "LinearizeHybrid")
REFUSED = [
    *[(node, {"sites": "single.x"}, "cannot read 'single.x' in sites 'single.x'") for node in PLACED],
    *[(node, {"start_percent": 0.5, "end_percent": 0.5}, "start_percent must be below end_percent") for node in PLACED],
    ("LinearizeCLEAR", {"end_percent": 1.5}, "end_percent is from 0 to 1, got 1.5"),
    ("LinearizeCalibrate", {"candidates": "clear x"}, "cannot read the candidate 'clear x'"),
    ("LinearizeUniformPlan", {"sites": "double,,single"}, "cannot read '' in sites"),
    ("LinearizeBudgetPlan", {"budget": 0.0}, "above 0 and at most 1, got 0.0"),
    ("LinearizeBudgetPlan", {"budget": 1.5}, "above 0 and at most 1, got 1.5"),
    ("LinearizeBudgetPlan", {"keep_dense": "9"}, "cannot read '9'"),
    ("LinearizeTransfer", {"updates": 0, "output_draws": 0}, "nothing is learned; set one of them above 0"),
    ("LinearizeTransfer", {"gpus": 63}, "gpus is 63, this machine has"),
    ("LinearizeFinetune", {"updates": 0, "block_updates": 0}, "nothing is trained; set one of them above 0"),
    ("LinearizeFinetune", {"optimizer": "muon"}, "optimizer is one of adamw, "),
    ("LinearizeFinetune", {"gpus": 63}, "gpus is 63, this machine has"),
    ("LinearizeTeacherSamples", {"name": ["../x"]}, "name is one of letters, digits"),
    ("LinearizeTeacherSamples", {"prompts_file": ["none.txt"]}, "there is no none.txt in ComfyUI's input folder"),
    ("LinearizeSaveStudent", {"name": "a/../b"}, "name is a file's name, such as my_student or wan/high"),
    ("LinearizeLoadStudent", {"student": "none.safetensors"}, "there is no none.safetensors in"),
    ("LinearizeLoadStudent", {"hub_file": "owner/name"}, "write a Hub file as owner/repo/file.safetensors"),
    ("LinearizePublish", {"repo_id": "name"}, "a Hub repository is owner/name"),
    ("LinearizePublish", {"repo_id": ""}, "a Hub repository is owner/name"),
]


@pytest.mark.parametrize(("node", "inputs", "words"), REFUSED)
def test_what_needs_no_model_is_refused_before_anything_runs(comfy, node, inputs, words):
    found = validated(comfy, node, **inputs)
    assert isinstance(found, str) and words in found and "\n" not in found


ACCEPTED = [
    *[(node, {"sites": "All"}) for node in PLACED],
    ("LinearizeCalibrate", {"candidates": "Clear 8, foveated 0.5"}),
    ("LinearizeUniformPlan", {"sites": "Double single.0-1"}),
    ("LinearizeTransfer", {"updates": 0}),
    ("LinearizeFinetune", {"updates": 0}),
    ("LinearizeLoadStudent", {"hub_file": "https://huggingface.co/o/r/blob/main/f.safetensors"}),
    ("LinearizePublish", {"repo_id": "https://huggingface.co/o/r"}),
    ("LinearizeBudgetPlan", {"budget": 1.0, "keep_dense": ""}),
]


@pytest.mark.parametrize(("node", "inputs"), ACCEPTED)
def test_what_can_be_meant_is_accepted(comfy, node, inputs):
    assert validated(comfy, node, **inputs) is True


class Source:
    """A node whose outputs are linked to inputs."""

    RETURN_TYPES = ("STRING", "INT", "FLOAT", "COMBO")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {}


@pytest.mark.parametrize("node", sorted({node for node, _, _ in REFUSED}))
def test_an_input_that_is_linked_is_not_refused(comfy, monkeypatch, node):
    """ComfyUI hands over None for it, with the values of the others."""
    import execution

    cls = comfy.nodes.NODE_CLASS_MAPPINGS[node]
    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "Source", Source)
    inputs = cls.INPUT_TYPES()
    types = {name: each[0] for part in ("required", "optional") for name, each in inputs.get(part, {}).items()}
    checked = [name for name in inspect.signature(cls.validate_inputs).parameters if types[name] in Source.RETURN_TYPES]
    assert checked
    for linked in ([name] for name in checked), [checked]:
        for names in linked:
            links = {name: ["1", Source.RETURN_TYPES.index(types[name])] for name in names}
            prompt = {
                "1": {"class_type": "Source", "inputs": {}},
                "2": {"class_type": node, "inputs": links},
            }
            _, errors, _ = asyncio.run(execution.validate_inputs("test", prompt, "2", {}))
            assert {error["type"] for error in errors} <= {"required_input_missing"}, (names, errors)


@pytest.fixture
def failing(comfy, monkeypatch):
    """A function: a node of ours that raises an error, and what is then shown."""
    io = comfy.module("nodes.sentences").io
    sentences, shown = comfy.module("nodes.sentences"), []
    monkeypatch.setattr(sentences, "show_error", lambda node, text: shown.append(text))

    def run(error):
        class Node(io.ComfyNode):
            @classmethod
            def define_schema(cls):
                return io.Schema(node_id="Node", category="test")

            @classmethod
            def execute(cls):
                raise error

        shown.clear()
        with pytest.raises(BaseException) as caught:
            sentences.with_sentences(Node).execute()
        return caught.value, tuple(shown)

    return run


def test_a_sentence_of_ours_is_shown_and_raised_as_a_plain_value_error(comfy, failing):
    """ComfyUI prints the class with its module before the sentence; a plain ValueError has none."""
    ours = [
        comfy.module("training.engine.job_folder").JobProblem("the job is damaged"),
        comfy.module("training.engine.loop").OutOfMemory("memory ran out"),
        comfy.module("attention.students.tensor_file").FileProblem("the file is damaged"),
        ValueError("there are no prompts"),
    ]
    for error in ours:
        raised, shown = failing(error)
        assert type(raised) is ValueError and str(raised) == str(error) and shown == (str(error),)
        assert raised is error or raised.__cause__ is error
        # ComfyUI shows the frames of what was raised, not those of its cause
        assert traceback.extract_tb(raised.__traceback__)[-1].line == "raise error"


def test_an_interrupt_and_a_fault_of_the_program_pass_unchanged(comfy, failing):
    import comfy.model_management as management

    for error in (management.InterruptProcessingException(), KeyError("x"), TypeError("y")):
        raised, shown = failing(error)
        assert raised is error and shown == ()


def test_every_node_tells_its_sentences(comfy):
    for name, cls in comfy.nodes.NODE_CLASS_MAPPINGS.items():
        if name.startswith("Linearize") and "Demo" not in name:
            assert cls.execute.__func__.__name__ == "execute_and_tell" or hasattr(
                cls.execute.__func__, "__wrapped__"
            ), name


def test_a_plan_of_another_model_says_so(comfy, studio):
    plan = comfy.module("attention.plans").Plan(
        "flux", rules=(("single.7-9", comfy.module("attention.specs").ClearSpec(2)),)
    )
    with pytest.raises(
        ValueError, match=r"'single.7-9' names no site of this model, .*; the plan was made for another"
    ):
        comfy.node("LinearizeApply")(model=studio.model, attention=plan)
