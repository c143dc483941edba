"""One thread per process: the tensors of tests are small, and waiting threads slow other processes down."""

import torch

torch.set_num_threads(1)
