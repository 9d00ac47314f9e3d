"""Tiny models of ComfyUI's own classes, and a way to watch their attention calls."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # families.py and the files that it collects import each other by name

from families import seeded  # noqa: E402

from linearize.attention.hosts.site_hooks import current_site  # noqa: E402
from linearize.attention.runtime.override import model_call_wrapper  # noqa: E402
from linearize.attention.runtime.runtime import CALL_KEY, RUNTIME_KEY  # noqa: E402


@pytest.fixture(scope="session")
def tiny(comfy):
    """A function: the tiny model of a family, made once; `oracle=True` gives the one for its probes."""
    models = {}

    def make(family, oracle=False):
        build = family.oracle if oracle and family.oracle else family.build
        key = family.name, build
        if key not in models:
            models[key] = seeded(build())
        return models[key]

    return make


@pytest.fixture
def watch(tiny):
    """A function that runs one forward and returns its output and attention calls, with the layout told for each.

    The wrapper is that of `patching/patcher.py`, and hooks the modules; a family whose host wraps "apply_model" calls
    the wrapper that it finds in its transformer options.
    """

    def run(family, runtime, inputs, override=None, oracle=False, **options):
        calls, host, model = [], runtime.host, tiny(family, oracle)

        def spy(func, q, k, v, heads, *args, **kwargs):
            transformer_options = kwargs.get("transformer_options") or {}
            facts = transformer_options.get(CALL_KEY)
            output = (override or call_plainly)(func, q, k, v, heads, *args, **kwargs)
            skip, keep = kwargs.get("skip_reshape"), kwargs.get("skip_output_reshape")
            q = q if skip else q.unflatten(2, (heads, -1)).transpose(1, 2)
            k = k if skip else k.reshape(*k.shape[:2], -1, q.shape[-1]).transpose(1, 2)
            own = facts is not None and (q.shape[2] == k.shape[2] or current_site() is not None)
            site = facts.site_of(host, transformer_options, q.shape[2]) if own else None
            layout = facts.layout_at(host, site) if site else None
            heads_first = output if keep else output.unflatten(-1, (heads, -1)).transpose(1, 2)
            calls.append(SimpleNamespace(site=site, q=q, k=k, output=heads_first, layout=layout))
            return output

        spy.linearize_override = True  # or ours would be put over it
        transformer_options = {
            "optimized_attention_override": spy,
            RUNTIME_KEY: runtime,
            "wrappers": {host.wrapped: {"linearize": [model_call_wrapper]}},
            **options,
        }
        try:
            with torch.no_grad():
                return family.forward(model, inputs, transformer_options), calls
        finally:
            runtime.finish_run()  # takes the hooks away

    return run


def call_plainly(func, *args, **kwargs):
    return func(*args, **kwargs)


@pytest.fixture(scope="session")
def changed_tokens():
    """A function: the tokens in which two (B, H, N, D) tensors differ."""

    def find(first, second):
        return set((first != second).any(dim=-1).any(dim=1).any(dim=0).nonzero().flatten().tolist())

    return find
