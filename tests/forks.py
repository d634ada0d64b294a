"""Processes that start at once: they are forked from one that has imported the package, which takes seconds."""

import json
import os
import subprocess
import sys

import torch

# For every line of input this program forks processes that run the pieces of code in it, all at the same time, and
# prints their exit statuses. A process that takes longer than the given number of seconds is ended by a signal, and so
# are the others of a group of which one fails, as torchrun does.
_LOOP = """
import json, os, signal, sys, traceback
sys.path[0] = os.getcwd()  # for the modules of the tests
import huggingface_hub.hf_api
import scorematch.evaluation, scorematch.pretrained, scorematch.training  # and torch
names = {"__name__": "__main__"}
exec(sys.argv[1], names)
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
for line in sys.stdin:
    call = json.loads(line)
    statuses = {}
    for code, out, error in zip(call["codes"], call["stdout"], call["stderr"]):
        child = os.fork()
        statuses[child] = None
        if child == 0:
            signal.alarm(call["seconds"])
            os.environ.clear()
            os.environ.update(call["environment"])
            os.chdir(call["folder"])
            for number, name in ((1, out), (2, error)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            status = 1
            try:
                exec(code, dict(names))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    while None in statuses.values():
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        for other in [other for other in statuses if status and call["group"] and statuses[other] is None]:
            os.kill(other, signal.SIGTERM)
    print(*statuses.values(), flush=True)
"""


class Forks:
    """Runs code in separate processes, such as those of a group, or because huggingface_hub reads the environment when
    it is imported.

    Args:
        first: more code that runs before the processes are forked, such as imports; all other code sees its names.
    """

    def __init__(self, first=""):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _LOOP, first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code, folder, environment=os.environ, *, seconds=300):
        """Runs code in a folder; returns its exit status, its output and its errors."""
        return self.run_together([code], folder, environment, seconds=seconds)[0]

    def run_together(self, codes, folder, environment=os.environ, *, seconds=300, group=False):
        """Runs pieces of code at the same time, each in its own process; returns the results of ``run``."""
        outputs = {name: [folder / f".{name}{i}" for i in range(len(codes))] for name in ("stdout", "stderr")}
        call = {"codes": codes, "folder": str(folder), "environment": dict(environment)}
        call |= {"seconds": seconds, "group": group}
        call |= {name: [str(path) for path in paths] for name, paths in outputs.items()}
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        statuses = [int(status) for status in self.process.stdout.readline().split()]
        texts = [[path.read_text() for path in paths] for paths in outputs.values()]
        for path in (path for paths in outputs.values() for path in paths):
            path.unlink()
        return list(zip(statuses, *texts, strict=True))

    def group(self, size, code, folder, *, seconds=300, check=True):
        """Runs code in all processes of a group, with the environment of torchrun; returns the results of ``run``.

        A group of one process has no environment of its own, as without torchrun.
        """
        # As with torchrun, the store is none of the processes, which do not end at the same time.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        own = "import os; os.environ.update(RANK='{0}', LOCAL_RANK='{0}')\n"
        codes = [own.format(rank) + code for rank in range(size)]
        if size == 1:
            codes, shared = [code], {}
        done = self.run_together(codes, folder, {**os.environ, **shared}, seconds=seconds, group=True)
        assert not check or all(status == 0 for status, *_ in done), done
        return done

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
