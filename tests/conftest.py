"""Settings shared by all tests."""
import sys
from pathlib import Path

import hypothesis
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# No deadline: the machines that run this are shared. The same examples every time: a failure can be run again.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("repository")
torch.set_num_threads(1)      # tiny models; and the tests of several cores at once do not fight
