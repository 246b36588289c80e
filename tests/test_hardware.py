import os
import subprocess
import sys
from types import SimpleNamespace

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


def test_apples_gpu_computes_float32(monkeypatch, no_gpu):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    name, reason = choose_precision()
    assert name == "float32" and "MPS" in reason


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


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_a_containers_limits_count(no_gpu, monkeypatch):
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/memory.max": "2000000000\n",
    }
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    report = hardware_report()
    assert report["CPU cores"].startswith("1 usable")
    assert report["memory"].startswith("2.0 GB")
    files.update({"/sys/fs/cgroup/cpu.max": "max 100000\n", "/sys/fs/cgroup/memory.max": "max\n"})
    assert hardware_report()["CPU cores"].startswith("8 usable")


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
