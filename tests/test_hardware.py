import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from tinytrain import hardware
from tinytrain.hardware import (
    check_cuda_availability,
    choose_precision,
    cpu_flags,
    hardware_report,
    matmul_tflops,
)


@pytest.fixture
def gpu(monkeypatch):
    """Give this machine a GPU, as far as questions about it go."""

    def plug_in(name, major, minor):
        gpu = SimpleNamespace(name=name, major=major, minor=minor, total_memory=15_800_000_000)
        fakes = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda device=0: gpu,
            "mem_get_info": lambda device=0: (15_000_000_000, 15_800_000_000),
            # A tensor can be made in bf16 even where it is emulated.
            "_check_bf16_tensor_supported": lambda device: True,
        }
        for function, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, function, fake)

    return plug_in


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def commands(monkeypatch):
    """Answer commands from a dict; those that are not in it are not installed."""
    answers = {}

    def run(command, **options):
        if command[0] not in answers:
            raise FileNotFoundError(command[0])
        if isinstance(answers[command[0]], Exception):
            raise answers[command[0]]
        return SimpleNamespace(stdout=answers[command[0]])

    monkeypatch.setattr(subprocess, "run", run)
    return answers


@pytest.mark.parametrize(
    ("name", "major", "minor", "expected", "reason"),
    [
        ("NVIDIA A100-SXM4-40GB", 8, 0, "bf16", "computes bf16 itself"),
        ("NVIDIA H100 80GB HBM3", 9, 0, "bf16", "computes bf16 itself"),
        ("Tesla T4", 7, 5, "fp16", "only emulates bf16"),
        ("Tesla V100-SXM2-16GB", 7, 0, "fp16", "only emulates bf16"),
        ("Tesla P100-PCIE-16GB", 6, 0, "float32", "no tensor cores"),
    ],
)
def test_precision_on_a_gpu(gpu, name, major, minor, expected, reason):
    gpu(name, major, minor)
    assert torch.cuda.is_bf16_supported()  # which alone says nothing: it counts emulation
    precision = choose_precision()
    assert precision.name == expected
    assert f"{name} (compute capability {major}.{minor})" in precision.reason
    assert reason in precision.reason
    assert choose_precision("float32") == ("float32", "the recipe asks for it")


@pytest.mark.parametrize(
    ("cpuinfo", "gain", "expected"),
    [
        ("processor : 0\nflags\t: avx2 avx512_bf16\nbugs : x\n\nprocessor : 1\n", 2.5, "bf16"),
        ("flags : avx2 avx512f avx512_bf16 amx_bf16", 2.5, "bf16"),
        ("processor : 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n", 1.5, "bf16"),  # ARM
        # Seen on a Xeon whose AMX units its virtual machine hides.
        ("flags : avx2 avx512_bf16", 0.5, "float32"),
        ("flags : fpu avx2 avx512f", 0.25, "float32"),
        ("", 1.0, "float32"),
    ],
)
def test_linux_flags_and_a_measurement_decide(monkeypatch, no_gpu, cpuinfo, gain, expected):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(hardware, "_read", {"/proc/cpuinfo": cpuinfo}.get)
    speeds = {"float32": 0.31, "bf16": gain * 0.31}
    monkeypatch.setattr(hardware, "matmul_tflops", lambda name, seconds: speeds[name])
    monkeypatch.setattr(hardware, "_bf16_gain", hardware._bf16_gain.__wrapped__)  # no cache
    name, reason = choose_precision()
    assert name == expected
    flags = [flag for flag in cpuinfo.split() if flag.endswith("bf16")]
    assert all(flag in reason for flag in flags)
    assert (f"{gain:.1f} times" in reason) == bool(flags)


def test_another_program_does_not_decide_against_bf16(monkeypatch):
    """It was seen to slow one measurement to a third."""
    measured = {"bf16": iter((0.3, 0.9)), "float32": iter((0.2, 0.2))}
    monkeypatch.setattr(hardware, "matmul_tflops", lambda name, seconds: next(measured[name]))
    assert hardware._bf16_gain.__wrapped__() == pytest.approx(4.5)


@pytest.fixture
def apples_gpu(monkeypatch, no_gpu):
    """Give this machine Apple's GPU, as far as questions about it go."""

    def plug_in(macos, gain=1.0):
        speeds = {"float32": 2.5, "bf16": gain * 2.5}
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *asked: macos >= asked)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3 * 10**9)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * 10**9)
        monkeypatch.setattr(hardware, "matmul_tflops", lambda name, seconds: speeds[name])
        monkeypatch.setattr(hardware, "_bf16_gain", hardware._bf16_gain.__wrapped__)  # no cache

    return plug_in


@pytest.mark.parametrize(
    ("macos", "gain", "expected", "reason"),
    [
        ((13, 6), 2.0, "float32", "from macOS 14 on"),
        ((14, 0), 1.0, "float32", "1.0 times the speed of float32"),
        ((26, 1), 1.3, "bf16", "1.3 times the speed of float32"),
    ],
)
def test_on_apples_gpu_macos_and_a_measurement_decide(apples_gpu, macos, gain, expected, reason):
    apples_gpu(macos, gain)
    name, because = choose_precision()
    assert name == expected
    assert "Apple's GPU" in because and reason in because
    assert [hardware.computes(p) for p in ("float32", "fp16")] == [True, False]
    assert hardware.computes("bf16") == (macos >= (14, 0))


def test_memory_of_apples_gpu(apples_gpu, tmp_path):
    apples_gpu((15, 0))
    assert hardware.this_hardware(tmp_path).memory == 3 * 10**9
    assert hardware.peak_memory() == 2 * 10**9


def test_outside_linux_flags_come_from_pytorch(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    capabilities = {"avx512_bf16": True, "amx_bf16": False, "num_sockets": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_flags() == {"avx512_bf16"}
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a PyTorch that cannot say
    assert cpu_flags() == set()


def test_check_says_what_will_compute_and_notices_an_unusable_gpu(no_gpu, commands, capsys):
    assert check_cuda_availability() is False
    printed = capsys.readouterr().out
    assert "will run on the CPU" in printed and "cannot use it" not in printed
    commands["nvidia-smi"] = "NVIDIA GeForce RTX 4090\n"
    assert check_cuda_availability() is False
    printed = capsys.readouterr().out
    assert "RTX 4090" in printed and "install a CUDA build" in printed


def test_report_without_gpu_and_tools(no_gpu, commands, tmp_path):
    report = hardware_report(tmp_path / "not" / "made" / "yet")
    expected = "Python, platform, CPU, CPU cores, CPU flags, memory, GPU, GPU driver, PyTorch, "
    expected += "CUDA of PyTorch, free disk, precision, because"
    assert ", ".join(report) == expected
    assert all(isinstance(value, str) and value for value in report.values())
    assert report["GPU"] == report["GPU driver"] == "none"
    assert report["PyTorch"] == torch.__version__
    assert (report["precision"], report["because"]) == choose_precision()
    assert float(report["free disk"].removesuffix(" GB")) > 0
    for error in (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        commands["nvidia-smi"] = error(9, "nvidia-smi")
        assert hardware_report()["GPU driver"] == "none"


def test_check_and_report_with_gpu(gpu, commands, capsys):
    gpu("Tesla T4", 7, 5)
    commands["nvidia-smi"] = "580.65.06\n"
    assert check_cuda_availability() is True
    described = "Tesla T4, 15.8 GB, 15.0 GB free, compute capability 7.5"
    assert capsys.readouterr().out == f"CUDA is available: 1 GPU.\n  0: {described}\n"
    report = hardware_report()
    assert report["GPU"] == described
    assert report["GPU driver"] == "580.65.06"
    assert report["precision"] == "fp16"


V1 = "9:name=systemd:/\n4:memory:/job/7\n3:cpu,cpuacct:/job/7\n0::/"
GROUPS = {  # what files there are, and the cores and gigabytes that they leave
    "version 2, in a container": ({"cpu.max": "150000 100000", "memory.max": "2000000000"}, 1, 2),
    "version 2, no limit": ({"cpu.max": "max 100000", "memory.max": "max"}, 8, 16),
    "version 2, the job around has the limit": (
        {
            "proc": "0::/user.slice/job/step",
            "user.slice/job/step/memory.max": "max",
            "user.slice/job/step/cpu.max": "max 100000",
            "user.slice/job/memory.max": "3000000000",
            "user.slice/memory.max": "5000000000",
            "user.slice/cpu.max": "200000 100000",
        },
        2,
        3,
    ),
    "version 1, no limit": (
        {
            "proc": V1,
            "memory/job/7/memory.limit_in_bytes": "9223372036854771712",
            "cpu,cpuacct/job/7/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/job/7/cpu.cfs_period_us": "100000",
        },
        8,
        16,
    ),
    "version 1, a job": (
        {
            "proc": V1,
            "memory/job/7/memory.limit_in_bytes": "9223372036854771712",
            "memory/job/memory.limit_in_bytes": "4000000000",
            "cpu,cpuacct/job/7/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/job/7/cpu.cfs_period_us": "100000",
        },
        3,
        4,
    ),
    "version 1, in a container, which sees its own folder as the outermost": (
        {
            "proc": V1,
            "memory/memory.limit_in_bytes": "6000000000",
            "cpu/cpu.cfs_quota_us": "50000",
            "cpu/cpu.cfs_period_us": "100000",
        },
        1,
        6,
    ),
    "version 1, a container in a container": (
        {"proc": V1, "memory/memory.stat": "cache 7\nhierarchical_memory_limit 1000000000\nrss 7"},
        8,
        1,
    ),
    "version 2 beside version 1": (
        {"proc": V1.replace("0::/", "0::/a"), "unified/a/memory.max": "7000000000"},
        8,
        7,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_least_limit_of_a_container_or_job_counts(name, monkeypatch, tmp_path):
    files, cores, gigabytes = GROUPS[name]
    for path, text in files.items():
        at = "proc/self/cgroup" if path == "proc" else f"sys/fs/cgroup/{path}"
        (tmp_path / at).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / at).write_text(text + "\n")
    affinity = {"cpu_affinity": lambda self: list(range(8))}
    monkeypatch.setattr(psutil, "Process", type("Process", (), affinity))
    assert hardware._usable_cores(str(tmp_path)) == cores
    assert hardware._memory_limit(16 * 10**9, str(tmp_path)) == gigabytes * 10**9


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_jobs_cores_and_ulimit_count_and_pytorch_keeps_to_the_quota():
    code = """if True:
        import os, resource, torch
        from tinytrain import hardware
        resource.setrlimit(resource.RLIMIT_AS, (30 * 10**9, 30 * 10**9))
        torch.set_num_threads(6)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        hardware.use_no_more_cores()
        print(hardware._usable_cores(), hardware._memory_limit(10**15), torch.get_num_threads())
        """
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert shown[0] == "1" and int(shown[1]) <= 30 * 10**9 and shown[2] == "1"


def test_matmul_speed_is_a_positive_number():
    assert matmul_tflops("float32", size=64, seconds=0.01) > 0
    assert matmul_tflops("bf16", size=64, seconds=0.01) > 0
    with pytest.raises(ValueError, match="float64"):
        matmul_tflops("float64")


def test_what_this_machine_offers(tmp_path):
    here = hardware.this_hardware(tmp_path / "not" / "yet")
    assert len(cpu_flags()) > 5 or sys.platform != "linux"
    assert here.precision == choose_precision().name
    assert 1e9 < here.memory < 1e13 and 0 < here.disk
    assert 0.001 < here.tflops < 10_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the count can be reset on Linux")
def test_the_peak_of_memory_is_what_was_used_since_the_reset():
    before = hardware.peak_memory(reset=True)
    held = torch.ones(50_000_000)  # 200 MB
    assert hardware.peak_memory() - before > 150_000_000
    del held
    assert hardware.peak_memory() - before > 150_000_000  # it is a peak
    hardware.peak_memory(reset=True)
    assert hardware.peak_memory() - before < 150_000_000
