"""What is compared bit by bit computes with as many threads as the processes that it is compared with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Other tests leave other numbers behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
