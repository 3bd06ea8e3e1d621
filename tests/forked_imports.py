"""What trainings, merges and servers on the embedded base import; what `pipeline/imports.py` leaves out, this does too."""

import gc
import importlib

from pipeline.imports import leave_out

leave_out("bitsandbytes", "datasets")
for name in (
    "aletheia.cli",
    "pipeline.dpo",
    "pipeline.merge",
    "pipeline.sft",
    "pipeline.train.training",
    "serving.front.app",
    "serving.serve",
    "serving.transformers_backend.engine",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "uvicorn",
):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a training begins with a collection, which would walk through all of it
