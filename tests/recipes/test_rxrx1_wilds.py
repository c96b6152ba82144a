"""RxRx1-WILDS's job on small screens, in this process."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import predict
import pytest
import rxrx1_wilds
import tensorflow as tf
from coupled_adam import CoupledAdam
from methods import make_schedule
from PIL import Image
from wilds_scores import count_lacking, in_table_order, prediction_file, wilds_metrics

from tfrecords import build_records, list_sites, read_manifest, write_screen
from tfrecords.frames import read_frames

SMALL = {split: {"HUVEC": 1, "RPE": 1} for split in ("train", "val", "test")}
OPTIONS = ("--backbone", "tiny_resnet", "--batch-size", 8, "--epochs", 1, "--distribution", "none")


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """RxRx1's layout, 32 pixels, rows shuffled: the order of the table is none that records have."""
    folder = tmp_path_factory.mktemp("release") / "screen"
    write_screen(folder, image_size=32, treatments=8, experiments=SMALL)
    table = pd.read_csv(folder / "metadata.csv").sample(frac=1, random_state=0)
    table.to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def wilds(release, tmp_path_factory):
    """The same sites in WILDS's own layout: an RGB file of the centre 24 pixels a site."""
    folder = tmp_path_factory.mktemp("wilds")
    for path in release.rglob("*_w1.png"):
        files = [str(path).replace("_w1.png", f"_w{channel}.png") for channel in (1, 2, 3)]
        pixels = np.stack([np.asarray(Image.open(file))[4:28, 4:28] for file in files], axis=-1)
        target = folder / path.relative_to(release).with_name(path.name.replace("_w1", ""))
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
    columns = ["dataset", "site", "experiment", "plate", "well", "cell_type", "sirna_id"]
    pd.read_csv(release / "metadata.csv")[columns].to_csv(folder / "metadata.csv", index=False)
    return folder


def run(*arguments):
    return rxrx1_wilds.main([str(argument) for argument in arguments])


@pytest.fixture
def float32():
    """The policy again, after a job has set another."""
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("method", "precision"), [("erm", ()), pytest.param("abra", ("bfloat16",), marks=pytest.mark.any_backend)]
)
def test_it_trains_and_writes_what_the_leaderboard_takes(method, precision, wilds, tmp_path, monkeypatch, float32):
    monkeypatch.setitem(rxrx1_wilds.PUBLISHED, "stages", ["stem"])
    options = [*OPTIONS, *(["--mixed-precision", *precision] if precision else [])]
    metrics = run("--data", wilds, "--output", tmp_path / "out", "--seed", 3, "--method", method, *options)
    table = pd.read_csv(wilds / "metadata.csv")
    parts = {
        "val": table[table["dataset"] == "val"],
        "test": table[table["dataset"] == "test"],
        "id_test": table[(table["dataset"] == "train") & (table["site"] == 2)],
    }
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    for split, rows in parts.items():
        lines = (tmp_path / "out" / f"rxrx1_split:{split}_seed:3_epoch:best_pred.csv").read_text().split("\n")
        assert lines.pop() == "" and len(lines) == len(rows)
        right = pd.Series([int(line) for line in lines], index=rows.index) == rows["sirna_id"]
        assert metrics["wilds"][split]["acc_avg"] == pytest.approx(right.mean())
        for cell_type, group in right.groupby(rows["cell_type"]):
            assert metrics["wilds"][split][f"acc_cell_type:{cell_type}"] == pytest.approx(group.mean())
            assert metrics["wilds"][split][f"count_cell_type:{cell_type}"] == len(group)
        assert metrics["wilds"][split]["acc_wg"] == pytest.approx(right.groupby(rows["cell_type"]).mean().min())
    assert set(table["sirna_id"]) == set(range(8 + 3))  # Controls are classes as well.
    model = keras.models.load_model(tmp_path / "out" / "model.keras")
    if precision:
        assert model.backbone.layers[1].dtype_policy.name == "mixed_bfloat16"
    assert model.predict(np.zeros((1, 24, 24, 3), "float32"), verbose=0).shape == (1, 11)
    arguments = (tmp_path / "out/model.keras", tmp_path / "out/records", "--output", tmp_path / "again.csv")
    assert predict.main([*map(str, arguments)])["splits"]["test"] == metrics["splits"]["test"]


def test_rxrx1_gives_the_same_images_by_its_first_channels_and_its_centre(release, wilds, tmp_path, monkeypatch):
    monkeypatch.setattr(rxrx1_wilds, "CROP", 24)
    for name, data in (("derived", release), ("own", wilds)):
        arguments = rxrx1_wilds.parse(["--data", str(data), "--records", str(tmp_path / name)])
        assert rxrx1_wilds.prepare_records(arguments, tmp_path) == (tmp_path / name, data / "metadata.csv")
    derived, own = (read_manifest(tmp_path / name) for name in ("derived", "own"))
    assert derived["image_shape"] == own["image_shape"] == [24, 24, 3]
    derived, own = (images(tmp_path / name) for name in ("derived", "own"))
    assert derived == own and len(derived) == len(pd.read_csv(release / "metadata.csv"))


def images(records):
    """Bytes of the image of each site."""
    found = {}
    for path in records.rglob("*.tfrecord"):
        for record, _ in read_frames(path):
            feature = tf.train.Example.FromString(record).features.feature
            found[feature["site_id"].bytes_list.value[0]] = feature["image"].bytes_list.value[0]
    return found


def test_published_settings_are_the_defaults_of_real_data():
    published = {name: rxrx1_wilds.PUBLISHED[name] for name in ("backbone", "epochs", "batch_size", "learning_rate")}
    assert published == {"backbone": "ResNet50", "epochs": 90, "batch_size": 72, "learning_rate": 1e-3}
    assert rxrx1_wilds.PUBLISHED["weight_decay"] == 1e-5 and rxrx1_wilds.PUBLISHED["warmup_steps"] == 5415
    assert make_schedule(rxrx1_wilds.PUBLISHED, 40_612 // 72).warmup_steps == 5415
    assert make_schedule(rxrx1_wilds.PUBLISHED | {"epochs": 3}, 564).warmup_steps == 3 * 564 // 10
    assert rxrx1_wilds.CROP == 256 and rxrx1_wilds.CHANNELS == (1, 2, 3)


def test_sites_that_lack_files_are_counted(wilds, tmp_path):
    source = shutil.copytree(wilds, tmp_path / "source")
    table = pd.read_csv(source / "metadata.csv")
    experiment = table.loc[table["dataset"] == "test", "experiment"].iloc[0]
    for path in [*(source / "images" / experiment).rglob("*.png")][:3]:
        path.unlink()
    build_records(source, tmp_path / "records")
    assert [count_lacking(tmp_path / "records", split) for split in ("val", "test")] == [0, 3]


@pytest.mark.any_backend
def test_records_of_another_label_are_refused_before_training(wilds, tmp_path):
    build_records(wilds, tmp_path / "records", label="cell_type")
    with pytest.raises(ValueError, match="built with --label cell_type; RxRx1-WILDS's is sirna_id"):
        run("--records", tmp_path / "records", "--output", tmp_path / "out", *OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.any_backend
def test_records_of_other_splits_are_refused_and_other_images_pointed_out(release, tmp_path, capsys):
    build_records(release, tmp_path / "mixed", channels=(1, 2, 3), splits="mixed-to-test")
    with pytest.raises(ValueError, match="built with --splits mixed-to-test; RxRx1-WILDS's is wilds"):
        run("--records", tmp_path / "mixed", "--output", tmp_path / "out", *OPTIONS)
    build_records(release, tmp_path / "six")
    rxrx1_wilds.check_records(tmp_path / "six", True)
    assert "WARNING" not in capsys.readouterr().out
    rxrx1_wilds.check_records(tmp_path / "six", False)
    assert "have images of (32, 32, 6), channels [1, 2, 3, 4, 5, 6]. RxRx1-WILDS's have 256" in capsys.readouterr().out


@pytest.mark.any_backend
def test_a_split_whose_controls_alone_have_labels_is_not_scored(capsys):
    kinds, labels = ["treatment", "positive_control"], pd.array([None, 7], "Int64")
    sites = pd.DataFrame({"well_type": kinds, "label": labels})
    assert not rxrx1_wilds.has_labelled_treatments("test", sites)
    assert "Not scored: of test controls alone have labels" in capsys.readouterr().out
    assert rxrx1_wilds.has_labelled_treatments("test", sites.assign(label=pd.array([3, 7], "Int64")))
    assert rxrx1_wilds.has_labelled_treatments("test", sites[1:])


def test_weights_are_looked_at_before_records_are_built(wilds, tmp_path):
    arguments = ("--data", wilds, "--output", tmp_path / "out", "--distribution", "none")
    with pytest.raises(ValueError, match="--weights no.h5 cannot be loaded into ResNet50 .*a file of its weights"):
        run(*arguments, "--weights", "no.h5")
    with pytest.raises(ValueError, match="--weights no.h5 cannot be loaded into tiny_resnet .*earlier jobs alone"):
        run(*arguments, "--weights", "no.h5", "--backbone", "tiny_resnet")
    with pytest.raises(ValueError, match="--perturb-after is needed for ResNet101"):
        run(*arguments, "--weights", "none", "--backbone", "ResNet101", "--method", "abra")
    assert rxrx1_wilds.parse(["--perturb-after", "conv1_relu"]).perturb_after == ["conv1_relu"]
    assert not (tmp_path / "out").exists()


def test_without_metadata_csv_there_is_no_order_and_no_file(release, tmp_path, capsys):
    build_records(release, tmp_path / "records", channels=(1, 2, 3))
    arguments = rxrx1_wilds.parse(["--records", str(tmp_path / "records")])
    assert rxrx1_wilds.prepare_records(arguments, tmp_path)[1] == release / "metadata.csv"
    sites = list_sites(tmp_path / "records", "val", ("treatment", "control"))
    (tmp_path / "short.csv").write_text("experiment,plate,well,site\nHUVEC-02,1,B02,1\n")
    with pytest.raises(ValueError, match=r"short.csv lacks \d+ sites of the records \(first: 'HUVEC-02_"):
        in_table_order(sites, tmp_path / "short.csv")
    assert prediction_file("test", 0) == "rxrx1_split:test_seed:0_epoch:best_pred.csv"


def test_the_worst_group_is_the_worst_cell_type():
    score = {
        "accuracy": 0.4,
        "cell_type": {"U2OS": {"accuracy": 0.1, "count": 3}, "RPE": {"accuracy": 0.5, "count": 9}},
    }
    assert wilds_metrics(score)["acc_wg"] == 0.1


def test_weight_decay_is_coupled_as_torchs_adam_has_it():
    layer = keras.layers.Dense(1, use_bias=False)
    layer.build((None, 3))
    w = np.array([[1.0], [-2.0], [0.5]])
    layer.kernel.assign(w)
    optimizer = CoupledAdam(0.1, l2=0.3, epsilon=1e-8)
    optimizer.build([layer.kernel])
    m, v = np.zeros((3, 1)), np.zeros((3, 1))
    for step in range(1, 4):
        gradient = np.full((3, 1), 0.2 * step)
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")])
        total = gradient + 0.3 * w
        m, v = 0.9 * m + 0.1 * total, 0.999 * v + 0.001 * total**2
        w = w - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer.kernel), w, rtol=1e-4)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.l2 == 0.3


@pytest.mark.any_backend
def test_a_job_that_was_stopped_goes_on_with_resume(wilds, tmp_path, monkeypatch):
    arguments = ("--data", wilds, "--records", tmp_path / "records", *OPTIONS, "--epochs", 2)
    metrics = run(*arguments, "--output", tmp_path / "whole")

    def stop_in_the_second_epoch(table, batch, logs=None):
        if Path(table.filename).stat().st_size and len(pd.read_csv(table.filename)):
            raise KeyboardInterrupt

    monkeypatch.setattr(keras.callbacks.CSVLogger, "on_train_batch_end", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "--output", tmp_path / "out", "--resume")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="or go on with the job that was stopped there with --resume"):
        run(*arguments, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="option seed is 0 in the checkpoint and 1 now"):
        run(*arguments, "--output", tmp_path / "out", "--resume", "--seed", 1)
    assert run(*arguments, "--output", tmp_path / "out", "--resume") == metrics
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    pd.testing.assert_frame_equal(history, pd.read_csv(tmp_path / "whole" / "history.csv"))
