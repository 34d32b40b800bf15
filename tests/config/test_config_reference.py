"""docs/settings.md says what the dataclasses say."""

from pathlib import Path

from coe_megatron.config.reference import reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == reference(), "run: python -m coe_megatron.config.reference"


def test_a_setting_is_told_with_its_values_default_and_meaning() -> None:
    assert "| `chain.gating` | `independent`, `shared_router`, `fixed` | `independent` | router of" in reference()
    assert "| `optimizer.betas` | [number ≥ 0, < 1; number ≥ 0, < 1] | `[0.9, 0.95]` | of AdamW. |" in reference()
