import pytest
import torch

# The tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles anew, on the same random numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
