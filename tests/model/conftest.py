"""Every test of `modules` runs on one rank."""

import pytest


@pytest.fixture(autouse=True)
def on_one_rank(single_rank: None) -> None: ...
