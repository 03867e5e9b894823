"""What the machine gives at best, measured in the run that it is compared with: a matrix product, and the clocks.

    rate = 2 n^3 / median time of an n x n x n product        random operands, as torch.matmul

The fraction of it is what a kernel can be blamed for: the rate moves with clocks and power, the datasheet's does not.
"""

import subprocess
from datetime import datetime, timezone
from typing import Any

import torch

from bench.measure import Effort, latency

SIZES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024)}
EFFORT = {"cuda": Effort(0.1, 0.4, 5), "cpu": Effort(0.0, 0.1, 5)}
READ = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
SMI_SECONDS = 20.0


def now() -> str:
    """The date and the time, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def question() -> list[str]:
    """The command that reads the clocks."""
    return ["nvidia-smi", f"--query-gpu={','.join(READ)}", "--format=csv,noheader"]


def answer(text: str) -> dict[str, str]:
    """What nvidia-smi said of the first GPU, by name; or the reason why it said nothing."""
    lines = text.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != len(READ):
        return {"absent": f"nvidia-smi answered {text.strip()[:80]!r}"}
    return dict(zip(READ, values, strict=True))


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature now; {"absent": reason} where they cannot be read."""
    if device.type != "cuda":
        return {"absent": f"the device is {device.type}"}
    try:
        done = subprocess.run(question(), capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"absent": f"nvidia-smi: {error}"}
    return answer(done.stdout if done.returncode == 0 else done.stderr)


def clocks_under(call: Any, device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature while call() is run again and again."""
    if device.type != "cuda":
        return clocks(device)
    try:
        asked = subprocess.Popen(question(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return {"absent": f"nvidia-smi: {error}"}
    for _ in range(1000):
        if asked.poll() is not None:
            break
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    try:
        return answer(asked.communicate(timeout=SMI_SECONDS)[0])
    except subprocess.TimeoutExpired:
        asked.kill()
        return {"absent": "nvidia-smi did not answer"}


def ceiling(device: torch.device, dtype: str, sizes: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The rate of matrix products of several sizes, and the clocks under the largest.

    Args:
        device: "cuda" or "cpu".
        dtype: of the operands; float32 is multiplied as torch.matmul does where nothing else is asked for.
        sizes: n, absent = those that fill the device.

    Returns:
        {"dtype", "date", "sizes": {n: {"tflops", "low", "high"}}, "tflops": the best median, "clocks"}.
    """
    found: dict[str, dict[str, float]] = {}
    generator = torch.Generator(device).manual_seed(0)
    read: dict[str, str] = {}
    sizes = sizes or SIZES[device.type]
    for n in sizes:
        a, b = (torch.randn(n, n, generator=generator, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> torch.Tensor:
            return torch.matmul(a, b, out=out)

        took = latency(product, device, EFFORT[device.type])
        work = 2 * n**3 / 1e9
        found[str(n)] = {"tflops": work / took.median, "low": work / took.p80, "high": work / took.p20}
        if n == sizes[-1]:
            read = clocks_under(product, device)
    best = max(rate["tflops"] for rate in found.values())
    return {"dtype": dtype, "date": now(), "sizes": found, "tflops": best, "clocks": read}
