"""Code that a model wrote: what passes, and what hostile code does not get."""

import os
import time

import pytest

from ftlib.rl import sandbox
from ftlib.rl.rewards.code import code_tests

pytestmark = pytest.mark.skipif(not sandbox.isolated(), reason="this machine gives no namespaces")
ADD = "def add(a, b):\n    return a + b\n"


def score(code, tests, **args):
    return code_tests([code], [tests], allow=True, **({"seconds": 20.0} | args))[0]


def test_tests_are_passed_or_not():
    tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 5"]
    assert score(f"It is\n```python\n{ADD}```\n", tests[:1]) == 1
    assert score(ADD, tests) == 0 and score(ADD, tests, partial=True) == 0.5
    assert score("def add(a, b", tests, partial=True) == 0
    assert score("raise SystemExit(0)", ["pass"]) == 0 and score("import os; os._exit(0)", ["pass"]) == 0
    assert score(ADD, ["print('x' * 10)", "assert add('a', 'b') == 'ab'"]) == 1


HOSTILE = {
    "network": "import socket\nsocket.create_connection(('1.1.1.1', 80), 1)",
    "loopback of the machine": "import socket\ns = socket.socket()\ns.settimeout(1)\ns.connect(('127.0.0.1', 22))",
    "files": "open('/etc/passwd').read()",
    "home": "import os\nassert os.listdir('/root') or True\nopen('/root/.netrc')",
    "writing": "open('/usr/x', 'w')",
    "a big file": "open('big', 'w').write('x' * (3 << 20))",
    "environment": "import os\nos.environ['HOME']",
    "memory": "x = bytearray(2 << 30)",
    "processes": "import os\nfor _ in range(99):\n    if os.fork() == 0:\n        import time\n        time.sleep(9)",
    "its parent": "import os, signal\nos.kill(os.getppid() or 2, signal.SIGKILL)",
    "reading the tests": "import sys\nassert sys.stdin.read()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_gets_nothing(name):
    assert score(f"{HOSTILE[name]}\nreached = True", ["assert reached"]) == 0


def test_endless_code_is_killed_with_all_that_it_started():
    began = time.perf_counter()
    code = "import os\nif os.fork() == 0:\n    os.setsid()\nwhile True: pass"
    assert score(code, ["pass"], seconds=1.0) == 0
    assert score("while True: print('x' * 10000)", ["pass"], seconds=1.0) == 0
    assert time.perf_counter() - began < 8
    mine = [p for p in os.listdir("/proc") if p.isdigit() and "while True: pass" in _command(p)]
    assert not mine


def _command(process):
    try:
        with open(f"/proc/{process}/cmdline") as file:
            return file.read()
    except OSError:
        return ""
