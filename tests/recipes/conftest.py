import functools

import pytest

from tfrecords import write_screen


@pytest.fixture(scope="session")
def small_screen(tmp_path_factory):
    """Function of a number of pixels that gives the folder of a screen, drawn once: two experiments in each of train,
    val and test, eight treatments."""
    experiments = {split: {"HUVEC": 1, "RPE": 1} for split in ("train", "val", "test")}

    @functools.cache
    def draw(pixels):
        folder = tmp_path_factory.mktemp("screen") / "screen"
        write_screen(folder, image_size=pixels, treatments=8, experiments=experiments)
        return folder

    return draw


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
