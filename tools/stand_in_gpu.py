"""An sm_90 GPU played by the CPU, for all Python of a process: to rehearse what will run on a GPU (tools/gpu_carry.py).

    python -c 'from tools import stand_in_gpu as s; s.write(s.Path("folder"))'
    PYTHONPATH=folder:. python -m pytest -m gpu tests/integrations

Tensors on "cuda" say that they are there, and hold one on the CPU, on which every operation runs. The backends cuda and
triton choose, check and prepare as on a GPU; then ops of the CPU compute what their kernels would. Triton's kernels are
compiled for sm_90 and kept in its cache where a driver is not asked for (TRITON_CACHE_DIR), as their launch would. A
CUDA graph is a tape of operations, which replays into the tensors that it was recorded with. Streams do nothing,
events tell the time, memory is not counted, and torch.compile compiles nothing."""

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import tempfile
import time
import types
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

NAME, CAPABILITY, PROCESSORS = "NVIDIA H200, played by a CPU", (9, 0), 132
GPU = torch.device("cuda", 0)


class OnGpu(torch.Tensor):
    """A tensor that is on the GPU as far as Python sees; `host` has its values, in the same strides."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "OnGpu":
        own = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=GPU
        )
        own.host = host
        return own

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = OnGpu(self.host.detach().clone())
            own = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if own else copy
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        stays = kwargs.get("device") is None or is_gpu(kwargs["device"])
        if kwargs.get("device") is not None and stays:
            kwargs["device"] = torch.device("cpu")
        return run(func, args, kwargs, stays)


class Tape:
    """What is done while a graph is captured, with the values that were changed by it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, tensors: Any) -> None:
        for tensor in tensors:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))

    def undo(self) -> None:
        for whole, value in self.before.values():
            whole.copy_(value)

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_of(result), tensors_of(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


tape: Tape | None = None
_NO_SCHEMA = types.SimpleNamespace(arguments=(), returns=())


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def to_host(tree: Any) -> Any:
    return pytree.tree_map_only(OnGpu, lambda tensor: tensor.host, tree)


def run(func: Any, args: Any, kwargs: Any, stays: bool = True, changed: Any = ()) -> Any:
    """`func` on the host; what it gives is on the GPU if it `stays` there, a tensor that was given is that one."""
    given = {id(tensor.host): tensor for tensor in tensors_of((args, kwargs)) if isinstance(tensor, OnGpu)}
    args, kwargs = to_host(args), to_host(kwargs)
    if tape is not None:
        named = zip(getattr(func, "_schema", _NO_SCHEMA).arguments, args)
        written = [value for argument, value in named if argument.is_write]
        tape.keep(tensors_of([written, to_host(list(changed)), kwargs.get("out")]))
    result = func(*args, **kwargs)
    if tape is not None:
        tape.calls.append((func, args, kwargs, result))

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if not stays else given[id(tensor)] if id(tensor) in given else OnGpu(tensor)

    # A view of what was made outside of inference mode counts changes as that does.
    views = any(returned.alias_info is not None for returned in getattr(func, "_schema", _NO_SCHEMA).returns)
    counts = views and any(not tensor.is_inference() for tensor in given.values())
    with torch.inference_mode(False) if counts else contextlib.nullcontext():
        return pytree.tree_map_only(torch.Tensor, placed, result)


def is_gpu(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


class Moves(TorchFunctionMode):
    """What makes tensors on the GPU, or moves them there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].host.tolist()
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnGpu) and isinstance(args[1], list):
            return run(func, args, kwargs)  # torch would move the indices to the GPU
        if kwargs.pop("pin_memory", False):
            return func(*args, **kwargs)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            kwargs |= {"device": args[1].device, "dtype": args[1].dtype}
            args = args[:1]
        if func is torch.Tensor.cuda:
            func, args, kwargs = torch.Tensor.to, (args[0], GPU), {}
        wanted = any(is_gpu(value) for value in (*args, *kwargs.values()))
        if not wanted or func is torch.device:
            return func(*args, **kwargs)
        on_gpu = (args and isinstance(args[0], OnGpu)) or func.__name__ == "_parse_to"
        place = GPU if on_gpu else torch.device("cpu")
        args = tuple(place if is_gpu(value) else value for value in args)
        kwargs = {name: place if is_gpu(value) else value for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        if on_gpu:
            return result
        return pytree.tree_map_only(torch.Tensor, lambda t: t if isinstance(t, OnGpu) else OnGpu(t.detach()), result)


class Stream:
    """Does nothing."""

    cuda_stream, device, device_index = 0, GPU, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, other: Any) -> None: ...
    def record_event(self, event: Any = None) -> "Event":
        event = event or Event()
        event.record()
        return event


class Event:
    """Of the host's clock."""

    seconds = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds)

    def synchronize(self) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True


class CUDAGraph:
    """A tape; capturing runs nothing that is seen afterwards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        self.tape.replay()

    def reset(self) -> None:
        self.tape = Tape()

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextlib.contextmanager
def graph(captured: CUDAGraph, *args: Any, **kwargs: Any) -> Any:
    global tape
    tape = captured.tape
    try:
        yield
    finally:
        tape = None
        captured.tape.undo()


@contextlib.contextmanager
def nothing(*args: Any, **kwargs: Any) -> Any:
    yield


def play_cuda() -> None:
    """Put the functions of torch.cuda that the project and its benchmarks use in the place of torch's."""

    def gives(value: Any) -> Any:
        return lambda *args, **kwargs: value  # one for each name: torch's compiler has a rule for every function

    properties = types.SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=PROCESSORS, total_memory=140 << 30,
        L2_cache_size=60 << 20, max_threads_per_multi_processor=2048, warp_size=32, gcnArchName="",
    )  # fmt: skip
    stream = Stream()
    results = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "get_device_capability": CAPABILITY, "get_device_name": NAME, "get_device_properties": properties,
        "current_stream": stream, "default_stream": stream, "graph_pool_handle": (0, 0),
        "mem_get_info": (properties.total_memory, properties.total_memory),
    }  # fmt: skip
    results |= dict.fromkeys(("memory_reserved", "max_memory_reserved", "memory_allocated", "max_memory_allocated"), 0)
    idle = "init", "_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"
    idle += "set_sync_debug_mode", "_sleep", "manual_seed", "manual_seed_all"
    played = {name: gives(value) for name, value in (results | dict.fromkeys(idle)).items()}
    played |= {"device": nothing, "stream": nothing, "Stream": Stream, "Event": Event}
    played |= {"CUDAGraph": CUDAGraph, "graph": graph, "is_current_stream_capturing": lambda: tape is not None}
    for name, value in played.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = gives(0)
    torch._C._ensureCUDADeviceGuardSet()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # nothing else makes a parameter an OnGpu
    torch.compile = lambda model=None, **options: model if model is not None else lambda function: function

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu")

    torch.Generator = Generator  # type: ignore[misc]


def play_backends() -> None:
    """Let the backends of a GPU compute on the host what their kernels would."""
    from modiff_kernels import ops
    from modiff_kernels.backends import cuda, reference, triton
    from modiff_kernels.backends.triton import product_launch, quantize_launch
    from modiff_kernels.ops import check, dispatch

    kept: dict[Any, Any] = {}
    dispatch.EAGER_TYPES += (OnGpu,)

    def quantize(*args: Any) -> Any:
        changed = args[2], args[8] if len(args) > 8 else None  # x_hat, last_absmax
        return run(reference.quantize, args, {}, changed=changed)

    def exact(codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out):  # type: ignore[no-untyped-def]
        """The sums by the fastest backend of the host, what is made of them by the reference."""
        args = codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out
        problem = check.product(*args)
        if weight.geglu or weight.group_size != -1 or (problem.granularity == "per_token" and not problem.is_pointwise):
            return reference.product(*args)
        key = problem, weight.packed.data_ptr()
        if key not in kept:  # with the portable one, so that its memory stays its own
            layout = ops.preferred_layout(problem)
            ones = weight._replace(scale=torch.ones_like(weight.scale))
            kept[key] = weight, ops.prepare_weight(ones, problem.k, window, layout)
        no_state = None, None, None, window, torch.float32
        sums = ops.product(codes, torch.ones_like(scale), zero_point, kept[key][1], *no_state)
        rows, columns = reference.per_row(scale, sums.shape, window), reference.per_channel(weight.scale, window)
        return reference.finish(sums * (rows * columns), y_hat, bias, skip, window, out_dtype, write_out)

    def product(*args: Any) -> Any:
        return run(exact, args[:10], {}, changed=(args[4],))  # y_hat

    def compiled_first(of_triton: Any, played: Any) -> Any:
        def both(*args: Any) -> Any:
            of_triton(*args)  # whose launches do nothing
            return played(*args)

        return both

    reference._require_finite = lambda *bounds: None  # type: ignore[assignment] # a GPU does not look
    cuda.quantize = quantize
    cuda.product = cuda.product_launch.product = product
    triton.quantize = quantize_launch.quantize = compiled_first(quantize_launch.quantize, quantize)
    triton.product = product_launch.product = compiled_first(product_launch.product, product)


DRIVER = """
#include <cuda.h>
#include <string.h>
#define DONE { return CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) DONE
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; DONE }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; DONE }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; DONE }
CUresult cuCtxSetCurrent(CUcontext context) DONE
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; DONE }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) DONE
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : 232448; /* bytes of shared memory */
  DONE
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  DONE
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) DONE
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) DONE
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "none"; DONE }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; DONE }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)1;
  DONE
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);
  DONE
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) DONE
"""
"""What Triton asks of a driver."""
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
"""What a torch for CPUs lacks, which asks on which device it is before it takes a value out of a tensor."""


def load(source: str, name: str, *options: str) -> Path:
    """Compile `source` as the library `name`, once, and load it; its folder."""
    folder = Path(tempfile.gettempdir()) / f"stand_in_gpu-{zlib.crc32(repr((source, options)).encode()):x}"
    library = folder / name
    if not library.exists():
        folder.mkdir(exist_ok=True)
        new = folder / f"{os.getpid()}.so"
        flags = ("-shared", "-fPIC", f"-Wl,-soname,{name}", *options, "-o", str(new), "-")
        subprocess.run([os.environ.get("CXX", "g++"), *flags], input=source, text=True, check=True)
        new.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder


def play_driver() -> None:
    """Put a driver that does nothing in the place of libcuda, for what Triton compiles and loads."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
        os.environ["TRITON_LIBCUDA_PATH"] = str(load(DRIVER, "libcuda.so.1", "-x", "c", f"-I{include}"))


def write(folder: Path) -> None:
    """Make the module in `folder` that lets Python begin with the stand-in where the folder is on PYTHONPATH."""
    (folder / "sitecustomize.py").write_text("from tools import stand_in_gpu\n\nstand_in_gpu.play()\n")


def play() -> None:
    if torch.version.cuda is None:
        folder = Path(torch.__file__).parent
        linked = "-Wl,--no-as-needed", f"-L{folder / 'lib'}", "-lc10"
        load(GUARD, "guard.so", "-x", "c++", "-std=c++20", f"-I{folder / 'include'}", *linked)
    play_driver()
    play_cuda()
    play_backends()
    Moves().__enter__()
