"""What this machine is, which precision suits it, and why.

Asking PyTorch "is bf16 supported?" is not enough: it says yes wherever bf16 can be emulated, and
emulated bf16 is slower than float32. So the choice here looks at what the hardware computes
itself (compute capability, CPU flags) and returns its reason along with the choice. The price is
a short list of facts about processors that will have to grow as they do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Hardware(NamedTuple):
    """What a machine offers for training."""

    name: str
    memory: int  # bytes that training may use, on the GPU if there is one
    precision: str  # see `choose_precision`
    tflops: float  # 10^12 operations a second in matrix products of that precision
    disk: int | None = None  # free bytes
    is_gpu: bool = True


# Dense peaks with float32 sums, as the makers state them.
KNOWN_GPUS = (
    Hardware("T4", 16 * 10**9, "fp16", 65),
    Hardware("L4", 24 * 10**9, "bf16", 121),
    Hardware("RTX 4090", 24 * 10**9, "bf16", 165),
    Hardware("A100-40G", 40 * 10**9, "bf16", 312),
    Hardware("H100-80G", 80 * 10**9, "bf16", 989),
)


class Precision(NamedTuple):
    """What the matrix products of training are computed in, and why."""

    name: str  # "bf16", "fp16" or "float32"
    reason: str


def check_cuda_availability() -> bool:
    """Return whether CUDA offers a GPU, and print which, or what training will use instead."""
    import torch

    if torch.cuda.is_available():
        gpus = _cuda_gpus()
        print(f"CUDA is available: {_count(len(gpus), 'GPU')}.")
        for index, gpu in enumerate(gpus):
            print(f"  {index}: {gpu}")
        return True
    cores = _count(_usable_cores(), "core")
    instead = "Apple's GPU (MPS)" if torch.backends.mps.is_available() else f"the CPU ({cores})"
    print(f"CUDA is not available. Training will run on {instead}.")
    if gpus := _nvidia_smi("name"):
        print(f"There is a GPU here ({gpus[0]}), but this PyTorch ({torch.__version__}) ", end="")
        print("cannot use it: install a CUDA build of PyTorch that fits the driver.")
    return False


def choose_precision(wanted: str | None = None) -> Precision:
    """Choose the precision to train in on this machine.

    bf16 where the hardware computes it: half the memory traffic with the range of float32. On a
    processor and on Apple's GPU, half a second of measuring decides whether that is faster. fp16 on
    GPUs that have only that: as fast, but small gradients vanish unless the loss is scaled up,
    which the Trainer does. float32 everywhere else.

    Parameters
    ----------
    wanted : {"bf16", "fp16", "float32"}, optional
        What a recipe asks for, whatever the machine.

    Examples
    --------
    >>> choose_precision().name in ("bf16", "fp16", "float32")
    True
    """
    import torch

    if wanted is not None:
        return Precision(wanted, "the recipe asks for it")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})"
        # Without the argument the answer is True on a T4, which emulates bf16.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", f"{name} computes bf16 itself, with the range of float32")
        if gpu.major >= 7:  # has tensor cores
            return Precision("fp16", f"{name} only emulates bf16, slowly; fp16 it computes itself")
        return Precision(
            "float32", f"{name} has no bf16 and no tensor cores: fp16 would gain little"
        )
    if torch.backends.mps.is_available():
        if computes("bf16"):
            return _the_faster("Apple's GPU (MPS) multiplies bf16")
        return Precision("float32", "Apple's GPU (MPS) has bf16 from macOS 14 on; this is older")
    return _choose_for_cpu(cpu_flags())


def computes(precision: str) -> bool:
    """Tell whether this machine has the precision in hardware, be it the fastest or not."""
    import torch

    if torch.cuda.is_available():
        return precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        has_bf16 = not cpu_flags().isdisjoint(_BF16_FLAGS)
    return precision == "float32" or (precision == "bf16" and has_bf16)


_CPUINFO = "/proc/cpuinfo"
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # the last is what Linux calls it on ARM


def _choose_for_cpu(flags: frozenset[str]) -> Precision:
    found = ", ".join(flag for flag in _BF16_FLAGS if flag in flags)
    if not found:
        reason = "this CPU does not multiply bf16 in hardware (no amx_bf16, no avx512_bf16), "
        return Precision("float32", reason + "and emulating it costs more than it saves")
    # With the flag, some chips still run at half the speed of float32.
    return _the_faster(f"this CPU multiplies bf16 in hardware ({found})")


def _the_faster(found: str) -> Precision:
    """Return bf16 if this machine multiplies it faster than float32."""
    gain = _bf16_gain()
    reason = f"{found}, measured at {gain:.1f} times the speed of float32"
    return Precision("bf16" if gain > 1.1 else "float32", reason)


@functools.cache
def _bf16_gain() -> float:
    """Measure how many times as fast as float32 this machine multiplies bf16."""
    # The better of two measurements each: another program may have slowed one of them down.
    rounds = [[matmul_tflops(n, seconds=0.1) for n in ("bf16", "float32")] for _ in range(2)]
    bf16, float32 = map(max, zip(*rounds, strict=True))
    return bf16 / float32


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of this CPU, as the operating system names them.

    For example ``{"avx2", "avx512f", "avx512_bf16", ...}``; empty if nothing could be read.
    """
    if platform.system() == "Linux":
        # x86 and ARM name the field differently.
        return frozenset((_field(_CPUINFO, "flags") or _field(_CPUINFO, "Features")).split())
    import torch

    # Elsewhere recent versions of PyTorch ask the processor itself.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return frozenset(name for name, value in capabilities.items() if value is True)


def hardware_report(path: str | Path = ".") -> dict[str, str]:
    """Describe this machine, for a table; what cannot be found out reads "unknown" or "none".

    The free space is that of the disk of `path`, which need not exist yet.
    """
    import psutil
    import torch

    flags = cpu_flags()
    known = ("avx2", "avx512f", "avx512_f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    memory = psutil.virtual_memory()
    total = _memory_limit(memory.total)
    physical = psutil.cpu_count(logical=False) or "unknown"
    precision = choose_precision()
    return {
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "CPU": _cpu_name(),
        "CPU cores": f"{_usable_cores()} usable, {physical} physical, {psutil.cpu_count()} logical",
        "CPU flags": ", ".join(flag for flag in known if flag in flags) or "unknown",
        "memory": f"{_gigabytes(total)}, {_gigabytes(min(memory.available, total))} available",
        "GPU": _gpus(),
        "GPU driver": next(iter(_nvidia_smi("driver_version")), "none"),
        "PyTorch": torch.__version__,
        "CUDA of PyTorch": torch.version.cuda or "none",
        "free disk": _gigabytes(_free_disk(path)),
        "precision": precision.name,
        "because": precision.reason,
    }


def this_hardware(path: str | Path = ".") -> Hardware:
    """Return what this machine offers, its speed measured in about a second.

    The free space is that of the disk of `path`, which need not exist yet.
    """
    import psutil
    import torch

    name, memory = _cpu_name(), _memory_limit(psutil.virtual_memory().total)
    if is_gpu := torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, memory = gpu.name, gpu.total_memory
    elif torch.backends.mps.is_available():  # it shares the memory, and may use most of it
        memory = min(memory, torch.mps.recommended_max_memory())
    precision = choose_precision().name
    speed = max(matmul_tflops(precision, seconds=0.3) for _ in range(3))  # others may work here too
    return Hardware(name, memory, precision, speed, _free_disk(path), is_gpu)


def use_no_more_cores() -> None:
    """Let PyTorch, which sees no quota, start no more threads than there are usable cores."""
    import torch

    if torch.get_num_threads() > _usable_cores() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_usable_cores())


def machine_name() -> str:
    """Return the name of the GPU, or that of the processor and how many cores can be used."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).name
    return f"{_cpu_name()}, {_count(_usable_cores(), 'core')}"


def peak_memory(reset: bool = False) -> int:
    """Return the most memory that this process has used so far, in bytes.

    On a GPU that is what PyTorch has reserved there (on Apple's, now: it keeps no peak), elsewhere
    resident memory. With `reset` it is counted from now on, which only CUDA and Linux can do.
    """
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_reserved()
    if torch.backends.mps.is_available():
        return torch.mps.driver_allocated_memory()
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    if kibibytes := _field("/proc/self/status", "VmHWM"):
        return int(kibibytes.split()[0]) * 1024
    if platform.system() == "Windows":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def matmul_tflops(precision_name: str, size: int = 1024, seconds: float = 0.5) -> float:
    """Measure how many 10^12 operations a second this machine makes, on the GPU if there is one.

    That is an upper bound for training, which spends time on much else. What counts is the ratio
    between two precisions.

    Parameters
    ----------
    precision_name : {"float32", "bf16", "fp16"}
        Type of the two square matrices that are multiplied.
    size : int
        Their rows and columns.
    seconds : float
        How long to measure, about.
    """
    import torch

    types = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision_name not in types:
        raise ValueError(f"precision {precision_name!r} is none of float32, bf16, fp16")
    use_no_more_cores()
    mps = torch.backends.mps.is_available()
    device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    synchronize = getattr(torch, device).synchronize
    left, right = (torch.randn(size, size, device=device).to(types[precision_name]) for _ in "ab")

    def measure(products: int) -> float:
        synchronize()  # a GPU works on after the call returns, so wait before and after
        start = time.perf_counter()
        for _ in range(products):
            left @ right
        synchronize()
        return time.perf_counter() - start

    left[:64, :64] @ right[:64, :64]  # the very first product pays for loading the library
    products = 1
    while (elapsed := measure(products)) < seconds / 2:
        products *= 2
    return products * 2 * size**3 / elapsed / 1e12


def _free_disk(path: str | Path) -> int:
    """Return the bytes that are free where a folder is or will be."""
    folder = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def _cuda_gpus() -> list[str]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu, (free, _) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        memory = f"{_gigabytes(gpu.total_memory)}, {_gigabytes(free)} free"
        gpus.append(f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}")
    return gpus


def _gpus() -> str:
    import torch

    if torch.cuda.is_available():
        return "; ".join(_cuda_gpus())
    if torch.backends.mps.is_available():
        return "Apple (MPS), shares the memory"
    if gpus := _nvidia_smi("name"):
        return f"{', '.join(gpus)}, which this build of PyTorch cannot use"
    return "none"


def _nvidia_smi(field: str) -> list[str]:
    """Return what the driver says of each GPU; nothing if there is no driver."""
    return _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").splitlines()


def _output(*command: str) -> str:
    """Return what a command prints; nothing if it is missing, fails or hangs."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _field(path: str, name: str) -> str:
    """Return the first value of a field in a file of ``name: value`` lines, if there is one."""
    found = re.search(rf"^{name}\s*:(.*)$", _read(path), re.MULTILINE)
    return found[1].strip() if found else ""


def _cpu_name() -> str:
    name = _field(_CPUINFO, "model name") or _output("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine() or "unknown"  # sysctl: on a Mac


def _usable_cores(root: str = "/") -> int:
    """Return how many cores this process may use: fewer than there are in a container or job."""
    import psutil

    cores = psutil.cpu_count() or 1
    if hasattr(psutil.Process, "cpu_affinity"):  # Linux and Windows; a cpuset counts as well
        cores = len(psutil.Process().cpu_affinity())
    for group in _control_groups("cpu", root):
        quota = _read(f"{group}/cpu.max")
        quota = quota or _read(f"{group}/cpu.cfs_quota_us") + _read(f"{group}/cpu.cfs_period_us")
        if numbers := re.match(r"(\d+)\s+(\d+)", quota):
            cores = min(cores, max(1, int(numbers[1]) // int(numbers[2])))
    return cores


def _memory_limit(total: int, root: str = "/") -> int:
    """Return the memory this process may use: less than there is in a container or job."""
    limits = [total]
    for group in _control_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes", "memory.stat"):
            pattern = r"^(?:hierarchical_memory_limit )?(\d+)$"
            limits += map(int, re.findall(pattern, _read(f"{group}/{name}"), re.MULTILINE))
    with contextlib.suppress(ImportError):  # Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]  # ulimit -v
        limits += [limit] if limit != resource.RLIM_INFINITY else []
    return min(limits)


def _control_groups(controller: str, root: str) -> Iterator[PurePosixPath]:
    """Yield the folders of this process's control group and of those around it (Linux)."""
    for line in (_read(f"{root}/proc/self/cgroup") or "0::/").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        # Version 1 has a tree for each controller or two; version 2 one, elsewhere beside those.
        for tree in (names, controller) if names else ("", "unified"):
            group = PurePosixPath("/", path)
            for part in (group, *group.parents):  # in a container only the last may be there
                yield PurePosixPath(root, "sys/fs/cgroup", tree, str(part)[1:])


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
