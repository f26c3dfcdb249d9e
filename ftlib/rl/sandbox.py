"""Run Python that nobody vouches for: a process of its own without network, files or rights, under hard limits.

`unshare` gives namespaces of the kernel: no network, no other process to see, and a root of its own that holds the
system's programs, read-only, and one small empty folder. Which tests passed comes back as a line that a nonce makes
valid, never as an exit code: code that ends early has passed nothing. Code and tests share one interpreter, so code
made to cheat its tests still can; a table of samples shows it.
"""

import ctypes
import functools
import json
import os
import resource
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from ftlib.errors import UserError

OUTPUT_BYTES = 1 << 20  # printed; more ends the process
PR_SET_PDEATHSIG = 1  # of Linux: a signal for when the parent ends
LIBC = ctypes.CDLL(None)
ISOLATE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts")
ROOT = r"""
set -e
root=$1 python=$2; shift 2
mount -t tmpfs -o size=16m,mode=755,nosuid none "$root"
for d in /usr /bin /lib /lib64 "$python"; do
  [ -e "$d" ] && [ ! -e "$root$d" ] || continue
  mkdir -p "$root$d"
  mount --bind "$d" "$root$d"
  mount -o remount,bind,ro,nosuid "$root$d"
done
mkdir -m 1777 "$root/tmp"
exec chroot "$root" /bin/sh -c 'cd /tmp; exec "$@"' sh "$@"
"""  # run by /bin/sh inside of the namespaces
CHILD = """
import json, os, resource, sys
job = json.loads(sys.stdin.buffer.read())
sys.stdin.close()
if os.geteuid() == 0 and job["nobody"]:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (16, 16))
space, passed = {"__name__": "__main__"}, []
try:
    exec(compile(job["code"], "answer", "exec"), space)
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, "test", "exec"), dict(space))
            passed.append(number)
        except Exception:
            pass
except Exception:
    pass
sys.__stdout__.write("\\n" + job["nonce"] + json.dumps(passed) + "\\n")
sys.__stdout__.flush()
"""


def check(allow: bool, unsafe_local: bool) -> None:
    """UserError unless code may be run here."""
    if not allow:
        raise UserError(
            "this reward runs code that the model writes",
            where="rewards[].args.allow",
            fix="set it to true if that is wanted",
        )
    if not isolated() and not unsafe_local:
        raise UserError(
            "this machine gives no namespaces (unshare), so code could reach the network and your files",
            where="rewards[].args.unsafe_local",
            fix="allow user namespaces, or set it to true on a machine with nothing to lose",
        )


@functools.cache
def isolated() -> bool:
    """Whether processes can be cut off from network and files here."""
    nonce = "ready"
    try:
        return nonce in _run(json.dumps({"code": "", "tests": [], "nonce": nonce, "nobody": True}), 10, 512, True)
    except OSError:
        return False


def passed(code: str, tests: list[str], seconds: float, memory_mib: int) -> list[bool]:
    """Which tests hold after `code` ran in the same module; all false where a limit was met."""
    nonce = secrets.token_hex(16)
    job = {"code": code, "tests": list(map(str, tests)), "nonce": nonce, "nobody": isolated()}
    output = _run(json.dumps(job), seconds, memory_mib, isolated())
    lines = [line for line in output.splitlines() if line.startswith(nonce)]
    try:
        found = set(json.loads(lines[-1][len(nonce) :])) if len(lines) == 1 else set()
    except (ValueError, TypeError):
        found = set()
    return [number in found for number in range(len(tests))]


def _run(job: str, seconds: float, memory_mib: int, isolate: bool) -> str:
    folder = tempfile.mkdtemp(prefix="ftlib-code-")
    command = [os.path.realpath(sys.executable), "-I", "-S", "-c", CHILD]
    if isolate:
        user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        command = [*ISOLATE, *user, "/bin/sh", "-c", ROOT, "sh", folder, sys.base_prefix, *command]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        cwd=folder,
        start_new_session=True,
        preexec_fn=functools.partial(_limit, seconds, memory_mib),
    )
    try:
        return _talk(process, job.encode(), time.monotonic() + seconds).decode("utf-8", "replace")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # with unshare goes the whole namespace
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def _talk(process: subprocess.Popen, job: bytes, deadline: float) -> bytes:
    """What the process prints until it ends; nothing if it is too slow or prints too much."""
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        return b""
    found = b""
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and ready.select(left):
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return found
            found += piece
            if len(found) > OUTPUT_BYTES:
                break
    return b""


def _limit(seconds: float, memory_mib: int) -> None:
    """In the child, before it becomes the command."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
    if sys.platform == "linux":  # code that waits for ever outlives nobody, even where its reward's process was killed
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
