import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles anew, on the same random numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
