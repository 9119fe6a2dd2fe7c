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
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.agent.server import api as server
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, dynamic_rendezvous

from lhcp.launch.jobs import is_cancelled
from lhcp.stop import EXIT_FORCED, EXIT_HUNG, EXIT_REFUSED, EXIT_STOPPED, SIGNALS

# Exit codes of ranks that have said why.
TOLD = (1, EXIT_REFUSED, EXIT_STOPPED, EXIT_FORCED, EXIT_HUNG)


def main(arguments: Sequence[str]) -> int:
    """Run until all ranks have ended: 0, or the code of the first that failed; 128 + n for signal n."""
    told = _pass_on_signals()
    out = os.environ.get("LHCP_OUT")  # of a job
    if out and is_cancelled(Path(out)):  # when there was nothing yet that could have been told
        return EXIT_STOPPED
    # Of ranks that are left when this ends, by Ctrl-C or with the first node's torchrun: none of them can save then.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    # They say of each rank that ended what is said better below.
    for name in (api.__name__, server.__name__, dynamic_rendezvous.__name__):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.run(run.get_args_parser().parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as error:
        code = _code(*error.get_first_failure(), told)
        # One that fails when it was told to stop is not to be tried again in the time that is left.
        return EXIT_FORCED if told and code not in (EXIT_REFUSED, EXIT_STOPPED) else code
    except RendezvousError:  # the store is the first node's torchrun
        print("error: the torchrun of the first node has ended, so this one does; see its messages", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    return 0


def _code(rank: int, failure: ProcessFailure, told: Collection[int]) -> int:
    """The exit code that a rank's end makes, which is explained where the rank could not."""
    code: int = failure.exitcode
    if -code in told:  # it could not note it yet
        print(f"stopped by {signal.Signals(-code).name}; go on by --resume last", file=sys.stderr)
        return EXIT_STOPPED
    if -code == signal.SIGALRM:  # see lhcp.watchdog
        print(f"error: no progress: rank {rank} could not run Python for hang_timeout_s", file=sys.stderr)
        print("       its stacks are at the end of its log in logs/ of the run folder", file=sys.stderr)
        print("       go on by --resume last; if nothing hangs, raise hang_timeout_s", file=sys.stderr)
        return EXIT_HUNG
    if code not in TOLD:
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        if -code == signal.SIGKILL:
            how += " (by the system, if it ran out of host memory: its log, dmesg, says so)"
        print(f"error: rank {rank} ended with {how}, so the run was stopped", file=sys.stderr)
        print("       go on by --resume last; logs are in the run folder", file=sys.stderr)
    return code if code >= 0 else 128 - code


def _pass_on_signals() -> set[int]:
    """From now on pass `SIGNALS` to the ranks, or end where there is none yet; those that came, as they come."""
    told: set[int] = set()
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)

    def watch() -> None:
        # The interpreter's C handler writes the number, also while the main thread waits in C for the other nodes.
        while number := os.read(receiving, 1):
            if number[0] not in SIGNALS:
                continue
            told.add(number[0])
            children = _children()
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, number[0])
            if not children:
                os._exit(EXIT_STOPPED)

    signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="signals", daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    return told


def _children() -> list[int]:
    """Processes that this one has started."""
    found = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            found += [int(pid) for pid in (thread / "children").read_text().split()]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
