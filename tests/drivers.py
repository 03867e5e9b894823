"""Scripts that run where bench's stand-in passes for a Hopper GPU's driver, and print what they find."""

import json
import subprocess
import sys
from typing import Any

INSTALLED = """
import json
import torch
from triton.runtime import driver
from bench.overhead import stand_in

driver.set_active(stand_in())
"""


def printed(script: str, prelude: str = INSTALLED) -> Any:
    """What a script prints as JSON, in a process of its own: the driver is one for a whole process."""
    command = [sys.executable, "-W", "ignore", "-c", prelude + script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
