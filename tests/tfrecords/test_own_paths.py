import pytest
from PIL import Image

from tfrecords.build import build_records
from tfrecords.own_paths import check_links, fields_of

SCREEN = {
    "table": "wells.csv",
    "images": "{folder}/{well}.png",
    "channels": [1],
    "columns": {"experiment": "experiment", "well": "well"},
    "splits": {"train": ["a"]},
}


def test_the_names_in_a_template():
    assert fields_of("{plate}/{well}_f{site:02}_ch{channel}.tif") == ["plate", "well", "site"]


@pytest.fixture
def linked(tmp_path):
    """A source with two wells, whose second file is a link to one outside."""
    source, outside = tmp_path / "source", tmp_path / "outside"
    for folder in (source / "p", outside):
        folder.mkdir(parents=True)
    Image.new("L", (8, 8), 1).save(source / "p/A.png")
    Image.new("L", (8, 8), 2).save(outside / "B.png")
    (source / "p/B.png").symlink_to(outside / "B.png")
    (source / "wells.csv").write_text("experiment,folder,well\na,p,A\na,p,B\n")
    return source


MESSAGE = "wells.csv, row 3: .* is, or lies behind, a link that leads out of the source folder"


def test_a_linked_file_cannot_lead_out_of_the_source(linked, tmp_path):
    with pytest.raises(ValueError, match=MESSAGE):
        build_records(linked, tmp_path / "records", screen=SCREEN, label="experiment")
    assert not (tmp_path / "records").exists()


def test_a_linked_folder_cannot_either(linked, tmp_path):
    (linked / "q").symlink_to(tmp_path / "outside")
    (linked / "wells.csv").write_text("experiment,folder,well\na,p,A\na,q,B\n")
    with pytest.raises(ValueError, match=MESSAGE):
        build_records(linked, tmp_path / "records", screen=SCREEN, label="experiment")


def test_a_linked_folder_of_a_release_cannot_either(release, tmp_path):
    (release / "images/HUVEC-01").rename(tmp_path / "outside")
    (release / "images/HUVEC-01").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="HUVEC-01_1_.* is, or lies behind, a link that leads out of the source"):
        build_records(release, tmp_path / "records")


def test_a_link_inside_the_source_may_be_followed_and_so_may_the_source_itself_be_one(linked, tmp_path):
    (linked / "p/B.png").unlink()
    (linked / "p/B.png").symlink_to("A.png")
    (tmp_path / "name").symlink_to(linked)
    manifest = build_records(tmp_path / "name", tmp_path / "records", screen=SCREEN, label="experiment")
    assert manifest["index"]["count"] == 2
    check_links(tmp_path / "name", [["p/A.png"], ["p/B.png"]], ["row 1", "row 2"])


def test_full_paths_below_the_source_and_doubled_slashes_are_taken(linked, tmp_path):
    """As CellProfiler's load_data.csv has them."""
    (linked / "p/B.png").unlink()
    (linked / "wells.csv").write_text(f"experiment,folder,well\na,p/,A\na,{linked}/p,A\n")
    with pytest.raises(ValueError, match="row 3: the site 'a_1_A_1' is a duplicate"):
        build_records(linked, tmp_path / "records", screen=SCREEN, label="experiment")
    for folder in ("p/", f"{linked}/p/", f"{linked}/p"):
        (linked / "wells.csv").write_text(f"experiment,folder,well\na,{folder},A\n")
        manifest = build_records(linked, tmp_path / "records", screen=SCREEN, label="experiment")
        assert manifest["index"]["count"] == 1  # and the second and third time the same records
    (linked / "wells.csv").write_text(f"experiment,folder,well\na,{linked}2/p,A\n")
    with pytest.raises(ValueError, match="full and inside .*source'.*, with / between"):
        build_records(linked, tmp_path / "records", screen=SCREEN, label="experiment")
