"""docs/settings.md is generated from the dataclasses."""

from pathlib import Path

from coe_megatron.config.settings_page import settings_page

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_current() -> None:
    assert DOCUMENT.read_text() == settings_page(), "run: python -m coe_megatron.config.settings_page"


def test_a_setting_has_values_default_and_meaning() -> None:
    assert "| `chain.gating` | `independent`, `shared_router`, `fixed` | `independent` | router of" in settings_page()
    assert "| `optimizer.betas` | [number ≥ 0, < 1; number ≥ 0, < 1] | `[0.9, 0.95]` | of AdamW. |" in settings_page()
