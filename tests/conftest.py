import pytest
import torch

from tests import durations

# The tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--record-long", action="store_true", help=f"renew {durations.LIST.name} for the cases that run")


def pytest_configure(config):
    if config.getoption("--record-long"):
        config.pluginmanager.register(durations.Recorder())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    long = set(durations.LIST.read_text().splitlines())
    for item in items:
        if item.nodeid in long:
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles anew, on the same random numbers; what fails leaves gradients on."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "the test left gradients off"
