"""One thread per process: the tensors of tests are small, and waiting threads slow other processes down."""

from contextlib import contextmanager

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def full_disk():
    """A context in which files hold 64 bytes at most, which fails where writing to a full disk does."""
    resource = pytest.importorskip("resource", reason="needs a system with limits")

    @contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
