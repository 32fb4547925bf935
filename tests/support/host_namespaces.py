"""Several hosts on one machine: Linux namespaces, a bridge between them, and an sshd on each.

    with network_of_hosts(folder, ["head", "p0", ...]) as network:
        network.host("p0").run("hostname")         a command on that host, as root there
        network.host("p0").cut() | mend()          its link
        network.host("p0").kill()                  it vanishes: no process of it is left, and nobody hears of it

A host has its own network, processes, mounts, name and IPC, and its own home, /tmp, /dev/shm and /run; programs and the rest of
the file system it shares with the machine. Its processes are in one PID namespace, so that its end is the end of all of them. The
bridge is in a namespace of its own: nothing is reachable from the machine, or from outside.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

NEEDED = ("ip", "nsenter", "unshare", "mount", "ssh", "ssh-keygen", "rsync", "bash")
SUBNET = "10.77.0"
_CLONE_NEWNET = 0x40000000
_START_TIMEOUT_S = 60.0


def what_is_missing(*more: str) -> str | None:
    """Why no hosts can be made here, or these programs not be run on them; None if they can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in (*NEEDED, *more) if shutil.which(name) is None]
    if not (Path("/usr/sbin/sshd").exists() or shutil.which("sshd")):
        missing.append("sshd")
    return f"there is no {', '.join(missing)}" if missing else None


@dataclass
class Host:
    name: str
    address: str
    namespace: str
    folder: Path  # on the machine; its home is `folder / "home"`
    switch: str
    process: subprocess.Popen[bytes] | None = None
    first_pid: int = 0  # of the namespace's process 1, as the machine counts
    network: int = 0

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def command(self, line: str) -> list[str]:
        enter = ["nsenter", "--target", str(self.first_pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--wd=/root"]
        clean = ["env", "-i", "HOME=/root", "USER=root", "LANG=C.UTF-8", f"PATH={os.environ['PATH']}", "TERM=dumb"]
        return [*enter, *clean, "bash", "-c", f"source ~/.bashrc; {line}"]

    def run(self, line: str, *, timeout_s: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(line), capture_output=True, text=True, timeout=timeout_s, check=False)
        assert not check or done.returncode == 0, f"{self.name}: {line}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def cut(self) -> None:
        """Nothing gets through, in either direction, and nobody is told."""
        _ip("-n", self.switch, "link", "set", self.namespace, "down")

    def mend(self) -> None:
        _ip("-n", self.switch, "link", "set", self.namespace, "up")

    def kill(self) -> None:
        self.cut()
        self._end()

    def pids(self) -> list[int]:
        """Of its processes, as the machine counts."""
        return [pid for pid in _pids() if _namespace_of(pid, "net") == self.network]

    def in_network(self, work: Callable[[], T]) -> T:
        """Runs `work` on a thread whose sockets are this host's."""
        box: list[Any] = []

        def run() -> None:
            descriptor = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(descriptor)
            box.append(work())

        thread = threading.Thread(target=run, name=f"on {self.name}")
        thread.start()
        thread.join()
        assert box, f"what was run on {self.name} failed"
        return box[0]

    def start(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        setup = self.folder / "init.sh"
        (self.folder / "up").unlink(missing_ok=True)
        setup.write_text(
            _INIT.format(name=self.name, folder=self.folder, home=self.home, shared=self._shared()), encoding="utf-8"
        )
        self.network = os.stat(f"/run/netns/{self.namespace}").st_ino
        unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / "host.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *unshare, "bash", str(setup)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not (self.folder / "up").exists():
            assert self.process.poll() is None, f"{self.name}: {(self.folder / 'host.log').read_text()}"
            assert time.monotonic() < deadline_s, f"{self.name} did not come up"
            time.sleep(0.02)
        self.first_pid = next(
            pid for pid in self.pids() if _namespace_of(pid, "pid") != _namespace_of(os.getpid(), "pid") and _inner_pid(pid) == 1
        )

    def _shared(self) -> str:
        """Of the machine's home, which its own one hides, a host sees the Python that runs this."""
        lines = []
        for path in {Path(sys.base_prefix), Path(sys.prefix)}:
            if path.is_relative_to("/root"):
                place = self.home / path.relative_to("/root")
                place.mkdir(parents=True, exist_ok=True)
                lines.append(f"mount --bind {path} {place}")
        return "\n".join(lines)

    def _end(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None and self.first_pid:
            os.kill(self.first_pid, signal.SIGKILL)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)
        self.process = None


# Process 1 of a host. bash reaps whatever is orphaned.
_INIT = """
set -eu
hostname {name}
mount --make-rprivate /
mount -t tmpfs -o size=8g,mode=1777 tmpfs /dev/shm
{shared}
mount --rbind {home} /root
mount -t tmpfs -o size=4g,mode=1777 tmpfs /tmp
mkdir -p /tmp/run/sshd /tmp/run/lock && mount --bind /tmp/run /run
cp {folder}/hosts /tmp/hosts && mount --bind /tmp/hosts /etc/hosts
"$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f {folder}/sshd_config &
touch {folder}/up
wait
"""

_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100:30:200
Subsystem sftp internal-sftp
"""


@dataclass
class HostNetwork:
    hosts: dict[str, Host]
    key: Path

    def host(self, name: str) -> Host:
        return self.hosts[name]

    def leftover(self) -> list[str]:
        """Command lines of what still runs on any host, its process 1 and sshd excepted."""
        found = []
        for host in self.hosts.values():
            for pid in host.pids():
                line = _command_line(pid)
                if line and not any(known in line for known in ("init.sh", "sshd", "unshare ")):
                    found.append(f"{host.name}: {line[:120]}")
        return found


@contextmanager
def network_of_hosts(folder: Path, names: Sequence[str]) -> Iterator[HostNetwork]:
    """`folder` should have a short path. Every host can log in to every other as root, with the key of the network."""
    prefix = f"pd{os.getpid()}"
    switch = f"{prefix}sw"
    namespaces = [switch, *(f"{prefix}h{index}" for index in range(len(names)))]
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    hosts: dict[str, Host] = {}
    made: list[str] = []
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            made.append(namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{SUBNET}.{10 + index} {name}\n" for index, name in enumerate(names))
        for index, (name, namespace) in enumerate(zip(names, namespaces[1:], strict=True)):
            address = f"{SUBNET}.{10 + index}"
            _ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", namespace, "netns", switch)
            _ip("-n", switch, "link", "set", namespace, "master", "switch", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            host = hosts[name] = Host(name, address, namespace, folder / name, switch)
            _furnish(host, key, table)
            host.start()
        yield HostNetwork(hosts, key)
    finally:
        for host in hosts.values():
            host._end()
        for namespace in made:
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


def _furnish(host: Host, key: Path, table: str) -> None:
    ssh = host.home / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    (ssh / "authorized_keys").write_text(key.with_suffix(".pub").read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copy(key, ssh / "id_ed25519")
    (host.folder / "hosts").write_text(table, encoding="utf-8")
    (host.folder / "sshd_config").write_text(_SSHD.format(address=host.address, folder=host.folder), encoding="utf-8")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "host_key")], check=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _namespace_of(pid: int, kind: str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except OSError:
        return 0


def _inner_pid(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return 0


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
