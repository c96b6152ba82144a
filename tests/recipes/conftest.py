import pytest


@pytest.fixture
def tiny_ladder(monkeypatch):
    """Every preset of the ladder at its smallest."""
    import ladder
    import ladder_methods

    from tests.recipes.tiny_ladder import RULE, SCREEN, TINY

    for name, value in TINY.items():
        monkeypatch.setitem(ladder_methods.COMMON, name, value)
    for plan in ladder.PRESETS.values():
        for name, value in (("screen", SCREEN), ("rule", RULE)):
            monkeypatch.setitem(plan, name, value)
