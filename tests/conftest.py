import os

import torch

# After an error in a loader worker torch waits so many seconds, of 5, for it to leave by itself, and then ends it.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


def pytest_configure(config):
    """The card is hidden from all tests, and the processes they start, but those marked gpu, which run by themselves:
    pytest tests -m gpu. The others compare with float32 loops, and bf16 is the default of probes on CUDA."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():                                 # Triton reads it when it is imported
        os.environ["TRITON_INTERPRET"] = "1"
