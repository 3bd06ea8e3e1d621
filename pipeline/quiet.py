"""The libraries' own bars, advice and deprecations are kept off the screen; what matters is said by the stages."""

import logging
import os
import sys
import warnings


def quiet() -> None:
    """Before the libraries are imported, and without importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # true only adds a warning at the first fork
    if os.environ.get("WANDB_MODE") == "offline":  # at which transformers prints a line on stdout
        os.environ["WANDB_MODE"] = "dryrun"  # the same to wandb
    if not sys.stderr.isatty():  # in a log: no bar for what takes seconds, and a line every ten for what takes longer
        os.environ.setdefault("TQDM_DELAY", "5")
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional CPU kernel that is not there
    for library in ("transformers", "peft", "trl"):  # names that one of them has not yet caught up with in another
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)


def no_weight_bars() -> None:
    """transformers' bars over weight files: milliseconds for tiny, and the stage has said that it loads."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
