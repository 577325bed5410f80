"""The driver: it names its target and its device; whatever would run a compiled kernel is not there."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


def _not_there(*args, **kwargs):
    raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")


class InterpreterDriver(DriverBase):
    is_active = staticmethod(lambda: True)
    get_current_target = staticmethod(lambda: GPUTarget("cpu", "interpreter", 1))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cpu)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    map_python_to_cpp_type = get_benchmarker = get_empty_cache_for_benchmark = clear_cache = launch = _not_there
