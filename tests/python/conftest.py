"""Shared set-up of the Python tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    """Tests that draw from the global generator draw the same every time, alone or in a suite."""
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def restored_threads():
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
