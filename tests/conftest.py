import pytest
import torch

# The tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles anew, on the same random numbers; what fails leaves gradients on."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "the test left gradients off"
