"""torchrun, but quiet about its own internals and with the exit code of the rank that failed first.

`python -m lhcp.agent TORCHRUN-ARGUMENTS`, started by `lhcp.launch.torchrun`. torchrun itself ends with 1 whatever a
rank's code was, under forty lines of its own traceback, when the rank has said already what was wrong. Told to stop by
SIGTERM it gives the ranks 30 seconds before it kills them, and SIGUSR1 kills it at once; this passes both on and waits
for the ranks, which save and end (see `lhcp.stop`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.agent.server import api as server
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, dynamic_rendezvous

from lhcp.stop import EXIT_FORCED, EXIT_HUNG, EXIT_STOPPED, SIGNALS

# Exit codes of ranks that have said why.
TOLD = (1, 2, EXIT_STOPPED, EXIT_FORCED, EXIT_HUNG)


def main(arguments: Sequence[str]) -> int:
    """Run until all ranks have ended: 0, or the code of the first that failed; 128 + n for signal n."""
    told: set[int] = set()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.add(number)
        children = _children()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, number)
        if not children:
            sys.exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    # Of ranks that are left when this ends, by Ctrl-C or with the first node's torchrun: none of them can save then.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    # They say of each rank that ended what is said better below.
    for name in (api.__name__, server.__name__, dynamic_rendezvous.__name__):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.run(run.get_args_parser().parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if -code in told:  # a rank that could not note it yet
            print(f"stopped by {signal.Signals(-code).name}; go on by --resume last", file=sys.stderr)
            return EXIT_STOPPED
        if -code == signal.SIGALRM:  # see lhcp.watchdog
            print(f"error: no progress: rank {rank} could not run Python for hang_timeout_s", file=sys.stderr)
            print("       its stacks are at the end of its log in logs/ of the run folder", file=sys.stderr)
            print("       go on by --resume last; if nothing hangs, raise hang_timeout_s", file=sys.stderr)
            return EXIT_HUNG
        if code not in TOLD:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            print(f"error: rank {rank} ended with {how}, so the run was stopped", file=sys.stderr)
            print("       go on by --resume last; logs are in the run folder", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except RendezvousError:  # the store is the first node's torchrun
        print("error: the torchrun of the first node has ended, so this one does; see its messages", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    return 0


def _children() -> list[int]:
    """Processes that this one has started."""
    threads = Path("/proc/self/task").iterdir()
    return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
