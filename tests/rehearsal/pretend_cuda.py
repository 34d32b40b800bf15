"""A pretended CUDA device for machines without one: programs take their CUDA branches, data stay in host memory.

    pretend_cuda.install(FOLDER)            # before anything asks torch.cuda.is_available(), or imports Megatron
    with pretend_cuda.watch() as log: ...   # log["syncs"], log["notes"]: lines of source with counts

`pretend_cuda.cpp` registers a boxed fallback under torch's CUDA dispatch key, in place of the kernels that torch's CUDA
build has there: operands become CPU tensors over the same memory, the operator runs on them, and results come back as
CUDA tensors (aliasing is kept). These are plain tensors with plain storages: autograd, views, `.data =`, Parameter and
DeepSpeed work. Operands on two devices are refused unless zero-dimensional, as CUDA does. A TorchDispatchMode notes
what would make the host wait for the device, with the line of Python that did it; `torch.cuda` gets stand-ins (streams,
events, generators). A non-blocking copy to the host holds poison until its stream has been waited for, so early reads
show.

Not pretended: kernels' own restrictions (but grouped_mm's are checked), numerics, asynchronous errors and NCCL (gloo is
used). It needs a machine without a GPU, and a C++ compiler.
"""

import contextlib
import sys
import traceback
from collections import Counter
from pathlib import Path

import launches
import torch
import torch.profiler
import torch.utils.cpp_extension
from early_reads import poison
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Stream:
    """A stream that only remembers whom it waited for; `handle` tells streams apart."""

    def __init__(self, *_args, handle=None, **_options):
        self.handle = self.cuda_stream = id(self) if handle is None else handle
        self.device, self.device_index, self.before = torch.device("cuda", 0), 0, []

    def wait_stream(self, other):
        self.before.append(other)

    def wait_event(self, event):
        self.before.append(event.stream or DEFAULT)

    def record_event(self, event=None):
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self):
        _note("Stream.synchronize")
        _arrive(self)

    query = staticmethod(lambda: True)

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


class _Event:
    stream = None

    def __init__(self, *_args, **_options):
        pass

    def record(self, stream=None):
        self.stream = stream or _current()

    def wait(self, stream=None):
        (stream or _current()).wait_event(self)

    def synchronize(self):
        _note("Event.synchronize")
        _arrive(self.stream or DEFAULT)

    query = staticmethod(lambda: True)
    elapsed_time = staticmethod(lambda _other: 1.0)


DEFAULT = _Stream(handle=0)
_streams = [DEFAULT]
_pending = []  # (stream, poisoned host tensor, what it will hold)
WATCH = None


def _current(_device=None):
    return _streams[-1]


@contextlib.contextmanager
def _on_stream(stream):
    _streams.append(stream or _current())
    try:
        yield
    finally:
        _streams.pop()


def _arrive(stream, seen=()):
    """The host has waited for a stream: what it copies to the host is there."""
    for entry in [e for e in _pending if e[0] is stream]:
        entry[1].copy_(entry[2])
        _pending.remove(entry)
    for other in [s for s in stream.before if s not in seen]:
        _arrive(other, (*seen, stream))


def _device_synchronize(_device=None):
    _note("torch.cuda.synchronize")
    for stream in {id(e[0]): e[0] for e in _pending}.values():
        _arrive(stream)


def _note(kind, kinds="syncs"):
    if WATCH is not None and WATCH.log is not None:
        WATCH.log[kinds][f"{kind:28} {_where()}"] += 1


def _where(depth=2):
    """The lines that asked for it, innermost first: of Megatron, DeepSpeed and ours; in backward passes the node."""
    node = torch._C._current_autograd_node()
    prefix = f"[{node.name()}] " if node is not None else ""
    skip = ("/torch/", "pretend_cuda", "/contextlib", "/usr/", "<")
    frames = [f for f in reversed(traceback.extract_stack()) if not any(part in f.filename for part in skip)]
    return prefix + " < ".join(f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno}" for f in frames[:depth])


def _to_cpu(x):
    return torch.ops.pretend_cuda.as_cpu(x) if isinstance(x, torch.Tensor) and x.is_cuda else x


_SIZED_BY_DATA = (
    "equal",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique",
    "_unique2",
    "bincount",
    "unique_consecutive",
)


class Watch(TorchDispatchMode):
    """Sees every operator. While `log` is set: `syncs` and `notes`, a line of each kind with how often."""

    log = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        space, name = func._schema.name.split("::")
        if space == "c10d":  # NCCL waits on the device; gloo does its work on the same memory
            _note(f"collective {name}", "notes")
            return func(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs))
        if not any(t.is_cuda for t in tensors):
            if name == "_to_copy" and torch.device(kwargs.get("device") or "cpu").type == "cuda":
                self._to_device(tensors[0], kwargs.get("non_blocking"))
            return func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs)
        if name == "_local_scalar_dense":
            self._blocks("item")
        elif (
            name == "equal" or name in _SIZED_BY_DATA or (name == "repeat_interleave" and not kwargs.get("output_size"))
        ):
            self._blocks(name)
        elif name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            by_bool = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
            if by_bool and (name == "index" or args[2].numel() > 1):
                self._blocks(f"{name} by bool")
        elif name == "_grouped_mm":
            return self._grouped(func, *args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _blocks(kind):
        _note(kind)
        _arrive(_current())

    def _to_device(self, source, non_blocking):
        if non_blocking and source.is_pinned():
            return
        if non_blocking:
            _note("H2D pageable, non_blocking", "notes")
        else:
            self._blocks("H2D blocking")

    def _copy(self, func, name, args, kwargs):
        if name == "copy_":
            to, source, non_blocking = args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if to.is_cuda and not source.is_cuda and source.dim() + source.numel() > 1:
                self._to_device(source, non_blocking)
            elif source.is_cuda and not to.is_cuda:
                if not (non_blocking and to.is_pinned()):
                    self._blocks("D2H copy_")
                else:
                    return self._later(to, func(to.clone(), source))
            return func(*args, **kwargs)
        if torch.device(kwargs.get("device") or "cuda").type == "cuda":
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking"):
            self._blocks("D2H blocking")
            return func(*args, **kwargs)
        real = func(*args, **{**kwargs, "non_blocking": False})
        return self._later(torch.empty_like(real).pin_memory(), real)  # as torch's own is

    @staticmethod
    def _later(result, real):
        _note("D2H async", "notes")
        poison(result)
        _pending.append((_current(), result, real))
        return result

    def _grouped(self, func, a, b, offs=None, **options):
        if offs is not None and not offs.is_cuda:
            raise RuntimeError("grouped_mm: offs must be on the device (pretended)")
        if {a.dtype, b.dtype} != {torch.bfloat16}:
            self._blocks(f"grouped_mm {str(a.dtype)[6:]} fallback")
        for x in (a, b):
            if torch.ops.pretend_cuda.as_cpu(x).data_ptr() % 16:  # CUDA alone asks for this
                raise RuntimeError("grouped_mm: expected data_ptr to be aligned to 16 bytes (pretended)")
        if a.dim() == b.dim() == 2 and (a.stride(-1) == 1 or b.stride(-1) != 1) and (offs.diff() == 0).any():
            raise RuntimeError("grouped_mm: an empty group wants A^T and B row-major (pretended)")
        if not a.numel() or not b.numel():
            raise RuntimeError("grouped_mm: null pointers of a product without rows (pretended)")
        out = func(a, b, offs, **options)
        if offs is not None and a.dim() == 2:  # what no group covers is left as it was in memory
            of_rows = torch.arange(len(a), device=a.device) >= offs[-1]
            uncovered = of_rows[:, None] if b.dim() == 3 else (offs.diff(prepend=offs.new_zeros(1)) == 0)[:, None, None]
            out.masked_fill_(uncovered, float("nan"))
        return out


class _Functions(TorchFunctionMode):
    """What operators do not show: tensors made from Python numbers, and which attention CUDA would take."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            data = args[0] if args else kwargs["data"]
            target = kwargs["device"]
            on_cuda = isinstance(target, int) or torch.device(target).type == "cuda"
            if on_cuda and not isinstance(data, torch.Tensor):
                Watch._blocks("torch.tensor(device=cuda)")
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, _, v = args[:3]
            flash = q.dtype != torch.float32 and kwargs.get("attn_mask") is None and q.shape[-1] == v.shape[-1] <= 256
            efficient = not kwargs.get("enable_gqa")
            _note(f"attention: {'flash' if flash else 'memory-efficient' if efficient else 'MATH, S x S'}", "notes")
        return func(*args, **kwargs)


@contextlib.contextmanager
def watch():
    """Counts of what happens meanwhile: {"syncs": Counter, "notes": Counter}."""
    WATCH.log = {"syncs": Counter(), "notes": Counter()}
    try:
        yield WATCH.log
    finally:
        WATCH.log = None


def _profile_the_host_only():
    """torch's profiler would ask for CUDA events at every operator, and raise and swallow an error each time."""
    profile = torch.profiler.profile
    start = profile.__init__

    def start_on_host(self, *, activities=None, **options):
        start(self, activities=[torch.profiler.ProfilerActivity.CPU], **options)

    profile.__init__ = start_on_host


def install(build=None):
    """Pretend from here on, in this process."""
    global WATCH
    import torch._dynamo  # which must see torch as it was: modes import it

    torch.compile = launches.compiled  # no Triton here

    source = str(Path(__file__).with_suffix(".cpp"))
    torch.utils.cpp_extension.load(
        "pretend_cuda_ext", source, is_python_module=False, build_directory=build, extra_cflags=["-O0", "-w"]
    )
    for kind in ("flash", "mem_efficient", "cudnn"):  # the CUDA build's kernels
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    cuda = torch.cuda
    properties = type("Properties", (), {"name": "NVIDIA H100 80GB HBM3 (pretended)", "major": 9, "minor": 0,
        "total_memory": 80 << 30, "multi_processor_count": 132, "pci_domain_id": 0, "pci_bus_id": 0,
        "pci_device_id": 0, "uuid": "0", "gcnArchName": ""})()  # fmt: skip
    nothing, zero = (lambda *_a, **_k: None), (lambda *_a, **_k: 0)
    get_state, set_state = torch._C.Generator.get_state, torch._C.Generator.set_state
    stand_ins = dict(
        is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        _lazy_init=nothing, init=nothing, _lazy_call=lambda f, **_k: f(), set_device=nothing, empty_cache=nothing,
        synchronize=_device_synchronize, Stream=_Stream, Event=_Event, stream=_on_stream, current_stream=_current,
        default_stream=lambda *_a, **_k: DEFAULT, set_stream=lambda s: _streams.__setitem__(-1, s),
        get_rng_state=lambda *_a, **_k: get_state(torch.default_generator),
        set_rng_state=lambda s, *_a, **_k: set_state(torch.default_generator, s),
        get_rng_state_all=lambda: [get_state(torch.default_generator)],
        manual_seed=nothing, manual_seed_all=nothing, seed=nothing, initial_seed=zero,
        default_generators=(torch.default_generator,), get_device_name=lambda *_a, **_k: properties.name,
        get_device_properties=lambda *_a, **_k: properties, get_device_capability=lambda *_a, **_k: (9, 0),
        is_bf16_supported=lambda *_a, **_k: True, memory_allocated=zero, max_memory_allocated=zero,
        memory_reserved=zero, max_memory_reserved=zero, reset_peak_memory_stats=nothing,
        memory_stats=lambda *_a, **_k: {},
        mem_get_info=lambda *_a, **_k: (80 << 30, 80 << 30), is_current_stream_capturing=lambda: False,
        device=lambda *_a, **_k: contextlib.nullcontext(), _is_in_bad_fork=lambda: False, ipc_collect=nothing,
    )  # fmt: skip
    for name, value in stand_ins.items():
        setattr(cuda, name, value)
        if hasattr(cuda.random, name):
            setattr(cuda.random, name, value)
    cuda.memory._record_memory_history = nothing
    cuda.memory._dump_snapshot = lambda path, *_a, **_k: Path(path).write_bytes(b"")
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, nothing)
    torch.Tensor.record_stream = nothing
    _profile_the_host_only()
    start = torch.distributed.init_process_group

    def init_process_group(backend=None, **options):
        options.pop("device_id", None)
        start("gloo", **options)

    torch.distributed.init_process_group = init_process_group
    groups = torch.distributed.new_group
    torch.distributed.new_group = lambda *a, **k: groups(*a, **{**k, "backend": "gloo", "pg_options": None})
    WATCH = Watch()
    WATCH.__enter__()
    _Functions().__enter__()
    return sys.modules[__name__]
