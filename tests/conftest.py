"""Tests marked ``real_data("mnist")`` run where that set is found, ``cuda`` where a GPU is; else they are skipped."""

import os

import pytest
import torch

from swiftsure import data
from swiftsure.errors import InputError

# Resumed trainings are the same bit for bit on one thread; the small networks here are also quicker on one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_runtest_setup(item: pytest.Item) -> None:
    if any(item.iter_markers("cuda")) and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for marker in item.iter_markers("real_data"):
        # A misspelt name must not turn into a silent skip.
        unknown = set(marker.args) - set(data.names())
        if unknown or not marker.args:
            pytest.fail(f"real_data must name data sets out of {data.names()}; it names {marker.args}")
        for name in marker.args:
            try:
                data.path(name)
            except InputError as error:
                pytest.skip(str(error))
