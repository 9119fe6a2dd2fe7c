"""torchrun, but quiet about its own internals and with the exit code of the rank that failed first.

`python -m lhcp.agent TORCHRUN-ARGUMENTS`, started by `lhcp.launch.torchrun`. torchrun itself ends with 1 whatever a
rank's code was, under forty lines of its own traceback, when the rank has said already what was wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: Sequence[str]) -> int:
    """Run until all ranks have ended: 0, or the code of the first that failed; 128 + n for signal n."""
    try:
        run.run(run.get_args_parser().parse_args(list(arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code != 2:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            print(f"error: rank {rank} ended with {how}, so the run was stopped", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
