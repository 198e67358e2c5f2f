"""The parts of `fuzz.py`. One thread and no GPU: a process with threads cannot be forked."""

import os
import sys
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# the models and good media are made as the tests make theirs
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
