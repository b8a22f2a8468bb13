"""Quiet transformers: its bars and notes are not what is tested."""

import pytest
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def keeps_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers hold fp8 parameters without a GPU: loading them needs none."""
    quantizer = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["fp8"]
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
