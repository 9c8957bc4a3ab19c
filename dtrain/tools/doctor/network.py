"""This machine's ports and name, and the way to W&B."""

from __future__ import annotations

import http.client
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from dtrain.errors import WorldError
from dtrain.launch.env.ports import free_port, is_own_address, listen_on
from dtrain.tools.doctor.finding import Finding, passed
from dtrain.tools.doctor.words import seconds

PORTS, HOST_NAME, WANDB = "ports", "host name", "W&B"
_PATIENCE = 3.0
_SLOW_NAME = 1.0

T = TypeVar("T")


class LateError(Exception):
    """No answer in time."""


def bounded(call: Callable[[], T], limit: float = _PATIENCE) -> T:
    """Returns a call's result; looking a name up takes no time limit of its own.

    Raises:
        LateError: it took longer than some seconds.
        Exception: what the call raised.
    """
    done: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

    def work() -> None:
        try:
            done.put((call(), None))
        except Exception as error:  # noqa: BLE001 - raised by the caller
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = done.get(timeout=limit)
    except queue.Empty:
        raise LateError(f"no answer within {limit:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # a result where there is no error


def check_port() -> Finding:
    """Opens a free port and connects to it, as ranks on this machine do."""
    try:
        port = free_port("")
        with listen_on("127.0.0.1", port) as listener:
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as follower:
                listener.settimeout(_PATIENCE)
                host, _ = listener.accept()
                with host:
                    follower.sendall(b"dtrain")
                    host.settimeout(_PATIENCE)
                    said = host.recv(6)
            took = time.monotonic() - began
    except (OSError, WorldError) as error:
        why = f"cannot open a free port and connect to it at 127.0.0.1: {error}"
        return Finding(
            PORTS, "fail", why, "bring up the loopback interface (ip link set lo up), and check the firewall"
        )
    if said != b"dtrain":
        return Finding(
            PORTS, "fail", f"port {port} of 127.0.0.1 answered {said!r}", "check what listens there: ss -ltnp"
        )
    return passed(PORTS, f"port {port} opened and reached in {seconds(took)}")


def check_host_name(look_up: Callable[..., object] = socket.getaddrinfo) -> Finding:
    """Looks this machine's own name up, as gloo and other machines do.

    Args:
        look_up: how; `socket.getaddrinfo`.
    """
    name, began = socket.gethostname(), time.monotonic()
    remedy = f"add a line to /etc/hosts: 127.0.1.1 {name} (several nodes: the address that the others use)"
    try:
        bounded(lambda: look_up(name, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError, LateError) as error:
        words = f"{name} does not resolve: {getattr(error, 'strerror', None) or error}"
        return Finding(HOST_NAME, "warn", words, remedy)
    took = time.monotonic() - began
    try:
        own = bounded(lambda: is_own_address(name))
    except (WorldError, LateError) as error:
        return Finding(HOST_NAME, "warn", f"{name}: {error}", remedy)
    address = socket.gethostbyname(name) if own else _addresses(name)
    if not own:
        words = f"{name} resolves to {address}, which is not an address of this machine"
        return Finding(HOST_NAME, "warn", words, f"fix /etc/hosts or DNS: {remedy}")
    words = f"{name} is {address}, found in {seconds(took)}"
    return Finding(HOST_NAME, "warn", f"{words}: slow", remedy) if took > _SLOW_NAME else passed(HOST_NAME, words)


def _addresses(name: str) -> str:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return ", ".join(dict.fromkeys(str(one[4][0]) for one in found))


def check_wandb(environ: Mapping[str, str] | None = None, patience: float = _PATIENCE) -> Finding:
    """Asks the W&B server for a sign of life, for 3 s at most; never a failure, since runs can be synced later.

    Args:
        environ: by default the process's; WANDB_BASE_URL and WANDB_MODE hold.
        patience: seconds.
    """
    env = os.environ if environ is None else environ
    if env.get("WANDB_MODE", "online") != "online":
        return Finding(WANDB, "skip", f"WANDB_MODE={env['WANDB_MODE']}")
    url = env.get("WANDB_BASE_URL") or _wandb_server()
    began = time.monotonic()
    try:
        status = bounded(lambda: _status(url), patience)
    except (OSError, ValueError, UnicodeError, http.client.HTTPException, LateError) as error:
        why = f"{url} cannot be reached: {getattr(error, 'strerror', None) or error}"
        return Finding(
            WANDB, "warn", why, "train with track.wandb.mode=offline and sync the run later, or check the proxy"
        )
    words = f"{url} answered {status} in {seconds(time.monotonic() - began)}"
    return passed(WANDB, words)


def _wandb_server() -> str:
    """Returns where the installed wandb sends to by default."""
    from wandb import Settings

    return str(Settings().base_url)


def _status(url: str) -> int:
    parts = urlsplit(url)
    kind = http.client.HTTPConnection if parts.scheme == "http" else http.client.HTTPSConnection
    proxy = _proxy(parts.scheme, parts.hostname or "")
    connection = kind(proxy or parts.netloc, timeout=_PATIENCE)
    if proxy:
        connection.set_tunnel(parts.netloc)
    try:
        connection.request("GET", f"{parts.path}/healthz")
        return connection.getresponse().status
    finally:
        connection.close()


def _proxy(scheme: str, host: str) -> str:
    """Returns HOST:PORT of the proxy that the environment names for an address, "" without one."""
    from urllib.request import getproxies, proxy_bypass

    found = getproxies().get(scheme, "")
    return "" if not found or proxy_bypass(host) else urlsplit(found if "//" in found else f"//{found}").netloc
