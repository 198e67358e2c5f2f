"""A worker that talks with the others as training does, and perhaps dies of a signal meanwhile."""

import os
import signal
import sys

from chatbind_cli import worker

worker.work_in_child()
worker.watch_parent()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

dist.init_process_group("gloo")
try:
    for step in range(100):
        if sys.argv[1] == str(worker.rank()) and step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        if worker.rank() == 0 and step == 5:
            print(os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
    worker.report_outcome(0, "")
except RuntimeError as error:
    worker.report_outcome(1, f"internal error: {error}")
os._exit(0)
