"""What this machine has, as far as can be seen without torch: its GPUs, and the way to another machine."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_DEVICES = Path("/dev")
_SIOCGIFADDR = 0x8915
_NO_WAY = "lo"


def gpu_count(environ: Mapping[str, str] | None = None) -> int:
    """Returns the number of NVIDIA GPUs that a rank would see; CUDA_VISIBLE_DEVICES is respected."""
    env = os.environ if environ is None else environ
    visible = env.get("CUDA_VISIBLE_DEVICES")
    there = len(list(_DEVICES.glob("nvidia[0-9]*"))) or _listed_gpus()
    if visible is None or not there:
        return there
    count = 0
    for name in visible.split(","):
        if not name.strip() or name.strip().startswith("-"):
            break  # CUDA takes no notice of what follows an invalid entry
        count += 1
    return count


def _listed_gpus() -> int:
    """Asks nvidia-smi: under WSL there are GPUs without device files of their own."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def interface_to(host: str) -> str | None:
    """Returns the network interface whose address this machine uses to speak to a host ("eth0").

    Returns:
        the name; None where it cannot be told (no IPv4 way there, not Linux).
    """
    if sys.platform != "linux":
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return _NO_WAY
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None)


def _address_of(interface: str) -> str | None:
    """Returns an interface's IPv4 address; see netdevice(7)."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
