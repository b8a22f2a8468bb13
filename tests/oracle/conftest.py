"""Quiet transformers: its bars and notes are not what is tested."""

import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
