"""Every test runs on the CPU, without the hub, on one thread per process. Set before torch is first imported."""

import os
import signal

# A shell that starts the tests in the background may have Ctrl-C ignored; runs are then left as they would be.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads of two test processes on two cores would only get in each other's way; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# What a developer's shell exports must not decide how a test ends.
for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS"):
    os.environ.pop(name, None)
