"""``embcomp compress`` under a limit of memory that is no file: run with bytes, "in all" or "more", and the arguments.

"more" is more than the process has after its imports, which depends on how torch was built. The limit is one of private
memory that can be written, to which Linux counts maps of files that nobody writes to as well, as safetensors makes one:
the size of such a file is added.
"""

import re
import resource
import sys
from pathlib import Path

import torch

from embcomp.cli import main

torch.set_num_threads(1)
torch.linalg.eigh(torch.eye(4).double() @ torch.eye(4).double())  # libraries make room for themselves once
taken = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
file = Path(sys.argv[3])
limit = int(sys.argv[1]) + (taken if sys.argv[2] == "more" else 0)
limit += 0 if file.suffix == ".npy" else file.stat().st_size
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(main(["compress", *sys.argv[3:]]))
