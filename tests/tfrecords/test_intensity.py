import pytest

from tfrecords.intensity import Range, list_ranges, parse_intensity, ranges_of


def test_a_manifest_gives_the_ranges_back():
    ranges = {("a", 1): [Range(100, 4095, 16), Range(0, 255)], ("a", 2): [Range(1, 2), Range(3, 4)]}
    rows = list_ranges(ranges, (1, 3))
    assert rows[1] == {"experiment": "a", "plate": 1, "channel": 3, "low": 0, "high": 255, "bits": None}
    assert ranges_of({"intensity": rows}) == ranges
    assert list_ranges(None, (1,)) == [] and ranges_of({"intensity": []}) is None


def test_percentiles_and_levels_are_taken_apart():
    assert parse_intensity("percentile:0.1,99.9") == ("percentile", 0.1, 99.9)
    assert parse_intensity("fixed:0,4095") == ("fixed", 0, 4095)


@pytest.mark.parametrize(
    "text", ["percentile", "percentile:1,101", "fixed:5,5", "fixed:1,70000", "auto:1,2", "fixed:a,b"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(
        ValueError, match=f"Unknown intensity '{text}'. Expected percentile:LOW,HIGH .* or fixed:LOW,HIGH"
    ):
        parse_intensity(text)
