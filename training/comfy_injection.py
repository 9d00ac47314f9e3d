"""Hooks on a loaded model's attention modules, for hosts that tell sites by module.

ComfyUI injects after a model is loaded and ejects before it is unloaded or its weights are patched.
"""

from typing import Any
from weakref import WeakKeyDictionary

from comfy.patcher_extension import PatcherInjection

from ..attention.hosts import Host
from ..attention.site_hooks import hook_sites


def site_injection(host: Host) -> PatcherInjection:
    """Return an injection that hooks the sites of whatever model it is called for.

    Clones share it and often their model; a clone may also be told to eject from a model that it never injected, so
    what is hooked is kept per model.
    """
    hooked: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def inject(patcher: Any) -> None:
        eject(patcher)
        module = patcher.model.diffusion_model
        hooked[patcher.model] = hook_sites(module, host.site_modules(module))

    def eject(patcher: Any) -> None:
        if patcher.model in hooked:
            hooked.pop(patcher.model)()

    return PatcherInjection(inject, eject)
