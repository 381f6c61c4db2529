"""An Engine of the tests' own, which they may stop, kill, freeze and start again.

Its processes, mounts and network are in namespaces of their own. Their first process ends with this one, or when it
is told to, and takes all with it: daemon, containerd, shims, containers, mounts, the bridge and the data.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import docker

from tests.conftest import IMAGE, wait_until

#: seconds; a busy machine needs its time, and containers get ten to end in.
PATIENCE = 60
#: The first process: it waits for the end of its input, and orphans that end are not kept as zombies.
FIRST = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


def can_have_own_daemon() -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in ("dockerd", "unshare", "nsenter", "mount"))


class OwnDaemon:
    def __init__(self, folder: Path) -> None:
        """`folder`: what it shares with the tests. Its path must be short: it holds a socket."""
        self.folder = folder
        self.base_url = f"unix://{folder}/docker.sock"
        self._data = folder / "data"
        #: Its containers' processes are counted below it, and nothing else's.
        self._cgroup = folder.name
        self._flags: tuple[str, ...] | None = None
        # No socket, pid file or setting of another Engine is there, nor the key that gives it its id.
        folders = (self._data, "/run", "/etc/docker")
        mounts = " && ".join(f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}" for folder in folders)
        self._spaces = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private",
             "sh", "-c", f'{mounts} && exec "$0" -c "$1"', sys.executable, FIRST],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        assert self._spaces.stdout is not None
        assert self._spaces.stdout.readline() == b"ready\n"
        unshare = self._spaces.pid
        self._first = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().strip()

    def start(self, *flags: str) -> None:
        """Until it answers. What it needs is there: the image, too, after the first start."""
        log, data = self.folder / "log", self._data
        self._run(
            f"rm -f {data}/docker.pid; setsid dockerd --data-root={data}/root --exec-root={data}/exec"
            f" --pidfile={data}/docker.pid --host={self.base_url} --iptables=false"
            f" --cgroup-parent=/{self._cgroup} --exec-opt=native.cgroupdriver=cgroupfs {' '.join(flags)}"
            f" </dev/null >>{log} 2>&1 & echo $! >{data}/pid"
        )
        self._flags = flags
        wait_until(lambda: self.answers() or not self._is_up(), PATIENCE)
        assert self.answers(), log.read_text()[-2000:]

    def stop(self) -> None:
        """As a service is stopped."""
        self.signal("TERM")
        self._wait_for_end()

    def kill(self) -> None:
        """The daemon alone; what runs in its containers does not notice."""
        self.signal("KILL")
        self._wait_for_end()

    def crash(self) -> None:
        """Everything at once, as when a machine loses its power."""
        self._run("kill -KILL -1")
        self._flags = None

    def signal(self, name: str) -> None:
        """STOP freezes it, CONT lets it go on."""
        self._run(f"kill -{name} $(cat {self._data}/pid)")

    def be_fresh(self) -> None:
        """Up, without flags, and without containers."""
        self._run(f"kill -CONT $(cat {self._data}/pid) 2>/dev/null || true")
        if self._flags:
            self.crash()
        if self._flags != () or not self._is_up():
            self.start()
        with self.client() as client:
            for container in client.containers.list(all=True, ignore_removed=True):
                with suppress(docker.errors.NotFound):
                    container.remove(force=True, v=True)

    def load(self, image: bytes) -> None:
        with self.client() as client:
            client.images.load(image)

    def answers(self) -> bool:
        # Not by docker-py: a socket of its that does not connect is left to the garbage collector, which says so.
        with socket.socket(socket.AF_UNIX) as caller, suppress(OSError):
            caller.settimeout(5)
            caller.connect(self.base_url.removeprefix("unix://"))
            caller.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in caller.recv(64)
        return False

    @contextmanager
    def client(self) -> Iterator[docker.DockerClient]:
        client = docker.DockerClient(self.base_url, version="1.41", timeout=PATIENCE)
        try:
            yield client
        finally:
            client.close()

    def close(self) -> None:
        assert self._spaces.stdin is not None
        self._spaces.stdin.close()
        try:
            self._spaces.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._spaces.kill()
            self._spaces.wait()
        assert self._spaces.stdout is not None
        self._spaces.stdout.close()
        # What the kernel does not forget with its processes.
        for parent in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")):
            for group in sorted((parent / self._cgroup).glob("**/"), reverse=True):
                with suppress(OSError):
                    group.rmdir()

    def _is_up(self) -> bool:
        return self._run(f"kill -0 $(cat {self._data}/pid)", check=False) == 0

    def _wait_for_end(self) -> None:
        wait_until(lambda: not self._is_up(), PATIENCE)
        self._flags = None

    def _run(self, script: str, *, check: bool = True) -> int:
        """As its shell would, by its numbers of processes."""
        inside = ["nsenter", f"--target={self._first}", "--net", "--mount", "--pid"]
        done = subprocess.run(
            [*inside, "sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
        assert not check or done.returncode == 0, done.stderr
        return done.returncode


@contextmanager
def own_daemon(image: bytes) -> Iterator[OwnDaemon]:
    """One that is up, and has the image."""
    folder = Path(tempfile.mkdtemp(prefix="cm-daemon-"))
    try:
        daemon = OwnDaemon(folder)
        try:
            daemon.start()
            daemon.load(image)
            yield daemon
        finally:
            daemon.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def exported(client: docker.DockerClient) -> bytes:
    """The image of the tests, as another Engine can load it."""
    return b"".join(client.images.get(IMAGE).save(named=True))
