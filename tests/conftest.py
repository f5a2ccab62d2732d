import os

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter, which must be said before triton is
# imported anywhere.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
collect_ignore = ["example_project"]  # test_testing.py runs it


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
