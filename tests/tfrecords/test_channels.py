import shutil

from tfrecords.channels import describe_missing, find_missing
from tfrecords.sources import read_sites


def test_a_whole_tree_lacks_nothing(release_tree):
    sites = read_sites(release_tree)
    reasons = find_missing(release_tree, sites)
    assert (reasons == "").all()
    assert describe_missing(sites, reasons) is None


def test_missing_channels_and_sites_are_named_and_counted(release):
    (release / "images/RPE-01/Plate1/B03_s2_w5.png").unlink()
    (release / "images/RPE-01/Plate1/B03_s2_w6.png").unlink()
    shutil.rmtree(release / "images/HUVEC-18")
    sites = read_sites(release)
    reasons = find_missing(release, sites)
    assert dict(zip(sites["site_id"], reasons, strict=True))["RPE-01_1_B03_2"] == "missing channels w5, w6"
    report = describe_missing(sites, reasons, show=2)
    assert "9 of 32 sites lack channel files" in report
    assert "missing channels w5, w6: 1 (RPE-01_1_B03_2)" in report
    assert "no files: 8 (HUVEC-18_1_B02_1, HUVEC-18_1_B02_2, and 6 more)" in report
