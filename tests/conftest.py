import os

import torch

if not torch.cuda.is_available():                                     # Triton reads it when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

# After an error in a loader worker torch waits so many seconds, of 5, for it to leave by itself, and then ends it.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5
