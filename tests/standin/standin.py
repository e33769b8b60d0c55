"""The device "standin": `import standin` compiles it, once, and registers it.

It runs on the CPU and refuses what CUDA refuses. `launches()`, `syncs()`, `reset()` and
`trace()` count what a GPU would be asked to do, and where the host would wait for it.
Renaming PyTorch's PrivateUse1 is for good: a process that imports this is its own.
"""

import importlib.util
import sys
import threading
import types
from collections import Counter
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch
import torchgen
import yaml
from compiling import compiled


def load(path):
    "Import the extension from where it was compiled."
    loader = ExtensionFileLoader("standin_extension", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def of_cuda():
    """Read PyTorch's own list of operations.

    Returns those whose wrapper on CUDA checks no devices (the kernel does, and takes
    0-dim tensors of the CPU), and those that CUDA has a kernel of its own for, and
    others only a composition."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    unchecked = set()
    kernels = []
    for function in yaml.load(path.read_text(), loader):
        name = function["func"].split("(")[0]
        if function.get("device_check") == "NoCheck":
            unchecked.add(name)
        of_key = {}
        for keys, kernel in (function.get("dispatch") or {}).items():
            of_key |= dict.fromkeys(keys.split(", "), kernel)
        composed = of_key.get("CompositeExplicitAutograd")
        if composed and of_key.get("CUDA", composed) != composed:
            kernels.append(name)
    return unchecked, kernels


class Device:
    "The context `torch.standin.device`: there is only one."

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def device_module():
    "Make `torch.standin`: what torch and other libraries ask of a device."
    module = types.ModuleType("torch.standin")

    def of_default(method):
        return lambda *arguments: method(module.default_generators[0], *arguments)

    for name in ("is_available", "is_initialized", "_is_initialized"):
        setattr(module, name, lambda: True)
    for name in ("set_device", "_lazy_init", "init", "empty_cache", "synchronize"):
        setattr(module, name, lambda *_: None)
    module._is_in_bad_fork = lambda: False
    module.is_bf16_supported = lambda *_: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.manual_seed = lambda seed: extension.manual_seed(int(seed) % 2**64)
    module.manual_seed_all = module.manual_seed
    module.initial_seed = extension.initial_seed
    module.memory_allocated = lambda *_: extension.memory()[0]
    module.max_memory_allocated = lambda *_: extension.memory()[1]
    module.reset_peak_memory_stats = lambda *_: extension.reset_peak()
    module.get_device_name = lambda *_: "stand-in"
    module.default_generators = (torch.Generator("standin"),)
    module.get_rng_state = lambda *_: of_default(torch.Generator.get_state)()
    module.set_rng_state = lambda x, *_: of_default(torch.Generator.set_state)(x)
    module.device = module.device_of = Device
    module.Stream = module.Event = type("Stream", (), {})
    return module


@contextmanager
def trace(classify):
    """Count, in a `Counter`, (kind, operation, *what `classify` makes of the frame).

    The frame is the innermost one of the main thread; autograd runs in another."""
    events = Counter()
    main = threading.main_thread().ident

    def note(kind, operation):
        frame = sys._current_frames()[main]
        if threading.get_ident() == main:
            frame = sys._getframe(1)
        events[(kind, operation, *classify(frame))] += 1

    extension.set_hook(note)
    try:
        yield events
    finally:
        extension.set_hook(None)


torch.utils.rename_privateuse1_backend("standin")
extension = load(compiled())
launches, syncs, reset = extension.launches, extension.syncs, extension.reset
extension.init(*of_cuda())
torch._register_device_module("standin", device_module())
sys.modules["torch.standin"] = torch.standin
torch.utils.generate_methods_for_privateuse1_backend()
# `.data` of a CPU tensor cannot become one of another kind; tied weights stay tied
torch.__future__.set_swap_module_params_on_conversion(True)
